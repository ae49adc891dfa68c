"""timm's own tests/test_models.py, unchanged, against every model registered here.

A job of its own: `pytest -m conformance`. Downloads the source of the timm that is installed, once.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm

import growshrink.models

TIMM = "1.0.31"  # what a first-class model is differs from version to version, and so does the number of tests
NUM_MODELS = 41
TESTS = {
    "test_model_backward",
    "test_model_backward_fx",
    "test_model_default_cfgs",
    "test_model_forward",
    "test_model_forward_features",
    "test_model_forward_fx",
    "test_model_forward_fx_torchscript",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
    "test_model_forward_torchscript",
    "test_prune_intermediate_layers_contract",
}


def timm_source() -> Path:
    """The unpacked source distribution of timm, from the cache folder where it is already there."""
    assert timm.__version__ == TIMM, (
        f"timm {timm.__version__} is installed, these tests are timm {TIMM}'s: "
        f"install timm=={TIMM}, or move TIMM and TESTS in {__file__} to the new version."
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "growshrink"
    target = cache / f"timm-{TIMM}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:  # same file system: the rename below is atomic
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "timm", "-d", folder]
        done = subprocess.run([*pip, f"timm=={TIMM}"], capture_output=True, text=True)
        assert done.returncode == 0, f"pip could not download timm's source:\n{done.stderr}"
        with tarfile.open(Path(folder) / f"timm-{TIMM}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        try:
            (Path(folder) / f"timm-{TIMM}").rename(target)
        except OSError:
            if not target.is_dir():  # else another run was faster
                raise
    return target


def run_timm_tests(source: Path, folder: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Run them in `folder`; returns the JUnit report and the finished process."""
    # Not timm/: a package beside the tests would shadow the installed one.
    shutil.copytree(source / "tests", folder / "tests")
    shutil.copy(source / "pyproject.toml", folder)
    report = folder / "report.xml"

    # Nothing of the run that this test is part of may leak in.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    paths = [Path(__file__).parent, Path(growshrink.models.__file__).parents[2], env.get("PYTHONPATH")]
    env |= {
        "TORCH_BACKEND": "timm_shim",
        "TORCH_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",  # two workers
        "PYTHONPATH": os.pathsep.join(str(p) for p in paths if p),
    }
    own_config = ["-c", "pyproject.toml", "--rootdir", str(folder)]
    select = ["tests/test_models.py", "-k", "reducenet or vanillanet or mdeq"]
    # TorchScript is deprecated and says so at every call.
    options = ["-p", "no:cacheprovider", "-W", "ignore", "-n", "2", "-q", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", *own_config, *select, *options]
    return report, subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def outcomes(report: Path) -> dict[str, dict[str, str]]:
    """`{model: {test function: "passed", "failure", "error" or "skipped"}}` of a JUnit report."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    pattern = re.compile(r"(\w+)\[(?:\d+-)?((?:reducenet|vanillanet|mdeq)\w+)(?:\.untrained)?(?:-\d+)?\]")
    for case in ElementTree.parse(report).iter("testcase"):
        match = pattern.fullmatch(case.get("name", ""))
        assert match, f"a test that is not about one of our models: {case.get('name')}"
        function, model = match.groups()
        assert function not in found[model], f"{case.get('name')} ran twice"
        bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        found[model][function] = bad[0] if bad else "passed"
    return found


@pytest.mark.conformance
def test_timms_own_tests_pass(tmp_path: Path) -> None:
    report, process = run_timm_tests(timm_source(), tmp_path)
    assert report.is_file(), process.stdout[-5000:] + process.stderr[-5000:]
    found = outcomes(report)
    bad = {f"{m}: {t}": o for m, tests in found.items() for t, o in tests.items() if o != "passed"}
    assert not bad, f"{bad}\n{process.stdout[-10000:]}"
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-5000:]
    models = set(timm.list_models(["reducenet*", "vanillanet*", "mdeq*"]))
    assert len(models) == NUM_MODELS and found.keys() == models
    for model, tests in found.items():
        assert tests.keys() == TESTS, model
