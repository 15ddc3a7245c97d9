"""The doctor's job, seen from the login node: submitted as a study's job is, watched, answered, cancelled where it does not start."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from hpc_c2g.errors import UserError
from hpc_c2g.files import cannot_write, write_atomically
from hpc_c2g.preflight.check_result import CheckResult
from hpc_c2g.preflight.node_checks import Job, Login, judge
from hpc_c2g.preflight.node_probe import (
    MEET_SECONDS,
    PLAN,
    REPLY_SECONDS,
    SUM_SECONDS,
    NodeProbe,
    answer_greetings,
    clock_offset,
    read_reports,
    versions,
)
from hpc_c2g.scheduling.batch_script import Shape, check_folder, python_command, submitit_parameters
from hpc_c2g.scheduling.profile import SlurmProfile
from hpc_c2g.scheduling.programs import query, records
from hpc_c2g.studies.slurm_executor import through_submitit

FOLDER = "doctor"
MINUTES = 10
RUN_SECONDS = REPLY_SECONDS + MEET_SECONDS + 2 * SUM_SECONDS + 120.0
"""How long the job may take from its start to its last report."""
GRACE_SECONDS = 5.0
"""How long reports are waited for that are not likely to come."""
LOOK_SECONDS = 1.0
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
    "LAUNCH_FAILED",
)
LogFn = Callable[[str], None]


def check_nodes(
    profile: SlurmProfile, shape: Shape, study: Path, wait: float, log_fn: LogFn = lambda _: None
) -> list[CheckResult]:
    """Submit the job, wait for its reports, judge them; whatever happens, no job stays behind.

    Args:
        profile: of the cluster.
        shape: of the job.
        study: the study's folder; the job's own below it stays where something was wrong.
        wait: seconds within which it must start.
        tell: is called with how it stands.

    Raises:
        UserError: sbatch refuses, or the folder cannot be written.
    """
    folder = check_folder(study) / FOLDER / uuid.uuid4().hex[:12]
    new = [p for p in (folder.parent, *folder.parent.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, mode=0o700)
        login = Login(versions(), clock_offset(folder))
    except OSError as error:
        raise cannot_write(folder, error) from error
    write_atomically(
        folder / PLAN, json.dumps({"reply": REPLY_SECONDS, "meet": MEET_SECONDS, "sum": SUM_SECONDS}).encode()
    )
    try:
        with _submitted(profile, shape, folder) as job:
            seen = _watch(job, shape, folder, wait, log_fn)
        found = judge(profile, shape, str(study), seen, login, read_reports(folder))
    except UserError:
        _remove(folder, new)
        raise
    if not any(f.status == "error" for f in found):
        _remove(folder, new)
    return found


def _remove(folder: Path, also: list[Path]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for parent in also or [folder.parent]:
        with contextlib.suppress(OSError):
            parent.rmdir()


def epilog_command(profile: SlurmProfile, folder: Path) -> str:
    """As a study's (see ``slurm.epilog_command``), so that what keeps that one from running is found."""
    python = python_command(replace(profile, container=[]))
    return f"{python} -m hpc_c2g.preflight.node_probe {shlex.quote(str(folder))}"


@contextlib.contextmanager
def _submitted(profile: SlurmProfile, shape: Shape, folder: Path) -> Iterator[str]:
    """The job's number; on the way out it is cancelled if it is still there."""
    brief = replace(
        profile,
        time_minutes=min(MINUTES, profile.time_minutes),  # a short job starts earlier
        signal_seconds=min(profile.signal_seconds, 30),
    )
    parameters = submitit_parameters(brief, shape, "c2g-doctor", (), epilog_command(profile, folder))
    options = parameters["additional_parameters"]
    del options["requeue"]
    parameters["additional_parameters"] = {"no-requeue": True, **options}
    job = through_submitit(brief, parameters, folder, [NodeProbe(str(folder))])
    try:
        yield job
    finally:
        if _state(job)["JobState"] not in ENDED:
            query("scancel", "--quiet", job)


def _state(job: str) -> dict[str, str]:
    """What Slurm says of the job; ``UNKNOWN`` where it does not answer."""
    answer = query("scontrol", "-o", "show", "job", job)
    found = records(answer.output)
    if found:
        return {"JobState": "UNKNOWN", **found[0]}
    return {"JobState": "COMPLETED" if "Invalid job id" in answer.fault else "UNKNOWN"}  # long forgotten


def _watch(job: str, shape: Shape, folder: Path, wait: float, log_fn: LogFn) -> Job:
    """Answer greetings until all ranks have told all, the job has ended, or time is up."""
    began = time.monotonic()
    started: float | None = None
    answered: dict[str, str] = {}
    limit = looked = 0.0
    state = {"JobState": "PENDING"}
    while True:
        now = time.monotonic()
        answer_greetings(folder, answered)
        reports = read_reports(folder)
        done = sum(r.get("part") == "done" for r in reports)
        if now - looked >= LOOK_SECONDS:
            looked, state = now, _state(job) if done < shape.tasks else state
            where = state["JobState"]
            log_fn(f"job {job}: {where.lower()} ({now - began:.0f} s), {done} of {shape.tasks} ranks are done")
            waits = where in ("PENDING", "CONFIGURING", "UNKNOWN") and not reports
            if not waits and started is None:
                started, limit = now, now + RUN_SECONDS
            if waits and started is None and now - began > wait:
                reason = "it does not answer" if where == "UNKNOWN" else _reason(state)
                return Job(job, where, reason, waited=wait)
            if where in ENDED:
                late = where == "COMPLETED" and len(reports) < shape.tasks  # its files may be on their way
                never = _reason(state) == "JobLaunchFailure"
                limit = min(limit, now + (REPLY_SECONDS if late else 0.0 if never else GRACE_SECONDS))
            elif _launch_failures(folder):
                limit = min(limit, now + GRACE_SECONDS)
        if done >= shape.tasks or (started is not None and now > limit):
            break
        time.sleep(0.1)
    if done < shape.tasks and state["JobState"] not in ENDED:
        log_fn(f"job {job} does not get on: it is cancelled")
        query("scancel", "--quiet", job)
    return _ended(job, shape, folder)


def _ended(job: str, shape: Shape, folder: Path) -> Job:
    """The job once its shell has ended, which is soon where the ranks are done."""
    end = time.monotonic() + 2 * GRACE_SECONDS
    while (state := _state(job))["JobState"] not in ENDED and time.monotonic() < end:
        time.sleep(0.2)
    nodes = tuple(query("scontrol", "show", "hostnames", state.get("NodeList", "")).output.split())
    return Job(
        job,
        state["JobState"],
        _reason(state),
        state.get("ExitCode", ""),
        nodes,
        state.get("BatchHost", ""),
        errors={rank: line for rank in range(shape.tasks) if (line := _last_error(folder / f"{job}_{rank}_log.err"))},
        launch=_launch_failures(folder),
        shell_ok={"COMPLETED": True, "FAILED": False}.get(state["JobState"]),  # its exit code is the epilog's
        logs=str(folder),
    )


def _reason(state: dict[str, str]) -> str:
    return state.get("Reason", "").replace("_", " ")


def _launch_failures(folder: Path) -> dict[int, str]:
    """What srun says of ranks that it could not start."""
    found: dict[int, str] = {}
    for file in folder.glob("*_log.err"):
        with contextlib.suppress(OSError):
            text = file.read_text(errors="replace")
            for rank, why in re.findall(r"srun: error: task (\d+) launch failed: (.+)", text):
                found[int(rank)] = why.strip()
    return found


def _last_error(log: Path) -> str:
    """The last line that tells a fault; srun's and Slurm's own words only where there are no others."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace")[-20_000:].splitlines() if line.strip()]
    except OSError:
        return ""
    told = [line for line in lines if re.search(r"[Ee]rror|not found|cannot|No such|[Kk]illed|Unable|denied", line)]
    own = [line for line in told if not line.startswith(("srun:", "slurmstepd:"))]
    return (own or told or [""])[-1]
