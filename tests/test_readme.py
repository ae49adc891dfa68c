"""The README's Python runs as it stands, and its links point somewhere."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})


def test_links_and_commands_name_files_that_exist():
    text = README.read_text()
    named = re.findall(r"\]\((?!http)([^)#]+)\)", text) + re.findall(
        r"\b((?:recipes|tools|tests)/[\w/]+\.(?:py|svg))", text
    )
    assert named
    for path in named:
        assert (README.parent / path).exists(), path
