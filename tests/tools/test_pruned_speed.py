from pathlib import Path

import pytest

from program import completed

TOOL = Path(__file__).parents[2] / "tools" / "pruned_speed.py"


@pytest.mark.exhaustive
def test_all_ways_judge_alike_and_are_timed_part_by_part():
    pytest.importorskip("torch_pruning")
    options = ("--subnets", 2, "--statistics", 1, "--images", 40, "--batch-size", 8, "--pixels", 16, "--threads", 1)
    result = completed(TOOL, "reducenet20", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {line.split(":")[1].split()[0]: line.split()[2:] for line in result.stdout.splitlines() if ": " in line[:24]}
    assert list(rows) == ["loop", "today", "ours", "bound"]
    loop, today, ours = (list(map(float, rows[way][:7])) for way in ("loop", "today", "ours"))
    assert min(loop[0], loop[1]) > 0 == max(*today[:2], *ours[:2], loop[4], today[4]) < ours[4]
    assert float(rows["loop"][7]) == 1.0 and "load average" in result.stdout
