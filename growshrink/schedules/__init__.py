"""Schedules: pure functions from the count of updates to a value, and lam in a closed loop."""

from growshrink.schedules.closed_loop import ClosedLoop as ClosedLoop
from growshrink.schedules.functions import Schedule as Schedule
from growshrink.schedules.functions import constant as constant
from growshrink.schedules.functions import cosine as cosine
from growshrink.schedules.functions import hold_then_vanish as hold_then_vanish
from growshrink.schedules.functions import join as join
from growshrink.schedules.functions import linear as linear
from growshrink.schedules.functions import rewarm as rewarm
