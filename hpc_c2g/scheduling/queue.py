"""Slurm's queue and accounting, by its own commands. No answer is an error, never an empty queue."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from hpc_c2g.errors import UserError
from hpc_c2g.scheduling.programs import TIMEOUT_S, run

JOB_ID = r"\d+(?:_\d+)?"
JOB_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
_COLUMNS = ["ArrayJobID", "ArrayTaskID", "State", "Reason", "NodeList", "StartTime", "RestartCnt", "Name"]
_ENTRY = re.compile(r"(\d+)\|(\d+|N/A)\|(\w+)\|([^|\n]*)\|([^|\n]*)\|([^|\n]*)\|(\d+)\|(.*)\|", re.ASCII | re.DOTALL)
_IDS_PER_COMMAND = 500
_PERMANENT = r"Invalid job id|denied|presently disabled|already finished|Not supported|invalid user|no longer"
"""Refusals that another try does not change."""


class NoAnswerError(UserError):
    """Slurm's controller is down or too busy; another try may succeed."""


@dataclass(frozen=True)
class Entry:
    """A job, or one element of an array, that Slurm still has.

    Attributes:
        id: Id such as ``123`` or ``123_4``; an array has one entry per element, even while all of them wait.
        state: State such as PENDING, RUNNING, COMPLETING.
        reason: Reason why it waits, "None" if there is none.
        nodes: Hosts that it runs on, such as ``gpu[01-04]``; empty while it waits.
        start: Start or expected start in seconds since the epoch; None if Slurm does not know.
        restarts: Number of times that it was requeued.
        name: Name of the job.
    """

    id: str
    state: str
    reason: str
    nodes: str
    start: float | None
    restarts: int
    name: str


class Queue:
    """The user's jobs in Slurm.

    Args:
        timeout: Seconds after which a command counts as not answered.
        pause: Seconds between two tries.
    """

    def __init__(self, timeout: float = TIMEOUT_S, pause: float = 5.0) -> None:
        self.timeout, self.pause = timeout, pause

    def query(self) -> dict[str, Entry]:
        """Return the user's jobs that wait, run or are ending, by id, from one call of squeue.

        Raises:
            UserError: Slurm does not answer. (If it does, a job that is missing is not in the queue.)
        """
        columns = ",".join(f"{name}:|" for name in _COLUMNS)  # each as long as it is, with a bar behind it
        text = self._run(["squeue", "--me", "-h", "-r", "-O", columns])
        entries = {}
        # a name may have several lines
        for record in re.split(r"\n(?=\d+\|)", text.rstrip("\n")) if text.strip() else []:
            parts = re.fullmatch(_ENTRY, record)
            if not parts:
                raise UserError(
                    f"squeue answered {record!r}, which cannot be read", "this Slurm is too old, or too new"
                )
            job, element, state, reason, nodes, start, restarts, name = parts.groups()
            id = job if element == "N/A" else f"{job}_{element}"
            entries[id] = Entry(id, state, reason, nodes, _seconds(start), int(restarts), name)
        return entries

    def find(self, job_name: str, days: int = 30) -> list[str]:
        """Return the ids of the user's jobs and arrays of exactly this name, including ended ones that Slurm remembers.

        Args:
            job_name: Name of the job as it was submitted.
            days: Number of days that accounting, if there is any, is searched back.

        Raises:
            UserError: Slurm does not answer. (Accounting that does not answer is no error: not every cluster has it.)
        """
        check_name(job_name)
        found = self._run(["squeue", "--me", "-h", "--states=all", f"--name={job_name}", "-o", "%F|%j"]).splitlines()
        command = ["sacct", "-n", "-X", "-P", f"--user={os.getuid()}", f"--name={job_name}"]
        found += self._account([*command, f"--starttime=now-{days}days", "-o", "JobID,JobName"])
        ids = {line.partition("|")[0].partition("_")[0] for line in found if line.partition("|")[2] == job_name}
        return sorted((job for job in ids if re.fullmatch(JOB_ID, job, re.ASCII)), key=int)

    def cancel(self, ids: Sequence[str]) -> None:
        """Cancel jobs, elements or whole arrays; jobs that have ended are left alone.

        Raises:
            UserError: Slurm does not answer, or refuses.
        """
        check_ids(ids)
        for begin in range(0, len(ids), _IDS_PER_COMMAND):
            self._run(["scancel", "--quiet", *ids[begin : begin + _IDS_PER_COMMAND]])

    def requeue(self, id: str, attempts: int = 12) -> None:
        """Requeue a job; wait for a controller that restarts.

        A job may requeue itself as its last command: all of its processes get SIGTERM at once. A job that has ended runs
        again too, as long as Slurm remembers it.

        Raises:
            UserError: Slurm refuses, or did not answer ``attempts`` times.
        """
        check_ids([id])
        for attempt in range(1, attempts + 1):
            try:
                self._run(["scontrol", "requeue", id])
            except NoAnswerError as error:
                if "Job is pending" in error.problem:  # an earlier try got through, its answer did not
                    return
                if attempt == attempts:
                    raise
                time.sleep(self.pause)
            else:
                return

    def outcome(self, ids: Sequence[str]) -> dict[str, tuple[str, int]]:
        """Return state and exit code (128 + number for a signal) of each job's last attempt from accounting; {} without accounting."""
        check_ids(ids)
        outcomes = {}
        for begin in range(0, len(ids), _IDS_PER_COMMAND):
            some = ids[begin : begin + _IDS_PER_COMMAND]
            for line in self._account(["sacct", "-n", "-X", "-P", "-j", ",".join(some), "-o", "JobID,State,ExitCode"]):
                parts = re.fullmatch(r"([^|]*)\|(\w+)[^|]*\|(\d+):(\d+)", line, re.ASCII)
                for job in _elements(parts[1]) if parts else []:
                    if parts and {job, job.partition("_")[0]} & set(some):
                        code, number = int(parts[3]), int(parts[4])
                        outcomes[job] = (parts[2], 128 + number if number else code)
        return outcomes

    def _account(self, command: list[str]) -> list[str]:
        try:
            return self._run(command).splitlines()
        except UserError:
            return []

    def _run(self, command: list[str]) -> str:
        try:
            # no "..." in a list of elements
            done = run(command, self.timeout, SLURM_BITSTR_LEN="0")
        except subprocess.TimeoutExpired as error:
            raise _no_answer(f"{command[0]} took more than {self.timeout:g} s") from error
        except OSError as error:
            hint = "run this where Slurm is installed"
            raise UserError(f"Slurm does not answer: {command[0]}: {error.strerror}", hint) from error
        if done.returncode == 0:
            return done.stdout
        problem = " ".join(done.stderr.split()) or f"{command[0]} ended with {done.returncode}"
        if re.search(_PERMANENT, problem):
            raise UserError(f"Slurm refuses: {problem}", f"see {command[0]}'s manual")
        raise _no_answer(problem)


def check_ids(ids: Sequence[str]) -> None:
    """Raise a UserError unless each id is of the form ``123`` or ``123_4``."""
    for job in ids:
        if not re.fullmatch(JOB_ID, job, re.ASCII):
            raise UserError(f"{job!r} is no id of a Slurm job", "give ids such as 123 or 123_4")


def check_name(job_name: str) -> None:
    """Raise a UserError unless the name has one meaning for sbatch, squeue and the shell."""
    if not re.fullmatch(JOB_NAME, job_name):
        raise UserError(f"job name {job_name!r} is not possible", "use letters, digits and . _ + -")


def _no_answer(problem: str) -> NoAnswerError:
    return NoAnswerError(f"Slurm does not answer: {problem}", "try again later; nothing was lost")


def _elements(job: str) -> list[str]:
    """Return the ids in one line of accounting, such as ``7_[1-3,9%2]`` for elements that never started."""
    parts = re.fullmatch(r"(\d+)_\[([\d,:-]+)(?:%\d+)?\]", job, re.ASCII)
    if not parts:
        return [job]
    found = []
    for first, last, step in re.findall(r"(\d+)(?:-(\d+))?(?::(\d+))?", parts[2]):
        found += [f"{parts[1]}_{i}" for i in range(int(first), int(last or first) + 1, int(step or 1))]
    return found


def _seconds(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:  # N/A
        return None
