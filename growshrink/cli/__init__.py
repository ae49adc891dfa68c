"""Command lines: options, their limits, exit codes. The only room that knows tyro."""
