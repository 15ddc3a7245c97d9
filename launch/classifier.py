"""``c2g classifier``: fit or import a classifier into a bundle."""

from __future__ import annotations

import functools

from rich.console import Console

from hpc_c2g.fitting.config import ClassifierConfig
from launch._compose.cli import run_verb
from launch._compose.groups import SCHEMAS


def classifier(config: ClassifierConfig) -> None:
    """Make the bundle and print its summary."""
    from hpc_c2g.fitting.make import make_classifier  # torch takes seconds to import: after the settings are checked
    from hpc_c2g.fitting.progress import LogLines, line

    console = Console(stderr=True)
    with console.status("fitting the classifier") as status:
        log = LogLines(config.fit, functools.partial(console.print, soft_wrap=True))

        def log_fn(step: int, value: float) -> None:
            status.update(line(config.fit, step, value))
            if not console.is_terminal:  # a log file shows no status
                log(step, value)

        bundle, record = make_classifier(config, log_fn)
    if "held_out_accuracy" in record:
        print(
            f"classifier: smallest margin {record['smallest_margin']:.1f}, train accuracy {record['train_accuracy']:.3f},"
            f" held-out accuracy {record['held_out_accuracy']:.3f} ({record['steps']} steps, {record['seconds']:.0f} s)"
        )
    print(f"bundle: {config.out} ({len(bundle.classes)} classes, input {list(bundle.input_shape)})")


def main() -> None:
    """Run the verb."""
    run_verb("classifier", ClassifierConfig, classifier, SCHEMAS["classifier"][1])


if __name__ == "__main__":
    main()
