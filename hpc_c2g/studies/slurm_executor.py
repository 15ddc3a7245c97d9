"""``cluster=PROFILE``: a study's tasks as Slurm arrays, one per stage and shape, each waiting for those that it depends on."""

from __future__ import annotations

import contextlib
import itertools
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpc_c2g.errors import UserError
from hpc_c2g.scheduling.batch_script import Shape, check_folder, python_command, sbatch_text, submitit_parameters
from hpc_c2g.scheduling.profile import SlurmProfile
from hpc_c2g.scheduling.queue import NoAnswerError, Queue
from hpc_c2g.scheduling.sbatch import check_script, first_error
from hpc_c2g.studies.attempt import Attempt
from hpc_c2g.studies.epilog import STOPPED, finalize_attempt
from hpc_c2g.studies.launcher import Launcher
from hpc_c2g.studies.reports import read_report
from hpc_c2g.studies.submissions import Submission, read_submission
from hpc_c2g.studies.task_status import ACTIVE, TaskStatus
from hpc_c2g.studies.tasks import Task, TaskInfo

RECOVERY_SECONDS = 5.0
"""Seconds after which the job of a killed launcher cannot appear any more: its sbatch has ended long ago."""


@dataclass(frozen=True)
class Batch:
    """Tasks of one stage and shape, at most as many as an array may have."""

    tasks: tuple[Task | TaskInfo, ...]

    @property
    def shape(self) -> Shape:
        """Shape of each task's job."""
        return Shape(self.tasks[0].nodes, self.tasks[0].tasks_per_node)


def split_batches(tasks: Sequence[Task | TaskInfo], max_array: int) -> list[Batch]:
    """Return arrays of neighbors in ``tasks`` that have stage and shape in common."""
    grouped = itertools.groupby(tasks, key=lambda t: (t.stage, t.nodes, t.tasks_per_node))
    found = []
    for _, group in grouped:
        members = list(group)
        found += [Batch(tuple(members[i : i + max_array])) for i in range(0, len(members), max_array)]
    return found


def sort_tasks(tasks: Sequence[Task | TaskInfo], stages: Sequence[str]) -> list[Task | TaskInfo]:
    """Return the tasks by stage, then by shape."""
    return sorted(tasks, key=lambda t: (stages.index(t.stage), t.nodes, t.tasks_per_node))


def epilog_command(profile: SlurmProfile, study: Path, token: str, several: bool) -> str:
    """Return the command that a job's shell calls, with the exit code, after the job's processes have ended.

    It runs outside of the container, where Slurm's commands are.
    """
    python = python_command(replace(profile, container=[]))
    job = '"${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"' if several else '"$SLURM_JOB_ID"'
    index = '"$SLURM_ARRAY_TASK_ID"' if several else "0"
    return (
        f"{python} -m hpc_c2g.studies.epilog {shlex.quote(str(study))} {token} {index} {job}"
        ' "${SLURM_RESTART_COUNT:-0}"'
    )


def submission_script(
    profile: SlurmProfile, study: Path, submission: Submission, shape: Shape, after: Sequence[str]
) -> str:
    """Return the text that sbatch receives: a pure function of the profile and the submission."""
    count = len(submission.elements)
    epilog = epilog_command(profile, study, submission.token, count > 1)
    return sbatch_text(profile, shape, submission.name, submission.folder(study), count, after, epilog)


class SlurmExecutor:
    """Submits a study's tasks to Slurm.

    Args:
        launcher: Launcher of the study.
        profile: Profile of the cluster.
        study_name: Name of the study, for the names of its jobs.
    """

    def __init__(self, launcher: Launcher, profile: SlurmProfile, study_name: str) -> None:
        check_folder(launcher.study)
        self.launcher, self.profile, self.name = launcher, profile, study_name
        self.queue = Queue()

    def recover(self) -> None:
        """Find the jobs of submissions whose launcher was killed before it recorded them; withdraw those that never became one.

        Raises:
            UserError: Slurm does not answer.
        """
        journal, study = self.launcher.journal, self.launcher.study
        end = time.monotonic() + RECOVERY_SECONDS
        for token, name in list(journal.pending.items()):
            while not (found := self.queue.find(name)) and time.monotonic() < end:
                time.sleep(0.5)
            if not found:
                journal.withdraw(token)
                continue
            with contextlib.suppress(UserError):  # without its folder the job fails, and its tasks are submitted again
                self._write_pickles(read_submission(study, token), found[0])
            journal.submit(token, found[0])

    def statuses(self) -> list[TaskStatus]:
        """Return every task's status by Slurm's queue; the reports of tasks that vanished from it are completed first.

        Raises:
            UserError: Slurm does not answer.
        """
        statuses = self.launcher.statuses(self.queue.query())
        lost = [s for s in statuses if s.state == "lost"]
        if not lost:
            return statuses
        outcomes = self.queue.outcome([s.job for s in lost if s.job])
        for status in lost:
            outcome = outcomes.get(status.job, ("UNKNOWN", 0))[0]
            code = {"OUT_OF_MEMORY": 137, "FAILED": 1}.get(outcome, STOPPED[0])
            report = read_report(self.launcher.study, status.task)
            if report:
                finalize_attempt(
                    self.launcher.study, status.task, report.job, report.restart, code, status.max_failures
                )
        return self.launcher.statuses(self.queue.query())

    def submit(
        self, runnable: Sequence[TaskStatus], statuses: Sequence[TaskStatus], stages: Sequence[str]
    ) -> list[str]:
        """Submit all runnable tasks, or none; return the job ids.

        Raises:
            UserError: sbatch refuses or does not answer; jobs of this call that were submitted are cancelled again.
        """
        launcher = self.launcher
        limits = {s.task.id: s.max_failures for s in runnable}
        job_of = {s.task.id: s.job for s in statuses if s.state in ACTIVE and s.job}
        planned = [
            (Submission.of(self.name, batch.tasks, [limits[t.id] for t in batch.tasks]), batch)
            for batch in split_batches(sort_tasks([s.task for s in runnable], stages), self.profile.max_array)
        ]
        self._check_scripts(planned)
        launcher.clear_cancel_marks(runnable)
        submitted: list[tuple[Submission, str]] = []
        try:
            for submission, batch in planned:
                upstream = {job_of[u].partition("_")[0] for t in batch.tasks for u in t.upstream if job_of.get(u)}
                job = self._submit(submission, batch, sorted(upstream, key=int))
                submitted.append((submission, job))
                job_of.update({e.id: job for e in submission.elements})
        except BaseException:
            if submitted:
                with contextlib.suppress(UserError):
                    self.queue.cancel([job for _, job in submitted])
                for submission, _ in submitted:
                    launcher.journal.withdraw(submission.token)
            raise
        return [job for _, job in submitted]

    def _check_scripts(self, planned: Sequence[tuple[Submission, Batch]]) -> None:
        """Let sbatch check one script of each kind, so that a refusal comes before the first submission.

        Raises:
            UserError: sbatch refuses a script, or does not answer.
        """
        seen = set()
        for submission, batch in planned:
            kind = (batch.shape, min(2, len(submission.elements)))
            if kind in seen:
                continue
            seen.add(kind)
            answer = check_script(submission_script(self.profile, self.launcher.study, submission, batch.shape, []))
            if answer.code is None:
                raise UserError(answer.fault, "see `sinfo` and `c2g doctor`, or use cluster=local")
            if answer.code:
                raise UserError(
                    f"sbatch refuses: {answer.fault}", "correct the profile (profile.FIELD=VALUE), see `sinfo`"
                )

    def _submit(self, submission: Submission, batch: Batch, after: Sequence[str]) -> str:
        study, folder = self.launcher.study, submission.folder(self.launcher.study)
        submission.write(study)
        self.launcher.journal.begin(submission)
        epilog = epilog_command(self.profile, study, submission.token, len(submission.elements) > 1)
        try:
            job = through_submitit(
                self.profile,
                submitit_parameters(self.profile, batch.shape, submission.name, after, epilog),
                folder,
                [Attempt(str(study), e.spec) for e in submission.elements],
            )
        except UserError:
            self.launcher.journal.withdraw(submission.token)
            raise
        self._write_pickles(submission, job)
        self.launcher.journal.submit(submission.token, job)
        return job

    def _write_pickles(self, submission: Submission, job: str) -> None:
        """Write the pickles that submitit's jobs look for, where a killed launcher did not; the folder's files are the owner's alone."""
        study, folder = self.launcher.study, submission.folder(self.launcher.study)
        from submitit.core.utils import DelayedSubmission

        several = len(submission.elements) > 1
        for i, element in enumerate(submission.elements):
            pickle = folder / f"{job}{f'_{i}' if several else ''}_submitted.pkl"
            if not pickle.exists():
                DelayedSubmission(Attempt(str(study), element.spec)).dump(pickle)
        for file in folder.iterdir():
            with contextlib.suppress(OSError):
                file.chmod(0o600)


def through_submitit(
    profile: SlurmProfile, parameters: dict[str, Any], folder: Path, attempts: Sequence[Callable[[], None]]
) -> str:
    """Submit through submitit; return the job id.

    Raises:
        UserError: sbatch is missing or refuses.
    """
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        # submitit's own count of time limits does not apply: a study resumes until it is done
        executor = SlurmExecutor(folder, max_num_timeout=10**6, python=python_command(profile))
        executor.update_parameters(**parameters)
        jobs = executor.submit_array(list(attempts)) if len(attempts) > 1 else [executor.submit(attempts[0])]
    except (FailedJobError, FailedSubmissionError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"sbatch failed: {first_error(str(error))}", "see `c2g doctor`; nothing was submitted"
        ) from error
    return str(jobs[0].job_id).partition("_")[0]


def watch(executor: SlurmExecutor, stages: Sequence[str], only: str, seconds: float) -> Iterator[list[TaskStatus]]:
    """Submit, check every ``seconds``, submit again what was lost, until nothing is left to run; yield every task's status.

    Raises:
        UserError: sbatch refuses. A Slurm that does not answer is waited for.
    """
    while True:
        try:
            statuses = executor.statuses()
            runnable = executor.launcher.runnable(statuses, only)
            if runnable:
                executor.submit(runnable, statuses, stages)
                statuses = executor.statuses()
        except NoAnswerError:
            time.sleep(seconds)
            continue
        yield statuses
        if not any(s.state in ACTIVE for s in statuses) and not executor.launcher.runnable(statuses, only):
            return
        time.sleep(seconds)
