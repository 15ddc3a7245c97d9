"""After an attempt has ended, in the job's own shell, which outlives it: what became of it, and is it to be made again?

``python -m hpc_c2g.studies.epilog STUDY TOKEN INDEX JOB RESTART CODE``. An attempt that was cut off (killed, out of
memory, crashed) cannot tell; this does it in its place. It needs no science and starts in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from pathlib import Path

from hpc_c2g.errors import UserError
from hpc_c2g.lease import EXIT_LEASE_LOST
from hpc_c2g.scheduling.queue import Queue
from hpc_c2g.studies.reports import Report, read_report, write_report
from hpc_c2g.studies.submissions import read_submission
from hpc_c2g.studies.tasks import Placed, Task, read_spec
from hpc_c2g.training.preemption import EXIT_PREEMPTED

SIGNALS = {9: "SIGKILL, out of memory perhaps", 6: "SIGABRT", 7: "SIGBUS", 11: "SIGSEGV"}
STOPPED = (EXIT_PREEMPTED, EXIT_LEASE_LOST, 128 + 10, 128 + 12, 128 + 15)
"""Codes of an attempt that a signal asked to stop, also before it listened to it, or that another has taken over."""
REQUEUED = 255
"""submitit's own handler was faster: the job is in the queue again."""


def finalize_attempt(
    study: Path, task: Task, job: str, restart: int, code: int, failures: int, log: Path | None = None
) -> bool:
    """Write how an attempt ended that has not done so itself; returns whether it is to be made again.

    Args:
        study: its folder.
        task: that was attempted.
        job: that made the attempt.
        restart: how often Slurm had restarted it.
        code: exit code of its processes.
        failures: that the task may have had before it is given up.
        log: of errors, whose last line is the cause where there is no other.
    """
    report = read_report(study, task) or Report(task.id)
    if (report.job, report.restart) != (job, restart):
        if report.state == "done" or (report.attempts and report.state == "running"):  # another's, who tells of it
            return False
        report.next_attempt(job, "", restart)  # it ended before it could tell that it had begun
    if report.state == "running":
        if code in (*STOPPED, REQUEUED):
            report.end("interrupted", "stopped by a signal")
        else:
            report.end("failed", _why(code, log))
        write_report(study, task, report)
    if report.state == "interrupted":
        return code != REQUEUED
    return report.state == "failed" and report.failures <= failures


def _why(code: int, log: Path | None) -> str:
    number = code - 128 if code > 128 else -code
    if number > 0:
        return f"killed by signal {number} ({SIGNALS.get(number, 'look at its log')})"
    last = _last_line(log) if log else ""
    return f"ended with code {code}{f': {last}' if last else ''}"


def _last_line(log: Path) -> str:
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        return next((line for line in reversed(lines) if not line.startswith(("srun:", "slurmstepd:"))), "")
    return ""


def cancel_mark(study: Path, task: Placed) -> Path:
    """Stands while a person does not want the task to go on."""
    return study / task.folder / f"{task.stage}.cancelled"


def epilog(study: Path, token: str, index: int, job: str, restart: int, code: int) -> int:
    """Settle, and put the job into the queue again where that is due; returns the exit code for the job's shell."""
    submission = read_submission(study, token)
    element = submission.elements[index]
    task = read_spec(study / element.spec)
    if task.id != element.id:  # the folder has got another task meanwhile
        return code
    report = read_report(study, task)
    if report is not None and report.state == "done":
        return code
    queue = Queue()
    entry = queue.ask().get(job)
    # a job that Slurm is ending (scancel, time limit, preemption) did not fail, and is Slurm's to requeue or not
    ours = entry is not None and entry.state == "RUNNING"
    log = submission.folder(study) / f"{job}_0_log.err"
    again = finalize_attempt(study, task, job, restart, code if ours else EXIT_PREEMPTED, element.failures, log)
    if not (ours and again) or cancel_mark(study, task).exists():
        return code
    print(f"c2g: job {job} goes back into the queue (code {code})", file=sys.stderr, flush=True)
    queue.requeue(job)
    time.sleep(60)  # Slurm ends this shell
    return code


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # Slurm sends it to the shell of a job that it puts back into the queue
    study_folder, token, index, job, restart, code = sys.argv[1:7]
    try:
        sys.exit(epilog(Path(study_folder), token, int(index), job, int(restart), int(code)))
    except UserError as error:
        print(f"c2g: error: {error}", file=sys.stderr)
        sys.exit(int(code) or 1)
