"""What makes two runs the same run: their resolved settings and the code that computes them, never the time or the study's place."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hpc_c2g

FIT = ("kkt", "classifiers", "data", "denormals")
ALARMS = ("monitoring/signatures", "monitoring/traits")  # they may lower the rates
TRAIN = ("kkt", "classifiers", "generators", "distributed", "training", "denormals", *ALARMS)
SCIENCE: dict[str, tuple[str, ...]] = {
    "classifier": FIT,
    "certify": (*FIT, "evaluation/certify"),
    "train": TRAIN,
    "evaluate": (*TRAIN, "data", "evaluation"),
    "bound": TRAIN,
}
"""Packages and modules whose code may change a stage's result."""
LENGTH = 12


@functools.cache
def code_version(stage: str) -> str:
    """Hash of what the stage's code does: comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    package = Path(hpc_c2g.__file__).parent
    for name in SCIENCE[stage]:
        module = (package / name).with_suffix(".py")
        for file in [module] if module.is_file() else sorted((package / name).glob("*.py")):
            digest.update(f"{file.relative_to(package)}\0{_meaning(file.read_text())}\0".encode())
    return digest.hexdigest()[:LENGTH]


def _meaning(source: str) -> str:
    """The syntax tree of a module without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            del body[0]
    return ast.dump(tree)


def run_id(
    stage: str, config: Mapping[str, Any], upstream: Sequence[str], shape: tuple[int, int] = (1, 1), code: str = ""
) -> str:
    """Twelve hexadecimal digits of (stage, settings, identities of what it builds on, processes, code).

    Args:
        stage: its name.
        config: resolved settings without the study's own paths.
        upstream: ids of the tasks whose results it takes, in order.
        shape: nodes, and processes on each: they do not change a result, but its speed, which scaling studies compare.
        code: version of the stage's code.
    """
    content = json.dumps([stage, config, list(upstream), list(shape), code], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:LENGTH]
