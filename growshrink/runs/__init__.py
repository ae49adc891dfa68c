"""Run folders and checkpoints."""

from growshrink.runs.folder import RunFolder as RunFolder
