"""Work of each stage, on settings and folders alone. A stage's imports, which take seconds, are made when it is loaded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from hpc_c2g.settings import from_plain
from hpc_c2g.studies.tasks import Task

StageFn = Callable[[Path, Task], None]
"""Called with the study's folder and the task; several processes at once where the task has several ranks."""


def load_stage(stage: str) -> StageFn:
    """Return the function that does the stage's work, with all its imports made; it logs as the task's settings say."""
    from hpc_c2g.distributed.environment import detect
    from hpc_c2g.logs import run_logging
    from hpc_c2g.monitoring.config import LogConfig

    work = _LOADERS[stage]()

    def logged(study: Path, task: Task) -> None:
        log = from_plain(LogConfig, task.config.get("log", {}))
        with run_logging(log.level, detect().rank, study / task.folder if log.all_ranks else None):
            work(study, task)

    return logged


def _classifier() -> StageFn:
    from hpc_c2g.fitting.config import FITS, ClassifierConfig
    from hpc_c2g.fitting.make import make_classifier
    from hpc_c2g.fitting.progress import LogLines

    def work(study: Path, task: Task) -> None:
        # replaces what a killed attempt left there
        values = {**task.config, "out": str(study / task.folder), "overwrite": True}
        config = from_plain(ClassifierConfig, values, {"fit": FITS})
        make_classifier(config, LogLines(config.fit, functools.partial(print, flush=True)))

    return work


def _certify() -> StageFn:
    from hpc_c2g.data.config import DataConfig
    from hpc_c2g.fitting.certify import certify_bundle

    def work(study: Path, task: Task) -> None:
        data = task.config.get("data")
        certify_bundle(str(study / task.folder), None if data is None else from_plain(DataConfig, data))

    return work


def _train() -> StageFn:
    from hpc_c2g.training.config.train import config_from
    from hpc_c2g.training.loop import train

    def work(study: Path, task: Task) -> None:
        folders = [str(study / folder) for folder in task.inputs]
        classifier = folders if len(folders) > 1 else folders[0]
        train(config_from({**task.config, "classifier": classifier, "run_dir": str(study / task.folder)}))

    return work


def _evaluate() -> StageFn:
    from hpc_c2g.evaluation.config import EvaluateConfig
    from hpc_c2g.evaluation.evaluate import evaluate

    def work(study: Path, task: Task) -> None:
        config = from_plain(EvaluateConfig, {**task.config, "run_dir": str(study / task.folder)})
        evaluate(config, functools.partial(print, flush=True))

    return work


def _bound() -> StageFn:
    from hpc_c2g.bound.config import BoundConfig
    from hpc_c2g.bound.sampling_error import sampling_error

    def work(study: Path, task: Task) -> None:
        sampling_error(from_plain(BoundConfig, {**task.config, "run_dir": str(study / task.folder)}))

    return work


_LOADERS: dict[str, Callable[[], StageFn]] = {
    "classifier": _classifier,
    "certify": _certify,
    "train": _train,
    "evaluate": _evaluate,
    "bound": _bound,
}
