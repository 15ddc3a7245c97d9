"""``c2g retry DIR [RUN ...]``: have failed tasks done again, and what builds on them, as the study's last sweep had them done."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from hpc_c2g.errors import UserError
from hpc_c2g.studies.find import chosen
from hpc_c2g.studies.launcher import Launcher, launching
from hpc_c2g.studies.study import read_study, rebuilt
from hpc_c2g.studies.tasks import find_specs
from launch._compose.arguments import as_overrides
from launch._compose.cli import run_verb, user_errors
from launch._compose.cluster import Where, profile_of
from launch.sweep import hand_out


@dataclass
class RetryConfig:
    """What to do again.

    Attributes:
        study_dir: of the study.
        run: ids, beginnings of ids, or folders; none: all that failed.
        watch: stay until all is done, as with `c2g sweep`.
    """

    study_dir: str = "???"
    run: list[str] = field(default_factory=list)
    watch: bool = False


def retry(config: RetryConfig) -> None:
    """Forgive the failures, and hand out."""
    folder = Path(config.study_dir).absolute()
    study = read_study(folder)
    throttle = {} if study.parallel is None else {"throttle": study.parallel}
    profile = profile_of(Where(study.cluster, study.profile), **throttle)
    with launching(folder):
        launcher = Launcher(folder, rebuilt(folder, study.retries), {t.id: t for t in find_specs(folder)})
        views = chosen(launcher.look(None), config.run)
        failed = [v for v in views if v.state == "failed"]
        if not failed:
            raise UserError(
                "none of these tasks has failed", "see `c2g status`; the same `c2g sweep` does what is left"
            )
        launcher.forgive(failed, study.retries)
        hand_out(launcher, study, profile, "failed", config.watch)


def main() -> None:
    """Entry point."""
    with user_errors("retry"):
        overrides = as_overrides(sys.argv[1:], RetryConfig, ["study_dir", "run"])
    run_verb("retry", RetryConfig, retry, overrides=overrides)


if __name__ == "__main__":
    main()
