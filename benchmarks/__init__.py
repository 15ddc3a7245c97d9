"""Measurements of the toolkit on the machine that runs them: `python -m benchmarks.NAME`."""
