"""Torch and the standard library alone: files, processes, signals, time, seeds."""
