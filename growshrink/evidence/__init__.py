"""Experiments that tell whether growing pays: arms, equal budgets, several seeds at once, verdicts."""
