"""``c2g sweep``: expand a study's grid and have its runs made, here or on a Slurm cluster; the same command again goes on."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live

from hpc_c2g.errors import UserError
from hpc_c2g.reporting.results import results
from hpc_c2g.reporting.tables import write_tables
from hpc_c2g.scheduling.batch_script import check_folder
from hpc_c2g.scheduling.profile import SlurmProfile
from hpc_c2g.studies.config import NEEDS, StudyConfig
from hpc_c2g.studies.launcher import Launcher, launching
from hpc_c2g.studies.local_executor import run_inline, run_local
from hpc_c2g.studies.slurm_executor import SlurmExecutor, batches, in_order, script, watch
from hpc_c2g.studies.study import FILE, StudyFile, joined, read_study, save_study
from hpc_c2g.studies.submissions import Submission
from hpc_c2g.studies.tasks import Task
from hpc_c2g.studies.view import ACTIVE, View
from launch._compose.arguments import as_overrides, split_grid
from launch._compose.cli import run_verb, user_errors
from launch._compose.cluster import DEBUG, Where, profile_of
from launch._compose.grid import expand, grid_of, plan
from launch.status import counts_table, told

LOOK_SECONDS = 10.0


@dataclass
class SweepConfig:
    """What to run, and where. Whatever else stands on the command line is the grid.

    Attributes:
        study: the study.
        study_dir: its folder; the same folder goes on.
        cluster: where.
        parallel: tasks at once: processes of ``local`` (one per core by default), elements of an array (the profile's throttle).
        retries: how often a task that fails for a reason of its own is tried again.
        only: ``failed`` leaves alone what did not fail.
        extend: add the grid's runs to the study in ``study_dir``.
        dry_run: print the tasks and sbatch's text, and do nothing.
        watch: stay, and hand out again what the cluster loses, until all is done.
        yes: allow more points than ``limit``.
        limit: points of the grid that nobody is asked about.
        accept_code: go on although the science's code has changed.
    """

    study: StudyConfig = field(default_factory=StudyConfig)
    study_dir: str = "???"
    cluster: Where = field(default_factory=Where)
    parallel: int | None = None
    retries: int = 2
    only: str = ""
    extend: bool = False
    dry_run: bool = False
    watch: bool = False
    yes: bool = False
    limit: int = 500
    accept_code: bool = False

    def __post_init__(self) -> None:
        if self.only not in ("", "failed"):
            raise UserError(f"only={self.only} is unknown", "write --only failed, or leave it out")
        if self.parallel is not None and self.parallel < 1:
            raise UserError(f"parallel={self.parallel} is too small", "give parallel >= 1")
        if self.retries < 0:
            raise UserError(f"retries={self.retries} is negative", "give retries >= 0")
        if not self.study_dir.isprintable():
            raise UserError(f"study_dir={self.study_dir!r} has a control character", "choose another name")


def sweep(config: SweepConfig, grid: Sequence[str] = ()) -> None:
    """Expand, check, write down, hand out, tell; ``grid`` is what the command line puts in the place of the study's own."""
    limit = None if config.yes else config.limit
    folder = Path(os.path.abspath(config.study_dir))
    before = read_study(folder).grids[-1] if config.extend and (folder / FILE).exists() else []
    grid = grid_of(config.study, grid, before)
    # mistakes in the grid are told before it is compared with what is there
    plan(config.study, expand(grid, limit), dict.fromkeys(config.study.stages, ""))
    profile = _profile(config)
    if profile is not None:
        check_folder(folder)
    wanted = StudyFile(
        config.study, [grid], config.cluster.name, config.cluster.profile, config.parallel, config.retries
    )
    study = joined(folder, wanted, config.extend, config.accept_code)
    points = {tuple(p.items()): p for g in study.grids for p in expand(g)}  # each once, though two grids have it
    tasks = plan(config.study, list(points.values()), study.code)
    if config.dry_run:
        _show(config, folder, list(tasks.values()), profile)
        return
    with launching(folder):
        ledger = save_study(folder, study, tasks)
        hand_out(Launcher(folder, ledger, tasks), study, profile, config.only, config.watch)


def hand_out(
    launcher: Launcher, study: StudyFile, profile: SlurmProfile | None, only: str = "", stay: bool = False
) -> None:
    """Have the study's tasks done as its settings say; tells what was done."""
    console = Console(stderr=True)
    folder = launcher.study
    if only == "failed":
        launcher.forgive(launcher.look(None), study.retries)
    if profile is None:
        with Live(console=console, refresh_per_second=2, transient=True) as live:

            def log_fn(views: Sequence[View]) -> None:
                live.update(counts_table(folder, views))

            if study.cluster == DEBUG:
                views = run_inline(launcher, only, log_fn)
            else:
                views = run_local(launcher, study.parallel or len(os.sched_getaffinity(0)), only, log_fn)
        _end(folder, study.study.name, views)
        return
    arrays = SlurmExecutor(launcher, profile, study.cluster, study.study.name)
    arrays.recover()
    stages = study.study.stages
    if stay:
        with Live(console=console, refresh_per_second=2, transient=True) as live:
            for views in watch(arrays, stages, only, LOOK_SECONDS):
                live.update(counts_table(folder, views))
        _end(folder, study.study.name, views)
        return
    views = arrays.views()
    missing = launcher.wanted(views, only)
    jobs = arrays.submit(missing, views, stages) if missing else []
    told_jobs = f" ({', '.join(jobs)})" if jobs else ""
    done, active = sum(v.state == "done" for v in views), sum(v.state in ACTIVE for v in views)
    print(
        f"study: {folder}: {len(missing)} tasks submitted as {len(jobs)} jobs{told_jobs}, {active} there already, {done} done"
    )
    print(f"next: c2g status {config_path(folder)}; when all is done: c2g collect {config_path(folder)}")


def config_path(folder: Path) -> str:
    """A folder as one would type it from here."""
    return os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)


def _end(folder: Path, name: str, views: Sequence[View]) -> None:
    """Collect the results, and say how it ended; an exit code tells scripts whether all was done."""
    print(f"study: {folder}: {told(views)}")
    print(f"written: {config_path(folder)}/{', '.join(write_tables(folder, name, results(folder, views)))}")
    bad = [v for v in views if v.state != "done"]
    for view in bad[:10]:
        print(f"  {view.row.stage} {view.row.id} ({view.row.label}): {view.state}: {view.reason}", file=sys.stderr)
    if bad:
        print(f"next: c2g status {config_path(folder)}; c2g logs RUN; c2g retry {config_path(folder)}", file=sys.stderr)
        sys.exit(1)


def _profile(config: SweepConfig) -> SlurmProfile | None:
    return profile_of(config.cluster, **({} if config.parallel is None else {"throttle": config.parallel}))


def _show(config: SweepConfig, folder: Path, tasks: list[Task], profile: SlurmProfile | None) -> None:
    """The tasks, and what sbatch would get."""
    for task in tasks:
        below = f" after {', '.join(task.upstream)}" if task.upstream else ""
        print(f"{task.stage:<10} {task.id}  {task.label}{below}")
    print(f"{len(tasks)} tasks in {folder}")
    if profile is None:
        return
    for batch in batches(in_order(tasks, config.study.stages), profile.max_array):
        first = batch.tasks[0]
        submission = Submission.of(config.study.name, batch.tasks, [0] * len(batch.tasks), token="TOKEN")
        needed = NEEDS[first.stage]
        after = f", after all of {needed} have ended" if needed else ""
        print(f"\n# {first.stage}: {len(batch.tasks)} elements{after}")
        print(script(profile, folder, submission, batch.shape, []))


def main() -> None:
    """Entry point."""
    with user_errors("sweep"):
        own, grid = split_grid(as_overrides(sys.argv[1:], SweepConfig), SweepConfig)
    run_verb("sweep", SweepConfig, functools.partial(sweep, grid=grid), {"study": {"study": StudyConfig}}, own)


if __name__ == "__main__":
    main()
