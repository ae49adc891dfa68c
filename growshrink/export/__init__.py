"""A trained net on its way out: read from a checkpoint, written in the formats of deployment, each of them checked."""

from growshrink.cycle.source import Source as Source
from growshrink.cycle.source import read_source as read_source
from growshrink.export.run import ExportOptions as ExportOptions
from growshrink.export.run import export as export
