"""The doctor's job, seen from the login node: submitted like a job of a study, watched, and cancelled if it does not start."""

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
from hpc_c2g.preflight.check_result import CheckResult, has_errors
from hpc_c2g.preflight.exchange import PLAN, REPLY_TIMEOUT_S, answer_pings, clock_offset, read_reports, versions
from hpc_c2g.preflight.job_checks import Job
from hpc_c2g.preflight.node_checks import LoginNode, check_job
from hpc_c2g.preflight.node_probe import MEET_TIMEOUT_S, SUM_TIMEOUT_S, NodeProbe
from hpc_c2g.scheduling.batch_script import Shape, check_folder, python_command, submitit_parameters
from hpc_c2g.scheduling.profile import SlurmProfile
from hpc_c2g.scheduling.programs import query, records
from hpc_c2g.studies.slurm_executor import through_submitit

FOLDER = "doctor"
MAX_MINUTES = 10
RUN_TIMEOUT_S = REPLY_TIMEOUT_S + MEET_TIMEOUT_S + 2 * SUM_TIMEOUT_S + 120.0
"""Longest time from the start of the job to its last report."""
GRACE_S = 5.0
"""Time to wait for reports that are not likely to come."""
POLL_S = 1.0
ENDED = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED", "LAUNCH_FAILED",
)  # fmt: skip
LogFn = Callable[[str], None]


def check_nodes_by_job(
    profile: SlurmProfile, shape: Shape, study: Path, wait: float, log_fn: LogFn = lambda _: None
) -> list[CheckResult]:
    """Submit the job, wait for the reports of its ranks and check them. The job is never left behind.

    Args:
        profile: Profile of the cluster.
        shape: Nodes and ranks of the job.
        study: Study folder; the job's own folder below it is kept if there is an error.
        wait: Seconds within which the job must start.
        log_fn: Called with the state of the job in one line.

    Raises:
        UserError: sbatch refuses the job, or the folder cannot be written.
    """
    folder = check_folder(study) / FOLDER / uuid.uuid4().hex[:12]
    created = [p for p in (folder.parent, *folder.parent.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, mode=0o700)
        login = LoginNode(versions(), clock_offset(folder))
    except OSError as error:
        raise cannot_write(folder, error) from error
    plan = {"reply": REPLY_TIMEOUT_S, "meet": MEET_TIMEOUT_S, "sum": SUM_TIMEOUT_S}
    write_atomically(folder / PLAN, json.dumps(plan).encode())
    try:
        with _submitted(profile, shape, folder) as job:
            ended = _watch(job, shape, folder, wait, log_fn)
        results = check_job(profile, shape, str(study), ended, login, read_reports(folder))
    except UserError:
        _remove(folder, created)
        raise
    if not has_errors(results):
        _remove(folder, created)
    return results


def _remove(folder: Path, created: list[Path]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for parent in created or [folder.parent]:
        with contextlib.suppress(OSError):
            parent.rmdir()


def epilog_command(profile: SlurmProfile, folder: Path) -> str:
    """Command of the epilog, built like a study's (``slurm_executor.epilog_command``), so that the same faults show."""
    python = python_command(replace(profile, container=[]))
    return f"{python} -m hpc_c2g.preflight.node_probe {shlex.quote(str(folder))}"


@contextlib.contextmanager
def _submitted(profile: SlurmProfile, shape: Shape, folder: Path) -> Iterator[str]:
    """Context with the job's id; on exit the job is cancelled if it has not ended."""
    short = replace(
        profile,
        time_minutes=min(MAX_MINUTES, profile.time_minutes),  # a short job starts earlier
        signal_seconds=min(profile.signal_seconds, 30),
    )
    parameters = submitit_parameters(short, shape, "c2g-doctor", (), epilog_command(profile, folder))
    options = parameters["additional_parameters"]
    del options["requeue"]
    parameters["additional_parameters"] = {"no-requeue": True, **options}
    job = through_submitit(short, parameters, folder, [NodeProbe(str(folder))])
    try:
        yield job
    finally:
        if _state(job)["JobState"] not in ENDED:
            query("scancel", "--quiet", job)


def _state(job: str) -> dict[str, str]:
    """Slurm's record of the job; its state is ``UNKNOWN`` if Slurm does not answer."""
    answer = query("scontrol", "-o", "show", "job", job)
    found = records(answer.output)
    if found:
        return {"JobState": "UNKNOWN", **found[0]}
    return {"JobState": "COMPLETED" if "Invalid job id" in answer.fault else "UNKNOWN"}  # Slurm forgets ended jobs


def _watch(job: str, shape: Shape, folder: Path, wait: float, log_fn: LogFn) -> Job:
    """Answer pings until all ranks are done, the job has ended, or time is up."""
    began = time.monotonic()
    started: float | None = None
    answered: dict[str, str] = {}
    limit = polled = 0.0
    state = {"JobState": "PENDING"}
    while True:
        now = time.monotonic()
        answer_pings(folder, answered)
        reports = read_reports(folder)
        done = sum(r.get("part") == "done" for r in reports)
        if now - polled >= POLL_S:
            polled, state = now, _state(job) if done < shape.tasks else state
            name = state["JobState"]
            log_fn(f"job {job}: {name.lower()} ({now - began:.0f} s), {done} of {shape.tasks} ranks are done")
            pending = name in ("PENDING", "CONFIGURING", "UNKNOWN") and not reports
            if not pending and started is None:
                started, limit = now, now + RUN_TIMEOUT_S
            if pending and started is None and now - began > wait:
                reason = "it does not answer" if name == "UNKNOWN" else _reason(state)
                return Job(job, name, reason, waited=wait)
            if name in ENDED:
                late = name == "COMPLETED" and len(reports) < shape.tasks  # reports may still arrive
                never = _reason(state) == "JobLaunchFailure"
                limit = min(limit, now + (REPLY_TIMEOUT_S if late else 0.0 if never else GRACE_S))
            elif _launch_errors(folder):
                limit = min(limit, now + GRACE_S)
        if done >= shape.tasks or (started is not None and now > limit):
            break
        time.sleep(0.1)
    if done < shape.tasks and state["JobState"] not in ENDED:
        log_fn(f"job {job} hangs and is cancelled")
        query("scancel", "--quiet", job)
    return _ended(job, shape, folder)


def _ended(job: str, shape: Shape, folder: Path) -> Job:
    """The job after its batch script has ended, which is soon after the ranks are done."""
    end = time.monotonic() + 2 * GRACE_S
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
        launch_errors=_launch_errors(folder),
        shell_ok={"COMPLETED": True, "FAILED": False}.get(state["JobState"]),  # its exit code is the epilog's
        logs=str(folder),
    )


def _reason(state: dict[str, str]) -> str:
    return state.get("Reason", "").replace("_", " ")


def _launch_errors(folder: Path) -> dict[int, str]:
    """Reason of each rank that srun could not start."""
    found: dict[int, str] = {}
    for file in folder.glob("*_log.err"):
        with contextlib.suppress(OSError):
            text = file.read_text(errors="replace")
            for rank, why in re.findall(r"srun: error: task (\d+) launch failed: (.+)", text):
                found[int(rank)] = why.strip()
    return found


def _last_error(log: Path) -> str:
    """The last line of a log that reports an error; lines of srun and Slurm only if there are no others."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace")[-20_000:].splitlines() if line.strip()]
    except OSError:
        return ""
    errors = [line for line in lines if re.search(r"[Ee]rror|not found|cannot|No such|[Kk]illed|Unable|denied", line)]
    own = [line for line in errors if not line.startswith(("srun:", "slurmstepd:"))]
    return (own or errors or [""])[-1]
