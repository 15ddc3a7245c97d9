"""``c2g demo``: classifier, certificate, generator and evaluation on handwritten digits, in one go."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from hpc_c2g.evaluation.config import EvaluateConfig
from hpc_c2g.fitting.config import CertifyConfig, ClassifierConfig
from hpc_c2g.training.config.train import TrainConfig
from launch._compose.cli import T, composed, register, run_verb, typed
from launch._compose.groups import SCHEMAS
from launch.certify import certify
from launch.classifier import classifier
from launch.evaluate import evaluate
from launch.train import train

BEST = {"train": ["solutions=3", "global_batch=600"]}
"""Overrides of the demo: three solutions show more of the training digits, in three times the time."""

QUICK = {
    "train": ["steps=300", "log.every=50"],
    "evaluate": ["classification_steps=100", "free_steps=300", "count=500"],
}


@dataclass
class DemoConfig:
    """Settings of the demo.

    Attributes:
        run_dir: Run directory; the classifier is written to ``run_dir/classifier``.
        seed: Seed of classifier, generator and samples.
        quick: Train for a few steps, to check that everything works: the images are poor.
    """

    run_dir: str = "runs/demo"
    seed: int = 0
    quick: bool = False


def demo(config: DemoConfig) -> None:
    """Run the verbs one after the other, with their defaults except for ``BEST`` or ``QUICK``."""
    began = time.perf_counter()
    bundle = f"{config.run_dir}/classifier"

    def settings(verb: str, schema: type[T], *overrides: str) -> T:
        extra = (QUICK if config.quick else BEST).get(verb, [])
        return typed(composed(verb, [*overrides, *extra]), schema)

    for verb in ("classifier", "certify", "train", "evaluate"):
        register(verb, *SCHEMAS[verb])
    print("1/4 a classifier on 100 handwritten digits, fitted to the margin")
    classifier(settings("classifier", ClassifierConfig, f"out={bundle}", f"seed={config.seed}"))
    print("2/4 certify: its distance from a KKT point")
    certify(settings("certify", CertifyConfig, f"classifier={bundle}"))
    print("3/4 a generator from the classifier alone, without data")
    trained = time.perf_counter()
    train(settings("train", TrainConfig, f"classifier={bundle}", f"run_dir={config.run_dir}", f"seed={config.seed}"))
    trained = time.perf_counter() - trained
    print("4/4 evaluate it against real digits that it never saw")
    evaluate(settings("evaluate", EvaluateConfig, f"run_dir={config.run_dir}", f"seed={config.seed}"))
    folder = Path(config.run_dir)
    print(f"\nmade in {time.perf_counter() - began:.0f} s (generator {trained:.0f} s):")
    for name, what in {
        "samples.png": "generated digits, a column per class",
        "nearest.png": "training digits (above) and their nearest samples (below)",
        "evaluation.json": "the table",
        "classifier": "the classifier bundle",
        "tensorboard": f"curves: tensorboard --logdir {folder / 'tensorboard'}",
    }.items():
        print(f"  {folder / name}  {what}")


def main() -> None:
    """Run the verb."""
    run_verb("demo", DemoConfig, demo)


if __name__ == "__main__":
    main()
