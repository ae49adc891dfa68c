"""A trained net on its way out: read from a checkpoint, written in the formats of deployment (see tools/export.py)."""

from growshrink.cycle.source import Source as Source
from growshrink.cycle.source import read_source as read_source
