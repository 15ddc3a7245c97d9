"""``cluster=local`` and ``cluster=debug``: a study's tasks as processes of this machine, or within this process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import hpc_c2g
from hpc_c2g.errors import UserError
from hpc_c2g.lease import live_holder
from hpc_c2g.scheduling.queue import Entry
from hpc_c2g.studies.attempt import attempt
from hpc_c2g.studies.epilog import finalize_attempt
from hpc_c2g.studies.launcher import Launcher
from hpc_c2g.studies.tasks import Task, spec_name
from hpc_c2g.studies.view import ACTIVE, View
from hpc_c2g.training.preemption import EXIT_PREEMPTED, Preempted, PreemptionFlag

LOGS = "submissions/local"
POLL_SECONDS, LOOK_SECONDS = 0.1, 3.0
STOP_SECONDS = 60.0
LogFn = Callable[[Sequence[View]], None]


@dataclass
class Pool:
    """Attempts that run as processes of this machine.

    Attributes:
        study: the study's folder.
        slots: processes at once; a task with several ranks takes as many, and one that needs more than there are runs alone.
        running: by task id.
    """

    study: Path
    slots: int
    running: dict[str, tuple[Task, str, subprocess.Popen[bytes]]] = field(default_factory=dict)

    def room(self, task: Task) -> bool:
        """Whether the task may start now."""
        used = sum(t.ranks for t, _, _ in self.running.values())
        return not self.running or used + task.ranks <= self.slots

    def queue(self) -> dict[str, Entry]:
        """What runs, as a scheduler would tell it."""
        return {job: _entry(job, task) for task, job, _ in self.running.values()}

    def start(self, task: Task) -> str:
        """Start an attempt; returns its job.

        Raises:
            UserError: no process can be started, or no log written.
        """
        job = f"local-{uuid.uuid4().hex[:8]}"
        command = ["-m", "hpc_c2g.studies.attempt", str(self.study), spec_name(task), job]
        if task.ranks > 1:
            command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(task.ranks), *command]
        root = str(Path(hpc_c2g.__file__).parent.parent)  # a checkout that is not installed works too
        threads = max(1, len(os.sched_getaffinity(0)) // max(1, self.slots))
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        logs = self.study / LOGS
        try:
            logs.mkdir(parents=True, exist_ok=True)
            with open(logs / f"{job}.out", "wb") as out, open(logs / f"{job}.err", "wb") as err:
                # in a session of its own: Ctrl-C is for the launcher, which passes it on
                process = subprocess.Popen(
                    [sys.executable, *command], stdout=out, stderr=err, env=environment, start_new_session=True
                )
        except OSError as error:
            raise UserError(
                f"{task.stage} {task.id} cannot be started: {error}", "free memory or disk space"
            ) from error
        self.running[task.id] = (task, job, process)
        return job

    def ended(self) -> list[tuple[Task, str, int]]:
        """(task, job, exit code) of attempts that have ended since the last call."""
        over = [(task, job, code) for task, job, p in self.running.values() if (code := p.poll()) is not None]
        for task, _, _ in over:
            del self.running[task.id]
        return over

    def stop(self) -> None:
        """Ask all attempts to save and end, and wait; those that do not are killed after ``STOP_SECONDS``."""
        for _, _, process in self.running.values():
            process.terminate()
        end = time.monotonic() + STOP_SECONDS
        for _, _, process in self.running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.monotonic()))
            process.kill()
            process.wait()


def _entry(job: str, task: Task) -> Entry:
    return Entry(job, job, "RUNNING", reason="", nodes="", start=None, restarts=0, name=task.stage)


def run_local(launcher: Launcher, slots: int, only: str, log_fn: LogFn) -> list[View]:
    """Run all tasks that are wanted, at most ``slots`` processes at once, until none is left that can run.

    Raises:
        Preempted: a signal asked to stop; attempts have saved, and the same command goes on.
    """
    pool = Pool(launcher.study, slots)
    try:
        with PreemptionFlag() as asked:
            return _fill(launcher, pool, only, log_fn, asked)
    finally:
        pool.stop()
        _settle(launcher, pool)


def _fill(launcher: Launcher, pool: Pool, only: str, log_fn: LogFn, asked: PreemptionFlag) -> list[View]:
    """Start what is ready wherever there is room, look again when an attempt has ended or some time has passed."""
    wanted = launcher.wanted(launcher.look(pool.queue()), only)
    launcher.clear_marks(wanted)
    allowed = {v.row.id for v in wanted}
    while True:
        views = launcher.look(pool.queue())
        by_id = {v.row.id: v for v in views}
        for view in launcher.wanted(views):
            task = launcher.tasks[view.row.id]
            mine = task.id in allowed and task.id not in pool.running and view.state != "cancelled"
            if mine and launcher.ready(view, by_id) and pool.room(task):
                launcher.ledger.assign(task.id, pool.start(task))
        log_fn(views)
        # an earlier launcher's attempts, which outlived it, are waited for
        if not pool.running and not any(v.state in ACTIVE for v in views):
            return views
        end = time.monotonic() + LOOK_SECONDS
        while not _settle(launcher, pool) and time.monotonic() < end:
            if asked.signal_name:
                raise Preempted(asked.signal_name, 0)
            time.sleep(POLL_SECONDS)


def _settle(launcher: Launcher, pool: Pool) -> int:
    """Tell of attempts that ended without a word; returns how many have ended."""
    ended = pool.ended()
    rows = {row.id: row for row in launcher.ledger.rows()} if ended else {}
    for task, job, code in ended:
        finalize_attempt(
            launcher.study, task, job, 0, code, rows[task.id].allowed, launcher.study / LOGS / f"{job}.err"
        )
    return len(ended)


def run_inline(launcher: Launcher, only: str, log_fn: LogFn) -> list[View]:
    """``cluster=debug``: one task after the other in this very process, so that a debugger and a traceback reach it.

    Raises:
        UserError: a task has several ranks.
        Preempted: a signal asked to stop.
    """
    several = next((t for t in launcher.tasks.values() if t.ranks > 1), None)
    if several:
        raise UserError(
            f"cluster=debug runs in one process, but {several.stage} {several.id} has {several.ranks} ranks",
            "use cluster=local, or nodes=1 tasks_per_node=1",
        )
    tried: set[str] = set()
    while True:
        views = launcher.look({})
        by_id = {v.row.id: v for v in views}
        view = next(
            (v for v in launcher.wanted(views, only) if v.row.id not in tried and launcher.ready(v, by_id)), None
        )
        if view is None:
            return views
        task, job = launcher.tasks[view.row.id], f"debug-{uuid.uuid4().hex[:8]}"
        tried.add(task.id)
        launcher.clear_marks([view])
        launcher.ledger.assign(task.id, job)
        log_fn(launcher.look({job: _entry(job, task)}))
        code = attempt(launcher.study, spec_name(task), job)
        if finalize_attempt(launcher.study, task, job, 0, code, view.row.allowed):
            if code == EXIT_PREEMPTED:
                raise Preempted("a signal", 0)
            tried.discard(task.id)


def stop_local(study: Path, views: Sequence[View]) -> int:
    """Ask attempts that run on this machine to save and end; returns how many."""
    count = 0
    for view in views:
        holder = live_holder(study / view.row.folder)
        if holder and holder.is_here and (holder.job or "").startswith("local-"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(holder.pid, signal.SIGTERM)
                count += 1
    return count
