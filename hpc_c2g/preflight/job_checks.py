"""Checks of how the doctor's job ended: why it did not start, and why ranks wrote no report. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpc_c2g.preflight.check_result import CheckResult
from hpc_c2g.scheduling.batch_script import Shape

MAX_LISTED = 5
NO_TASK_LOG = "Slurmd could not connect IO"
"""Message of srun when a node cannot open a task's log."""
NO_SCRIPT_LOG = "0:53"
"""Exit code and signal of a job when the log of its script cannot be opened."""
SHARE_HINT = "choose a folder that all nodes share, or have it mounted with a shorter cache (NFS: actimeo=10)"
BUSY = ("Priority", "Resources", "None", "BeginTime", "")
REASONS = {
    r"DOWN|ReqNodeNotAvail|UnavailableNodes": "see `sinfo -R`: wait until the nodes return, or name another profile.partition",
    r"PartitionTimeLimit": "lower profile.time_minutes",
    r"PartitionNodeLimit|PartitionConfig": "ask for fewer nodes, or name another profile.partition",
    r"PartitionDown|PartitionInactive": "wait, or name another profile.partition",
    r"Held": "see `scontrol show job`; `scontrol release` if you have the right to",
    r"Reserv": "wait, or correct profile.extra.reservation",
    r"QOS|Assoc|MaxCpu|GrpTRES|Account": "a limit of your account or qos: end other jobs, or name another profile.qos",
    r"License": "wait for licenses",
    r"BadConstraints": "correct profile.constraint",
}
"""Hint for each reason that Slurm gives for a pending job."""
FAULTS = {
    r"No module named": "install it in the environment of profile.python, or load it by profile.modules or setup",
    r"mkdir": "name another profile.scratch",
    r"\bmodule\b|[Ll]mod": "correct profile.modules (`module avail` on a node)",
    r"[Kk]illed|oom|[Oo]ut [Oo]f [Mm]emory": "raise profile.mem_gb",
    r"execve|[Nn]o such file|not found": "profile.python, container and setup must exist on the nodes",
}
"""Hint for each error in the log of a rank."""


@dataclass(frozen=True)
class Job:
    """End of the doctor's job.

    Attributes:
        id: Job id.
        state: Last state of the job, such as COMPLETED.
        reason: Slurm's reason for a pending or failed job.
        code: Exit code and signal, such as ``0:53``.
        nodes: Names of the job's nodes, in order.
        batch_host: Node that ran the batch script.
        waited: Seconds that the job waited for its start; None if it started.
        errors: Last error in the log of each rank that has one.
        launch_errors: Reason of each rank that did not start.
        shell_ok: True if the batch script ended well, the epilog included; None if something else ended the job.
        logs: Folder of the logs.
    """

    id: str
    state: str
    reason: str = ""
    code: str = ""
    nodes: tuple[str, ...] = ()
    batch_host: str = ""
    waited: float | None = None
    errors: Mapping[int, str] = field(default_factory=dict)
    launch_errors: Mapping[int, str] = field(default_factory=dict)
    shell_ok: bool | None = None
    logs: str = ""

    def node(self, rank: int, shape: Shape) -> str:
        """Node of a rank; Slurm distributes ranks in blocks."""
        index = rank // shape.tasks_per_node
        return self.nodes[index] if index < len(self.nodes) else "?"


def check_pending(job: Job) -> CheckResult:
    """Explain why the job did not start in time. On a busy cluster that is no fault, but the nodes remain unchecked."""
    status = "unknown" if job.reason in BUSY else "error"
    busy = "the cluster is busy: try again with a longer wait=SECONDS, see `squeue --start`"
    hint = busy if status == "unknown" else _hint(REASONS, job.reason, "see `sinfo` and `scontrol show job`")
    reason = job.reason if job.reason not in ("None", "") else "no reason given"
    message = f"the job did not start within {job.waited:.0f} s, Slurm's reason: {reason}; it was cancelled"
    return CheckResult(status, message, hint)


def check_ranks(shape: Shape, folder: str, job: Job, reports: Sequence[Mapping[str, Any]]) -> list[CheckResult]:
    """Check that every rank started, wrote a report and came to its end.

    Args:
        shape: Nodes and ranks of the job.
        folder: Study folder.
        job: End of the job.
        reports: Reports of the ranks; may be incomplete.
    """
    if job.code == NO_SCRIPT_LOG:
        return [_not_writable(folder, [job.batch_host or "?"])]
    results = []
    nodes = unique(job.node(rank, shape) for rank, why in job.launch_errors.items() if NO_TASK_LOG in why)
    if nodes:
        results.append(_not_writable(folder, nodes))
    results += _silent_ranks(shape, folder, job, reports)
    for node, why in by_text((r["node"], r["import_error"]) for r in reports if r.get("import_error")):
        message = f"the package cannot be used on {node}: {why}"
        results.append(CheckResult("error", message, _hint(FAULTS, why, f"see {job.logs}")))
    if not nodes:  # else the other ranks waited for those that did not start
        results += _stuck_ranks(job, reports)
    if job.shell_ok is False and not results:
        why = job.errors.get(0, f"exit code {job.code}")
        message = f"the batch script could not run the epilog, outside of any container: {why}"
        hint = f"profile.python must have the package without profile.container, too; see {job.logs}"
        results.append(CheckResult("error", message, hint))
    return results


def _silent_ranks(shape: Shape, folder: str, job: Job, reports: Sequence[Mapping[str, Any]]) -> list[CheckResult]:
    """One error for each cause of missing reports."""
    reported = {r["rank"] for r in reports if r.get("rank") is not None}
    anonymous = sum(r.get("rank") is None for r in reports)  # a rank learns its number after the import
    silent = [r for r in range(shape.tasks) if r not in reported and NO_TASK_LOG not in job.launch_errors.get(r, "")]
    if len(silent) <= anonymous:
        return []
    results = []
    causes = {rank: job.launch_errors.get(rank) or job.errors.get(rank, "") for rank in silent}
    for cause in unique(causes.values()):
        ranks = [rank for rank in silent if causes[rank] == cause]
        who = f"rank {listed(ranks)} of {shape.tasks} on {listed(unique(job.node(r, shape) for r in ranks))}"
        if not cause and job.state == "COMPLETED":
            message = f"{who} ended well, but its report in study_dir={folder} does not arrive here"
            results.append(CheckResult("error", message, SHARE_HINT))
            continue
        why = cause or f"the job ended as {job.state} {job.code}".rstrip()
        message = f"{who} wrote no report: {why}"
        results.append(CheckResult("error", message, _hint(FAULTS, why, f"see {job.logs}")))
    return results


def _stuck_ranks(job: Job, reports: Sequence[Mapping[str, Any]]) -> list[CheckResult]:
    """One error for each part of the probe that did not end."""
    results = []
    stuck = [r for r in reports if r.get("part") != "done"]
    for part in unique(str(r.get("part")) for r in stuck):
        here = [r for r in stuck if str(r.get("part")) == part]
        ranks = [r["rank"] for r in here if r.get("rank") is not None]
        who = (f"rank {listed(ranks)} on " if ranks else "") + listed(unique(r["node"] for r in here))
        why = next((job.errors[rank] for rank in ranks if rank in job.errors), f"the job ended as {job.state}")
        message = f"the probe of {who} did not finish its part {part!r}: {why}"
        results.append(CheckResult("error", message, _hint(FAULTS, why, f"see {job.logs}")))
    return results


def _not_writable(folder: str, nodes: Sequence[str]) -> CheckResult:
    message = f"study_dir={folder} cannot be written from {listed(nodes)}: ranks could not open their logs there"
    return CheckResult("error", message, f"choose a folder that all nodes share, or profile.exclude={','.join(nodes)}")


def _hint(hints: Mapping[str, str], text: str, default: str) -> str:
    return next((hint for pattern, hint in hints.items() if re.search(pattern, text)), default)


def by_text(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Group (node, text) pairs into (nodes, text), each text once."""
    nodes: dict[str, list[str]] = {}
    for node, text in pairs:
        nodes.setdefault(text, []).append(node)
    return [(listed(unique(names)), text) for text, names in nodes.items()]


def unique(items: Iterable[str]) -> list[str]:
    """Items without repetition, in order."""
    return list(dict.fromkeys(items))


def listed(items: Sequence[object]) -> str:
    """The first items, separated by commas, and the number of the others."""
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return ", ".join(map(str, items[:MAX_LISTED])) + more
