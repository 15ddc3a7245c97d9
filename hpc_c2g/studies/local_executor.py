"""``cluster=local`` and ``cluster=debug``: a study's tasks as processes of this machine, or in this process."""

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
from hpc_c2g.studies.task_status import ACTIVE, TaskStatus
from hpc_c2g.studies.tasks import TaskInfo, spec_name
from hpc_c2g.training.preemption import EXIT_PREEMPTED, Preempted, PreemptionFlag

LOGS = "submissions/local"
POLL_SECONDS, REFRESH_SECONDS = 0.1, 3.0
STOP_SECONDS = 60.0
LogFn = Callable[[Sequence[TaskStatus]], None]
"""Called with every task's status whenever that may have changed."""


@dataclass
class Pool:
    """Attempts that run as processes of this machine.

    Attributes:
        study: Folder of the study.
        slots: Number of processes at once; a task with several ranks takes several, and one that needs more than all runs alone.
        running: TaskInfo, job id and process of each running attempt, by task id.
    """

    study: Path
    slots: int
    running: dict[str, tuple[TaskInfo, str, subprocess.Popen[bytes]]] = field(default_factory=dict)

    def room(self, task: TaskInfo) -> bool:
        """Return True if the task may start now."""
        used = sum(t.ranks for t, _, _ in self.running.values())
        return not self.running or used + task.ranks <= self.slots

    def queue(self) -> dict[str, Entry]:
        """Return the running attempts as entries of a scheduler's queue."""
        return {job: _entry(job, task) for task, job, _ in self.running.values()}

    def start(self, task: TaskInfo) -> str:
        """Start an attempt; return its job id.

        Raises:
            UserError: No process can be started, or no log written.
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

    def ended(self) -> list[tuple[TaskInfo, str, int]]:
        """Return (task, job id, exit code) of attempts that have ended since the last call."""
        over = [(task, job, code) for task, job, p in self.running.values() if (code := p.poll()) is not None]
        for task, _, _ in over:
            del self.running[task.id]
        return over

    def stop(self) -> None:
        """Ask all attempts to save and exit, and wait; those that do not are killed after ``STOP_SECONDS``."""
        for _, _, process in self.running.values():
            process.terminate()
        end = time.monotonic() + STOP_SECONDS
        for _, _, process in self.running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.monotonic()))
            process.kill()
            process.wait()


def _entry(job: str, task: TaskInfo) -> Entry:
    return Entry(job, "RUNNING", reason="", nodes="", start=None, restarts=0, name=task.stage)


def run_local(launcher: Launcher, slots: int, only: str, log_fn: LogFn) -> list[TaskStatus]:
    """Run all runnable tasks, at most ``slots`` processes at once; return every task's last status.

    Raises:
        Preempted: A signal asked to stop; attempts have saved, and the same command resumes them.
    """
    pool = Pool(launcher.study, slots)
    try:
        with PreemptionFlag() as asked:
            return _run_all(launcher, pool, only, log_fn, asked)
    finally:
        pool.stop()
        _finalize_ended(launcher, pool)


def _run_all(launcher: Launcher, pool: Pool, only: str, log_fn: LogFn, asked: PreemptionFlag) -> list[TaskStatus]:
    """Start tasks that are ready wherever there is room, again when an attempt has ended or ``REFRESH_SECONDS`` have passed."""
    runnable = launcher.runnable(launcher.statuses(pool.queue()), only)
    launcher.clear_cancel_marks(runnable)
    wanted = {s.task.id for s in runnable}
    while True:
        statuses = launcher.statuses(pool.queue())
        by_id = {s.task.id: s for s in statuses}
        for status in launcher.runnable(statuses):
            task = status.task
            mine = task.id in wanted and task.id not in pool.running and status.state != "cancelled"
            if mine and launcher.ready(status, by_id) and pool.room(task):
                launcher.journal.start(task.id, pool.start(task))
        log_fn(statuses)
        # attempts of an earlier launcher, which outlived it, are waited for
        if not pool.running and not any(s.state in ACTIVE for s in statuses):
            return statuses
        end = time.monotonic() + REFRESH_SECONDS
        while not _finalize_ended(launcher, pool) and time.monotonic() < end:
            if asked.signal_name:
                raise Preempted(asked.signal_name, 0)
            time.sleep(POLL_SECONDS)


def _finalize_ended(launcher: Launcher, pool: Pool) -> int:
    """Complete the reports of attempts that have ended; return how many have."""
    ended = pool.ended()
    for task, job, code in ended:
        log = launcher.study / LOGS / f"{job}.err"
        finalize_attempt(launcher.study, task, job, 0, code, launcher.max_failures(task), log)
    return len(ended)


def run_inline(launcher: Launcher, only: str, log_fn: LogFn) -> list[TaskStatus]:
    """Run one task after the other in this process (``cluster=debug``), so that a debugger and a traceback reach it.

    Raises:
        UserError: A task has several ranks.
        Preempted: A signal asked to stop.
    """
    several = next((t for t in launcher.journal.ordered_tasks() if t.ranks > 1), None)
    if several:
        raise UserError(
            f"cluster=debug runs in one process, but {several.stage} {several.id} has {several.ranks} ranks",
            "use cluster=local, or nodes=1 tasks_per_node=1",
        )
    tried: set[str] = set()
    while True:
        statuses = launcher.statuses({})
        by_id = {s.task.id: s for s in statuses}
        runnable = launcher.runnable(statuses, only)
        status = next((s for s in runnable if s.task.id not in tried and launcher.ready(s, by_id)), None)
        if status is None:
            return statuses
        task, job = status.task, f"debug-{uuid.uuid4().hex[:8]}"
        tried.add(task.id)
        launcher.clear_cancel_marks([status])
        launcher.journal.start(task.id, job)
        log_fn(launcher.statuses({job: _entry(job, task)}))
        code = attempt(launcher.study, spec_name(task), job)
        if finalize_attempt(launcher.study, task, job, 0, code, status.max_failures):
            if code == EXIT_PREEMPTED:
                raise Preempted("a signal", 0)
            tried.discard(task.id)


def stop_local(study: Path, statuses: Sequence[TaskStatus]) -> int:
    """Ask attempts that run on this machine to save and exit; return how many."""
    count = 0
    for status in statuses:
        holder = live_holder(study / status.task.folder)
        if holder and holder.is_here and (holder.job or "").startswith("local-"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(holder.pid, signal.SIGTERM)
                count += 1
    return count
