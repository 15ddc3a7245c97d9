"""What each stage does, on settings and folders alone. Imports of the science wait until they are needed: they take seconds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from hpc_c2g.settings import from_plain
from hpc_c2g.studies.tasks import Task

OpCost = Callable[[Path, Task], None]
"""Called with the study's folder and the task; several processes at once where the task has several ranks."""


def prepared(stage: str) -> OpCost:
    """The stage's work, everything imported that it needs."""
    return _PREPARE[stage]()


def _classifier() -> OpCost:
    from hpc_c2g.fitting.config import FITS, ClassifierConfig
    from hpc_c2g.fitting.make import make_classifier
    from hpc_c2g.fitting.progress import LogLines

    def work(study: Path, task: Task) -> None:
        # whatever an attempt that was cut off left there is replaced
        values = {**task.config, "out": str(study / task.folder), "overwrite": True}
        config = from_plain(ClassifierConfig, values, {"fit": FITS})
        make_classifier(config, LogLines(config.fit, functools.partial(print, flush=True)))

    return work


def _certify() -> OpCost:
    from hpc_c2g.data.config import DataConfig
    from hpc_c2g.fitting.certify import certify_bundle

    def work(study: Path, task: Task) -> None:
        data = task.config.get("data")
        certify_bundle(str(study / task.folder), None if data is None else from_plain(DataConfig, data))

    return work


def _train() -> OpCost:
    from hpc_c2g.training.config.train import config_from
    from hpc_c2g.training.loop import train

    def work(study: Path, task: Task) -> None:
        folders = [str(study / folder) for folder in task.inputs]
        classifier = folders if len(folders) > 1 else folders[0]
        train(config_from({**task.config, "classifier": classifier, "run_dir": str(study / task.folder)}))

    return work


def _evaluate() -> OpCost:
    from hpc_c2g.evaluation.config import EvaluateConfig
    from hpc_c2g.evaluation.evaluate import evaluate

    def work(study: Path, task: Task) -> None:
        config = from_plain(EvaluateConfig, {**task.config, "run_dir": str(study / task.folder)})
        evaluate(config, functools.partial(print, flush=True))

    return work


def _bound() -> OpCost:
    from hpc_c2g.bound.config import BoundConfig
    from hpc_c2g.bound.sampling_error import sampling_error

    def work(study: Path, task: Task) -> None:
        sampling_error(from_plain(BoundConfig, {**task.config, "run_dir": str(study / task.folder)}))

    return work


_PREPARE: dict[str, Callable[[], OpCost]] = {
    "classifier": _classifier,
    "certify": _certify,
    "train": _train,
    "evaluate": _evaluate,
    "bound": _bound,
}
