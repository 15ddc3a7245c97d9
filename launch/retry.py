"""``c2g retry DIR [RUN ...]``: run failed tasks again, and those that depend on them, as the study's last sweep ran them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from hpc_c2g.errors import UserError
from hpc_c2g.studies.launcher import Launcher, launching
from hpc_c2g.studies.select_tasks import select_tasks
from hpc_c2g.studies.study import check_results_versions, read_study
from launch._compose.arguments import as_overrides
from launch._compose.cli import run_verb, user_errors
from launch._compose.cluster import Where, profile_of
from launch.sweep import run_study


@dataclass
class RetryConfig:
    """Tasks to run again.

    Attributes:
        study_dir: Folder of the study.
        run: Ids, beginnings of ids, or folders; default: all tasks that failed.
        watch: Stay until all tasks are done, as with `c2g sweep`.
    """

    study_dir: str = "???"
    run: list[str] = field(default_factory=list)
    watch: bool = False


def retry(config: RetryConfig) -> None:
    """Allow more failures to the tasks that were given up, and run all failed ones."""
    folder = Path(config.study_dir).absolute()
    study = read_study(folder)
    check_results_versions(folder, study)
    throttle = {} if study.parallel is None else {"throttle": study.parallel}
    profile = profile_of(Where(study.cluster, study.profile), **throttle)
    with launching(folder):
        launcher = Launcher(folder, study.retries)
        selected = select_tasks(launcher.statuses(None), config.run)
        failed = [s for s in selected if s.state == "failed"]
        if not failed:
            raise UserError(
                "none of these tasks has failed", "see `c2g status`; the same `c2g sweep` runs what is left"
            )
        launcher.reset_failures(failed)
        run_study(launcher, study, profile, "failed", config.watch)


def main() -> None:
    """Run the verb."""
    with user_errors("retry"):
        overrides = as_overrides(sys.argv[1:], RetryConfig, ["study_dir", "run"])
    run_verb("retry", RetryConfig, retry, overrides=overrides)


if __name__ == "__main__":
    main()
