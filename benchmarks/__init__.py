"""Measurements: ``python -m benchmarks.NAME``; each writes ``benchmarks/results/NAME.json``."""
