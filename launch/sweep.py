"""``c2g sweep``: expand a study's grid and run it on this machine or on a Slurm cluster; the same command resumes it."""

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
from hpc_c2g.studies.slurm_executor import SlurmExecutor, sort_tasks, split_batches, submission_script, watch
from hpc_c2g.studies.study import FILE, StudyFile, join_study, read_study, save_study
from hpc_c2g.studies.submissions import Submission
from hpc_c2g.studies.task_status import ACTIVE, TaskStatus
from hpc_c2g.studies.tasks import Task
from launch._compose.arguments import as_overrides, split_grid
from launch._compose.cli import run_verb, user_errors
from launch._compose.cluster import DEBUG, Where, profile_of
from launch._compose.grid import expand, grid_of, plan
from launch.status import counts_table, summary_line

REFRESH_SECONDS = 10.0


@dataclass
class SweepConfig:
    """A study to run, and the place. All other words of the command line are the grid.

    Attributes:
        study: Definition of the study.
        study_dir: Folder of the study; an existing study is resumed.
        cluster: ``local``, ``debug``, or a Slurm profile.
        parallel: Number of tasks at once; default: one process per core of this machine, or the profile's throttle.
        retries: Number of times that a task that fails by its own fault is tried again.
        only: ``failed`` leaves out tasks that did not fail.
        extend: Add the grid's runs to the study in ``study_dir``.
        dry_run: Print the tasks and sbatch's script, and run nothing.
        watch: Stay and submit again what the cluster loses, until all tasks are done.
        yes: Allow more points than ``limit``.
        limit: Number of points that a grid may have without ``yes``.
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
    """Plan the study's tasks, check and save them, and run them; ``grid`` is the command line's and replaces the study's own."""
    limit = None if config.yes else config.limit
    folder = Path(os.path.abspath(config.study_dir))
    before = read_study(folder).grids[-1] if config.extend and (folder / FILE).exists() else []
    grid = grid_of(config.study, grid, before)
    # errors in the grid are raised before it is compared with the study in the folder
    plan(config.study, expand(grid, limit))
    profile = _profile(config)
    if profile is not None:
        check_folder(folder)
    wanted = StudyFile(
        config.study, [grid], config.cluster.name, config.cluster.profile, config.parallel, config.retries
    )
    study = join_study(folder, wanted, config.extend)
    points = {tuple(p.items()): p for g in study.grids for p in expand(g)}  # each once, even if two grids have it
    tasks = plan(config.study, list(points.values()))
    if config.dry_run:
        _show(config, folder, list(tasks.values()), profile)
        return
    with launching(folder):
        save_study(folder, study, tasks)
        launcher = Launcher(folder, study.retries)
        if config.only == "failed":
            launcher.reset_failures(launcher.statuses(None))
        run_study(launcher, study, profile, config.only, config.watch)


def run_study(
    launcher: Launcher, study: StudyFile, profile: SlurmProfile | None, only: str = "", stay: bool = False
) -> None:
    """Run the study's tasks on its cluster, and print the outcome."""
    console = Console(stderr=True)
    folder = launcher.study
    if profile is None:
        with Live(console=console, refresh_per_second=2, transient=True) as live:

            def log_fn(statuses: Sequence[TaskStatus]) -> None:
                live.update(counts_table(folder, statuses))

            if study.cluster == DEBUG:
                statuses = run_inline(launcher, only, log_fn)
            else:
                statuses = run_local(launcher, study.parallel or len(os.sched_getaffinity(0)), only, log_fn)
        _finish(folder, study.study.name, statuses)
        return
    executor = SlurmExecutor(launcher, profile, study.study.name)
    executor.recover()
    stages = study.study.stages
    if stay:
        with Live(console=console, refresh_per_second=2, transient=True) as live:
            for statuses in watch(executor, stages, only, REFRESH_SECONDS):
                live.update(counts_table(folder, statuses))
        _finish(folder, study.study.name, statuses)
        return
    statuses = executor.statuses()
    missing = launcher.runnable(statuses, only)
    jobs = executor.submit(missing, statuses, stages) if missing else []
    job_list = f" ({', '.join(jobs)})" if jobs else ""
    done, active = sum(s.state == "done" for s in statuses), sum(s.state in ACTIVE for s in statuses)
    print(
        f"study: {folder}: {len(missing)} tasks submitted as {len(jobs)} jobs{job_list}, {active} already active, {done} done"
    )
    print(f"next: c2g status {config_path(folder)}; when all is done: c2g collect {config_path(folder)}")


def config_path(folder: Path) -> str:
    """Return a folder as one would type it in the working directory."""
    return os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)


def _finish(folder: Path, name: str, statuses: Sequence[TaskStatus]) -> None:
    """Write the tables of results and print the outcome; exit with 1 unless all tasks are done."""
    print(f"study: {folder}: {summary_line(statuses)}")
    print(f"written: {config_path(folder)}/{', '.join(write_tables(folder, name, results(folder, statuses)))}")
    bad = [s for s in statuses if s.state != "done"]
    for status in bad[:10]:
        task = status.task
        print(f"  {task.stage} {task.id} ({task.label}): {status.state}: {status.reason}", file=sys.stderr)
    if bad:
        print(f"next: c2g status {config_path(folder)}; c2g logs RUN; c2g retry {config_path(folder)}", file=sys.stderr)
        sys.exit(1)


def _profile(config: SweepConfig) -> SlurmProfile | None:
    return profile_of(config.cluster, **({} if config.parallel is None else {"throttle": config.parallel}))


def _show(config: SweepConfig, folder: Path, tasks: list[Task], profile: SlurmProfile | None) -> None:
    """Print the tasks, and the scripts that sbatch would receive."""
    for task in tasks:
        upstream = f" after {', '.join(task.upstream)}" if task.upstream else ""
        print(f"{task.stage:<10} {task.id}  {task.label}{upstream}")
    print(f"{len(tasks)} tasks in {folder}")
    if profile is None:
        return
    for batch in split_batches(sort_tasks(tasks, config.study.stages), profile.max_array):
        first = batch.tasks[0]
        submission = Submission.of(config.study.name, batch.tasks, [0] * len(batch.tasks), token="TOKEN")
        needed = NEEDS[first.stage]
        after = f", after all of {needed} have ended" if needed else ""
        print(f"\n# {first.stage}: {len(batch.tasks)} elements{after}")
        print(submission_script(profile, folder, submission, batch.shape, []))


def main() -> None:
    """Run the verb."""
    with user_errors("sweep"):
        own, grid = split_grid(as_overrides(sys.argv[1:], SweepConfig), SweepConfig)
    run_verb("sweep", SweepConfig, functools.partial(sweep, grid=grid), {"study": {"study": StudyConfig}}, own)


if __name__ == "__main__":
    main()
