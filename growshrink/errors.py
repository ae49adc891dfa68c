"""The errors a user can cause.

All are `ValueError` subclasses, so `except ValueError` catches every one of them; each message says what was
wrong, where (the module's dotted name), and what to do.
"""


class GrowShrinkError(ValueError):
    """Base of every error that growshrink raises for something its user did."""


class AlgebraError(GrowShrinkError):
    """Two operators have no exact composition or sum as one convolution."""


class GrowError(GrowShrinkError):
    """A module that was asked for by name cannot be grown exactly, or nothing was selected."""


class FuseError(GrowShrinkError):
    """A grown net cannot be merged exactly into its plain architecture."""


class DropError(GrowShrinkError):
    """A grown module has nothing left once its branches are dropped."""


class EquivalenceError(GrowShrinkError):
    """Two nets that were claimed equal are not, or the check could not have told."""


class DataError(GrowShrinkError):
    """A data set is missing, damaged, or does not have the shape that was asked for."""


class PlanError(GrowShrinkError):
    """A plan of rounds, or an option of it, asks for something impossible."""


class RunError(GrowShrinkError):
    """A training run cannot start, go on, or be resumed."""
