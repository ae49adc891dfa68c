"""Two processes that train one net, and what becomes of it when one of them dies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import growshrink
from growshrink.base import ranks
from growshrink.errors import RunError
from growshrink.runs.checkpoints import find_checkpoints
from growshrink.runs.folder import RunFolder, claim_together

HERE = Path(__file__).parent


@pytest.mark.exhaustive
def test_ranks_that_are_asked_to_stop_and_that_die(tmp_path):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(growshrink.__file__).parent.parent), str(HERE)]),
    }
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    command += ["--monitor-interval", "3"]  # the remaining rank notices on its own, before torchrun ends it
    done = subprocess.run(
        [sys.executable, *command, str(HERE / "ranks_worker.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert max(found["distance"]) < 1e-6 and max(found["distance, mapped"]) < 1e-6
    assert found["branches"][0] == found["branches"][1] and found["pixels"][0] == found["pixels"][1]
    assert found["undisturbed"][0] == found["undisturbed"][1]
    assert found["random"][0] != found["random"][1]  # dropouts of their own
    assert found["stopped"] == [[143, "stopped by SIGTERM after update 6 of 51"]] * 2
    assert found["lives"] == 3 and "another rank cannot be reached" in done.stderr
    assert found["killed"] == found["undisturbed"][0]
    assert found["random after"] == found["random"][0]
    assert not list(tmp_path.glob("*/.*.partial")) and len(find_checkpoints(tmp_path / "killed")) == 2
    kept = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("undisturbed", "killed")]
    assert [[json.loads(line)["train_loss"] for line in lines] for lines in kept][0] == [
        json.loads(line)["train_loss"] for line in kept[1]
    ]


def test_one_process_is_rank_0_of_1(tmp_path):
    tensor = torch.ones(2)
    ranks.average_([tensor])
    assert ranks.all_gather(3) == [3] and ranks.run_on_rank0(lambda: 4) == 4 and ranks.any_rank(True, tensor.device)
    assert (ranks.this_rank(), ranks.num_ranks()) == (0, 1) and tensor.tolist() == [1, 1]
    with ranks.joined("cpu"):
        assert not torch.distributed.is_initialized()
    with claim_together(lambda: RunFolder.claim(tmp_path / "a")) as folder, pytest.raises(RunError, match="in use"):
        assert folder.fresh
        claim_together(lambda: RunFolder.claim(tmp_path / "a"))
