"""Epilog of a job, in its shell, which outlives the attempt: complete the report, and requeue the job if it is to be tried again.

``python -m hpc_c2g.studies.epilog STUDY TOKEN INDEX JOB RESTART CODE``. An attempt that was killed (by a signal, out of memory, by a
crash) cannot write how it ended; the epilog does. It imports no torch and starts in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import time
from pathlib import Path

from hpc_c2g.errors import UserError
from hpc_c2g.lease import EXIT_LEASE_LOST
from hpc_c2g.scheduling.queue import Queue
from hpc_c2g.studies.reports import Report, read_report, write_report
from hpc_c2g.studies.submissions import read_submission
from hpc_c2g.studies.tasks import Task, TaskInfo, read_spec
from hpc_c2g.training.preemption import EXIT_PREEMPTED

SIGNALS = {9: "SIGKILL, out of memory perhaps", 6: "SIGABRT", 7: "SIGBUS", 11: "SIGSEGV"}
STOPPED = (EXIT_PREEMPTED, EXIT_LEASE_LOST, 128 + 10, 128 + 12, 128 + 15)
"""Exit codes of an attempt that a signal stopped, with or without its handler, or whose lease another took over."""
NO_CAUSE = re.compile(r"srun:|slurmstepd:|[\d-]{10} [\d:,]{12} (DEBUG|INFO) ")
"""Beginnings of lines of an error log that are no cause of a failure."""
REQUEUED = 255
"""Exit code after submitit's own handler has requeued the job."""


def finalize_attempt(
    study: Path, task: Task | TaskInfo, job: str, restart: int, code: int, max_failures: int, log: Path | None = None
) -> bool:
    """Complete the report of an attempt that did not do so itself; return True if the task is to be tried again.

    Args:
        study: Folder of the study.
        task: Task that was attempted.
        job: Id of the job that made the attempt.
        restart: Number of times that Slurm had restarted it.
        code: Exit code of its processes.
        max_failures: Number of failures after which the task is still tried again.
        log: Log of errors, whose last line is the cause if no other is known.
    """
    report = read_report(study, task) or Report(task.id)
    if (report.job, report.restart) != (job, restart):
        if report.state == "done" or (
            report.attempts and report.state == "running"
        ):  # another job's, which reports itself
            return False
        report.next_attempt(job, "", restart)  # it ended before it could report its start
    if report.state == "running":
        if code in (*STOPPED, REQUEUED):
            report.end("interrupted", "stopped by a signal")
        else:
            report.end("failed", _why(code, log))
        write_report(study, task, report)
    if report.state == "interrupted":
        return code != REQUEUED
    return report.state == "failed" and report.failures <= max_failures


def _why(code: int, log: Path | None) -> str:
    number = code - 128 if code > 128 else -code
    if number > 0:
        return f"killed by signal {number} ({SIGNALS.get(number, 'see its log')})"
    last = _last_line(log) if log else ""
    return f"ended with code {code}{f': {last}' if last else ''}"


def _last_line(log: Path) -> str:
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        return next((line for line in reversed(lines) if not NO_CAUSE.match(line)), "")
    return ""


def cancel_mark(study: Path, task: Task | TaskInfo) -> Path:
    """Return the file that exists while a person does not want the task to run: `c2g cancel` makes it, the launcher removes it."""
    return study / task.folder / f"{task.stage}.cancelled"


def epilog(study: Path, token: str, index: int, job: str, restart: int, code: int) -> int:
    """Complete the report and requeue the job if that is due; return the exit code for the job's shell."""
    submission = read_submission(study, token)
    element = submission.elements[index]
    task = read_spec(study / element.spec)
    if task.id != element.id:  # the folder describes another task by now
        return code
    report = read_report(study, task)
    if report is not None and report.state == "done":
        return code
    queue = Queue()
    entry = queue.query().get(job)
    # a job that Slurm is ending (scancel, time limit, preemption) did not fail, and is Slurm's to requeue or not
    ours = entry is not None and entry.state == "RUNNING"
    log = submission.folder(study) / f"{job}_0_log.err"
    again = finalize_attempt(study, task, job, restart, code if ours else EXIT_PREEMPTED, element.max_failures, log)
    if not (ours and again) or cancel_mark(study, task).exists():
        return code
    print(f"c2g: job {job} is requeued (code {code})", file=sys.stderr, flush=True)
    queue.requeue(job)
    time.sleep(60)  # Slurm ends this shell
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm sends it to the shell of a job that it requeues
    study_folder, token, index, job, restart, code = sys.argv[1:7]
    try:
        sys.exit(epilog(Path(study_folder), token, int(index), job, int(restart), int(code)))
    except UserError as error:
        print(f"c2g: error: {error}", file=sys.stderr)
        sys.exit(int(code) or 1)
