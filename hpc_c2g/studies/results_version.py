"""Version of each stage's results: raised by hand whenever the same settings give other numbers than before."""

from __future__ import annotations

RESULTS_VERSION: dict[str, int] = {"classifier": 1, "certify": 1, "train": 1, "evaluate": 1, "bound": 1}
"""Part of every task's id, so that results of two versions never share a folder.

Raise a stage's number in the same commit that changes its results, run ``python -m tests.helpers.golden`` and add a line to
"Results versions" in CHANGELOG.md. A change of speed, of names or of messages raises nothing.
"""
