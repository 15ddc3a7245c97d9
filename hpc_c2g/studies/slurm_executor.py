"""``cluster=PROFILE``: a study's tasks as Slurm arrays, one per stage and shape, each waiting for those that it builds on."""

from __future__ import annotations

import contextlib
import itertools
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpc_c2g.errors import UserError
from hpc_c2g.files import write_atomically
from hpc_c2g.scheduling.batch_script import Shape, check_folder, python_command, sbatch_text, submitit_parameters
from hpc_c2g.scheduling.profile import SlurmProfile
from hpc_c2g.scheduling.queue import NoAnswerError, Queue
from hpc_c2g.studies.attempt import Attempt
from hpc_c2g.studies.epilog import STOPPED, finalize_attempt
from hpc_c2g.studies.launcher import Launcher
from hpc_c2g.studies.submissions import FOLDER, Submission, read_submission
from hpc_c2g.studies.tasks import Task
from hpc_c2g.studies.view import ACTIVE, View

JOB = "job"
"""File in a submission's folder: the number of its job."""
FOUND_WITHIN = 5.0
"""Seconds after which a job that its launcher was killed over cannot come up any more: sbatch has long ended."""


@dataclass(frozen=True)
class Batch:
    """Tasks of one stage and shape, at most as many as an array may have."""

    tasks: tuple[Task, ...]

    @property
    def shape(self) -> Shape:
        """Of each task's job."""
        return Shape(self.tasks[0].nodes, self.tasks[0].tasks_per_node)


def batches(tasks: Sequence[Task], longest: int) -> list[Batch]:
    """Arrays of neighbors in ``tasks`` that have stage and shape in common."""
    grouped = itertools.groupby(tasks, key=lambda t: (t.stage, t.nodes, t.tasks_per_node))
    found = []
    for _, group in grouped:
        members = list(group)
        found += [Batch(tuple(members[i : i + longest])) for i in range(0, len(members), longest)]
    return found


def in_order(tasks: Sequence[Task], stages: Sequence[str]) -> list[Task]:
    """By stage, then by shape."""
    return sorted(tasks, key=lambda t: (stages.index(t.stage), t.nodes, t.tasks_per_node))


def epilog_command(profile: SlurmProfile, study: Path, token: str, several: bool) -> str:
    """What a job's shell calls, with the exit code, when the job's processes have ended; outside of the container, where Slurm is."""
    python = python_command(replace(profile, container=[]))
    job = '"${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"' if several else '"$SLURM_JOB_ID"'
    index = '"$SLURM_ARRAY_TASK_ID"' if several else "0"
    return (
        f"{python} -m hpc_c2g.studies.epilog {shlex.quote(str(study))} {token} {index} {job}"
        ' "${SLURM_RESTART_COUNT:-0}"'
    )


def script(profile: SlurmProfile, study: Path, submission: Submission, shape: Shape, after: Sequence[str]) -> str:
    """The text that sbatch gets: a pure function of the profile and the submission."""
    count = len(submission.elements)
    epilog = epilog_command(profile, study, submission.token, count > 1)
    return sbatch_text(profile, shape, submission.name, submission.folder(study), count, after, epilog)


class SlurmExecutor:
    """Hands tasks to Slurm.

    Args:
        launcher: of the study.
        profile: of the cluster.
        cluster: its name, for the ledger.
    """

    def __init__(self, launcher: Launcher, profile: SlurmProfile, cluster: str, study_name: str) -> None:
        check_folder(launcher.study)
        self.launcher, self.profile, self.cluster, self.name = launcher, profile, cluster, study_name
        self.queue = Queue()

    def recover(self) -> None:
        """Find the jobs of submissions whose launcher was killed before it learned them, and forget those that never became one.

        Raises:
            UserError: Slurm does not answer.
        """
        ledger, study = self.launcher.ledger, self.launcher.study
        for token, name in ledger.unknown_submissions():
            try:
                submission = read_submission(study, token)
            except UserError:  # it was not even written
                submission = Submission(token, name, "", ())
            end = time.monotonic() + FOUND_WITHIN
            while not (found := self.queue.find(name)) and time.monotonic() < end:
                time.sleep(0.5)
            if found:
                self._known(submission, found[0])
            else:
                ledger.withdraw(submission)
        known = {row.submission for row in ledger.rows()}
        for file in study.glob(f"{FOLDER}/*/{JOB}"):  # of a ledger that was built anew
            if file.parent.name not in known:
                try:
                    submission = read_submission(study, file.parent.name)
                    self.launcher.ledger.adopt(submission, self.cluster, file.read_text().strip())
                except (UserError, OSError) as error:  # its runs' leases keep them from being made twice at once
                    told = f"submission {file.parent.name} cannot be read, its job is not known: {error}"
                    print(f"c2g: {told}", file=sys.stderr)

    def views(self) -> list[View]:
        """Where every task stands by Slurm's own word; what vanished from its queue without a word is settled.

        Raises:
            UserError: Slurm does not answer.
        """
        views = self.launcher.look(self.queue.ask())
        lost = [v for v in views if v.state == "lost"]
        if not lost:
            return views
        outcomes = self.queue.outcome([v.row.job for v in lost if v.row.job])
        for view in lost:
            state = outcomes.get(view.row.job, ("UNKNOWN", 0))[0]
            code = {"OUT_OF_MEMORY": 137, "FAILED": 1}.get(state, STOPPED[0])
            if view.report:
                task, report = self.launcher.tasks.get(view.row.id), view.report
                if task:
                    finalize_attempt(self.launcher.study, task, report.job, report.restart, code, view.row.allowed)
        return self.launcher.look(self.queue.ask())

    def submit(self, wanted: Sequence[View], views: Sequence[View], stages: Sequence[str]) -> list[str]:
        """Submit all that is wanted, or nothing; returns the jobs.

        Raises:
            UserError: sbatch refuses or does not answer; what was submitted in this call is cancelled again.
        """
        launcher = self.launcher
        tasks = in_order([launcher.tasks[v.row.id] for v in wanted], stages)
        allowed = {v.row.id: v.row.allowed for v in wanted}
        job_of = {v.row.id: v.row.job for v in views if v.state in ACTIVE and v.row.job}
        planned = [
            (Submission.of(self.name, batch.tasks, [allowed[t.id] for t in batch.tasks]), batch)
            for batch in batches(tasks, self.profile.max_array)
        ]
        self._trace(planned)
        launcher.clear_marks(wanted)
        made: list[tuple[Submission, str]] = []
        try:
            for submission, batch in planned:
                upstream = {job_of[u].partition("_")[0] for t in batch.tasks for u in t.upstream if job_of.get(u)}
                job = self._submit(submission, batch, sorted(upstream, key=int))
                made.append((submission, job))
                job_of.update({e.id: job for e in submission.elements})
        except BaseException:
            if made:
                with contextlib.suppress(UserError):
                    self.queue.cancel([job for _, job in made])
                for submission, _ in made:
                    launcher.ledger.withdraw(submission)
            raise
        return [job for _, job in made]

    def _trace(self, planned: Sequence[tuple[Submission, Batch]]) -> None:
        """Let sbatch check one script of each kind, so that nothing is half-submitted.

        Raises:
            UserError: it refuses.
        """
        seen = set()
        for submission, batch in planned:
            kind = (batch.shape, min(2, len(submission.elements)))
            if kind in seen:
                continue
            seen.add(kind)
            text = script(self.profile, self.launcher.study, submission, batch.shape, [])
            with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
                file.write(text)
                file.flush()
                _sbatch("--test-only", file.name)

    def _submit(self, submission: Submission, batch: Batch, after: Sequence[str]) -> str:
        study, folder = self.launcher.study, submission.folder(self.launcher.study)
        submission.write(study)
        self.launcher.ledger.intend(submission, self.cluster)
        count = len(submission.elements)
        epilog = epilog_command(self.profile, study, submission.token, count > 1)
        try:
            job = through_submitit(
                self.profile,
                submitit_parameters(self.profile, batch.shape, submission.name, after, epilog),
                folder,
                [Attempt(str(study), e.spec) for e in submission.elements],
            )
        except UserError:
            self.launcher.ledger.withdraw(submission)
            raise
        self._known(submission, job)
        return job

    def _known(self, submission: Submission, job: str) -> None:
        """Note a submission's job, and see that its pickles are where submitit looks for them."""
        study, folder = self.launcher.study, submission.folder(self.launcher.study)
        from submitit.core.utils import DelayedSubmission

        several = len(submission.elements) > 1
        for i, element in enumerate(submission.elements):
            pickle = folder / f"{job}{f'_{i}' if several else ''}_submitted.pkl"
            if not pickle.exists():
                DelayedSubmission(Attempt(str(study), element.spec)).dump(pickle)
        write_atomically(folder / JOB, job.encode())
        for file in folder.iterdir():
            with contextlib.suppress(OSError):
                file.chmod(0o600)
        self.launcher.ledger.submitted(submission, job)


def through_submitit(
    profile: SlurmProfile, parameters: dict[str, Any], folder: Path, attempts: Sequence[Callable[[], None]]
) -> str:
    """The job's number.

    Raises:
        UserError: sbatch is missing or refuses.
    """
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        # submitit's own count of time limits is none of ours: a study goes on until it is done
        executor = SlurmExecutor(folder, max_num_timeout=10**6, python=python_command(profile))
        executor.update_parameters(**parameters)
        jobs = executor.submit_array(list(attempts)) if len(attempts) > 1 else [executor.submit(attempts[0])]
    except (FailedJobError, FailedSubmissionError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise UserError(f"sbatch failed: {_last(str(error))}", "see `c2g doctor`; nothing was submitted") from error
    return str(jobs[0].job_id).partition("_")[0]


def _sbatch(*arguments: str) -> None:
    try:
        done = subprocess.run(["sbatch", *arguments], capture_output=True, text=True, timeout=60)
    except FileNotFoundError as error:
        raise UserError("sbatch is not on this machine", "log in to the cluster, or use cluster=local") from error
    except subprocess.TimeoutExpired as error:
        raise UserError("sbatch does not answer within 60 s", "see `sinfo` and `c2g doctor`") from error
    if done.returncode:
        raise UserError(
            f"sbatch refuses: {_last(done.stderr or done.stdout)}",
            "correct the profile (profile.FIELD=VALUE), see `sinfo`",
        )


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if "error" in line.lower()]
    return (told or lines or ["no word"])[0 if told else -1].removeprefix("sbatch: error: ")


def watch(arrays: SlurmExecutor, stages: Sequence[str], only: str, seconds: float) -> Iterator[list[View]]:
    """Submit, look every ``seconds``, submit again what was lost, until nothing is left that Slurm or we could do.

    Raises:
        UserError: sbatch refuses. A Slurm that does not answer is waited for.
    """
    while True:
        try:
            views = arrays.views()
            wanted = arrays.launcher.wanted(views, only)
            if wanted:
                arrays.submit(wanted, views, stages)
                views = arrays.views()
        except NoAnswerError:
            time.sleep(seconds)
            continue
        yield views
        if not any(v.state in ACTIVE for v in views) and not arrays.launcher.wanted(views, only):
            return
        time.sleep(seconds)
