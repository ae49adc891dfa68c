"""tools/angle_speed.py as its users run it: what it computes, not how fast."""

import re
from pathlib import Path

from program import completed

TOOL = Path(__file__).parents[2] / "tools" / "angle_speed.py"


def run(*options):
    return completed(TOOL, *options)


def test_both_ways_agree_and_are_timed():
    result = run("--quick", "--quiet", "--many", 1000, "--few", 3, "--pixels", 8)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert 0 <= float(re.search(r"largest difference (\S+) rad of 3 subnets", result.stdout)[1]) <= 1e-12
    assert re.search(r"[\d,]+ subnets/s by look-up .*, [\d,]+ by slicing", result.stdout)
    assert "all 262,144 subnets ranked in" in result.stdout


def test_a_plain_net_is_refused():
    result = run("--model", "reducenet20")
    assert result.returncode == 2 and "reducenet20: has no widths" in result.stderr
