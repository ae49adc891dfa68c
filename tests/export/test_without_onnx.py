"""Where the extra is not installed, everything but ONNX can be exported."""

import subprocess
import sys

import pytest

CODE = """
import sys
sys.modules["onnxscript"] = None
from growshrink.errors import RunError
import growshrink.export
from growshrink.export.artefacts import require_onnx
try:
    require_onnx()
except RunError as error:
    print(error)
"""


@pytest.mark.exhaustive
def test_the_package_is_imported_and_the_hint_is_true():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CODE], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ONNX needs onnxscript: pip install -e '.[onnx]'")
