"""Tables of cases: the default run takes a sample, the rest carries the marker `exhaustive`, which CI runs as well."""

import pytest


def sampled(cases, kept):
    """The cases as parameters of a test, those that `kept` (a collection or a predicate) leaves out marked."""
    keeps = kept if callable(kept) else lambda case: case in kept
    cases = list(cases)
    assert any(map(keeps, cases)), "nothing would be left in the default run"
    return [case if keeps(case) else exhaustive(case) for case in cases]


def exhaustive(case):
    """One case, or several arguments in a tuple, for the exhaustive run only."""
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.exhaustive)
