"""``c2g publish DIR OUT``: an experiment as a folder: README.md with its tables, results.json, figures."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from hpc_c2g.studies.study import read_study
from hpc_c2g.studies.task_status import read_statuses
from hpc_c2g.studies.tasks import find_specs
from launch._compose.arguments import as_overrides
from launch._compose.cli import config_folder, run_verb, user_errors


@dataclass
class PublishConfig:
    """Settings of the publication.

    Attributes:
        study_dir: Folder of the study.
        out: Folder to write; notes in its README.md stay.
    """

    study_dir: str = "???"
    out: str = "???"


def publish(config: PublishConfig) -> None:
    """Collect the results, and write the folder."""
    from hpc_c2g.reporting.collect import collect, figure_source
    from hpc_c2g.reporting.publication import content
    from hpc_c2g.reporting.publication import publish as write

    folder = Path(config.study_dir)
    study = read_study(folder)
    views = read_statuses(folder, None)
    collected = collect(folder, study.study.name, views)
    found, runs = collected.results, collected.runs
    folders = {key: view.task.folder for key, view in runs.items()}
    specs = {task.id: task for task in find_specs(folder)}
    data = {key: specs[specs[key].upstream[0]].config["data"]["name"] for key in runs if key in specs}
    figures = figure_source(found, collected.curves, collected.prediction).figures()
    whole = content(folder, study.study.name, study.study.about, found, folders)
    write(
        folder, Path(config.out), whole, commands(study.study.name, study.grids[-1], config.out), figures, folders, data
    )
    print(f"written: {config.out}/README.md, results.json and {len(figures)} figures")


def commands(name: str, grid: list[str], out: str) -> list[str]:
    """Return the commands that repeat an experiment of the toolkit, without the location of its data on this machine."""
    kind = "experiment" if (config_folder() / "study" / "experiment" / f"{name}.yaml").is_file() else "study"
    again = " ".join(shlex.quote(re.sub(r"(?<=data\.root=).*", "DATA", word)) for word in grid)
    place = shlex.quote(f"studies/{Path(out).resolve().name}")  # one study, one page
    return [f"c2g sweep {kind}={name} study_dir={place} {again}", f"c2g publish {place} {shlex.quote(out)}"]


def main() -> None:
    """Run the verb."""
    with user_errors("publish"):
        overrides = as_overrides(sys.argv[1:], PublishConfig, ["study_dir", "out"])
    run_verb("publish", PublishConfig, publish, overrides=overrides)


if __name__ == "__main__":
    main()
