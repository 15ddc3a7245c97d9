"""Checks of what the ranks of the doctor's job reported: files, versions, clocks, devices, network. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpc_c2g.preflight.check_result import CheckResult, has_errors
from hpc_c2g.preflight.job_checks import SHARE_HINT, Job, by_text, check_pending, check_ranks, listed, unique
from hpc_c2g.scheduling.batch_script import Shape
from hpc_c2g.scheduling.profile import SlurmProfile

MAX_CLOCK_S, MAX_REPLY_S, MAX_IMPORT_S = 2.0, 15.0, 60.0
"""Seconds above which a warning is given."""
Reports = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class LoginNode:
    """The login node, to compare the nodes with.

    Attributes:
        versions: Result of ``exchange.versions``.
        clock: Result of ``exchange.clock_offset``.
    """

    versions: Mapping[str, str]
    clock: tuple[float, float] = (0.0, 0.0)


def check_job(
    profile: SlurmProfile, shape: Shape, folder: str, job: Job, login: LoginNode, reports: Reports
) -> list[CheckResult]:
    """All results of the doctor's job.

    Args:
        profile: Profile of the cluster.
        shape: Nodes and ranks of the job.
        folder: Study folder.
        job: End of the job.
        login: The login node.
        reports: Reports of the ranks; may be incomplete.
    """
    if job.waited is not None:
        return [check_pending(job)]
    rank_results = check_ranks(shape, folder, job, reports)
    network_results = check_interfaces(profile, reports)
    results = [*rank_results, *check_files(folder, reports), *check_versions(login, reports), *check_imports(reports)]
    results += check_clocks(login, reports) + check_scratch(reports) + check_devices(profile, shape, reports)
    results += network_results
    if not has_errors([*rank_results, *network_results]):  # else the same fault would be reported twice
        results += check_sum(profile, shape, reports)
    return results


def check_files(folder: str, reports: Reports) -> list[CheckResult]:
    """Check that files written by one side arrive at the other, and how fast."""
    replies = [(r["node"], r["reply"]) for r in reports if r.get("reply")]
    lost = unique(node for node, reply in replies if reply["received"] is None)
    if lost:
        message = f"files in study_dir={folder} do not arrive: {listed(lost)} wrote there and got no reply in time"
        return [CheckResult("error", message, SHARE_HINT)]
    if not replies:
        return []
    slowest, node = max((reply["received"] - reply["sent"], node) for node, reply in replies)
    if slowest > MAX_REPLY_S:
        message = f"files in study_dir={folder} arrive late: {node} had its reply after {slowest:.0f} s"
        return [CheckResult("warning", message, "`c2g status` is late by as much; nothing is lost")]
    count = len(unique(node for node, _ in replies))
    return [CheckResult("ok", f"{count} nodes read and write study_dir={folder}: a reply takes {slowest:.1f} s")]


def check_versions(login: LoginNode, reports: Reports) -> list[CheckResult]:
    """Check that the nodes have the login node's versions."""
    results = []
    reported = [r for r in reports if r.get("versions")]
    for name, own in login.versions.items():
        for nodes, theirs in by_text((r["node"], str(r["versions"].get(name))) for r in reported):
            if theirs != own:
                status = "error" if name in ("hpc_c2g", "code") or theirs == "missing" else "warning"
                message = f"{name} is {theirs} on {nodes}, {own} on the login node"
                hint = "use one environment for both: profile.python, modules, container"
                results.append(CheckResult(status, message, hint))
    if reported and not results:
        same = ", ".join(f"{name} {version}" for name, version in login.versions.items())
        results.append(CheckResult("ok", f"the nodes have the login node's versions: {same}"))
    return results


def check_imports(reports: Reports) -> list[CheckResult]:
    """Check how long the import of the package takes."""
    seconds = [(r["seconds"]["import"], r["node"]) for r in reports if "import" in r.get("seconds", {})]
    slowest, node = max(seconds, default=(0.0, ""))
    if slowest <= MAX_IMPORT_S:
        return []
    message = f"the import takes {slowest:.0f} s on {node}, before every run"
    return [CheckResult("warning", message, "put the environment into a container, or on a faster file system")]


def check_clocks(login: LoginNode, reports: Reports) -> list[CheckResult]:
    """Compare the nodes' clocks with the login node's."""
    ahead = {r["node"]: clock_skew(login.clock, r["clock"], r["reply"]) for r in reports if r.get("clock")}
    results = []
    for node, skew in ahead.items():
        if abs(skew) > MAX_CLOCK_S:
            side = "ahead of" if skew > 0 else "behind"
            message = f"the clock of {node} is {abs(skew):.1f} s {side} the login node's"
            hint = "times in logs are wrong (leases use the file server's clock): ask the administrators to correct it"
            results.append(CheckResult("warning", message, hint))
    if ahead and not results:
        worst = max(abs(skew) for skew in ahead.values())
        results.append(CheckResult("ok", f"clocks of {len(ahead)} nodes agree with the login node's to {worst:.2f} s"))
    return results


def clock_skew(login: Sequence[float], node: Sequence[float], reply: Mapping[str, float | None]) -> float:
    """Seconds that a node's clock is ahead of the login node's.

    Both were compared with the clock of the file system. If each client stamps files with its own clock, that shows nothing, but
    the two messages still bound the skew: none arrives before it is sent.
    """
    skew = node[0] - login[0]
    sent, answered, received = reply["sent"], reply["answered"], reply["received"]
    if sent is None or answered is None or received is None:
        return skew
    return min(max(skew, sent - answered), received - answered)


def check_scratch(reports: Reports) -> list[CheckResult]:
    """Check the folder of temporary files."""
    faults = by_text((r["node"], r["scratch"]) for r in reports if r.get("scratch"))
    hint = "name a folder that can be written there: profile.scratch=DIR"
    return [CheckResult("error", f"temporary files on {nodes}: {why}", hint) for nodes, why in faults]


def check_interfaces(profile: SlurmProfile, reports: Reports) -> list[CheckResult]:
    """Check that the nodes have the profile's network interfaces."""
    if profile.network_interface is None:
        return []
    results = []
    for name in profile.network_interface.split(","):
        lacking = [(r["node"], ", ".join(r["interfaces"])) for r in reports if name not in r.get("interfaces", [name])]
        for nodes, there in by_text(lacking):
            message = f"network_interface={name} is not on {nodes}"
            results.append(CheckResult("error", message, f"profile.network_interface=NAME, one of {there}"))
    return results


def check_devices(profile: SlurmProfile, shape: Shape, reports: Reports) -> list[CheckResult]:
    """Check the number and the health of the GPUs."""
    results: list[CheckResult] = []
    requested = profile.gpus_per_task * shape.tasks_per_node
    seen = [(r["node"], r["gpus"]) for r in reports if r.get("gpus")]
    too_few = by_text((n, f"{g['count']}{_no_cuda(g)}") for n, g in seen if g["count"] < requested)
    for nodes, count in too_few:
        hint = "install a torch for CUDA, load the driver's module, or give the container its GPUs (--nv)"
        message = f"{requested} GPUs were requested on {nodes}, torch sees {count}"
        results.append(CheckResult("error", message, hint))
    too_many = by_text((n, str(g["count"])) for n, g in seen if g["count"] > requested)
    for nodes, count in too_many:
        message = f"torch sees {count} GPUs on {nodes}, {requested} were requested: other jobs may use them as well"
        whole = "request whole nodes (profile.extra.exclusive=true)"
        results.append(
            CheckResult("warning", message, whole if requested else "set profile.gpus_per_task, or device=cpu")
        )
    for nodes, fault in by_text((n, f) for n, g in seen for f in g["faults"]):
        hint = "exclude the node with profile.exclude=NODES, and report it to the administrators"
        results.append(CheckResult("error", f"a device fails on {nodes}: {fault}", hint))
    for node, gpu, number in ((n, gpu, k) for n, g in seen for gpu, k in g["ecc"].items() if k):
        message = f"GPU {gpu} on {node} has {number} uncorrected memory errors since its driver started"
        results.append(CheckResult("error", message, f"profile.exclude={node}, and report it to the administrators"))
    if seen and not results:
        what = f"{requested} GPUs on each of {len(unique(n for n, _ in seen))} nodes" if requested else "CPUs"
        results.append(CheckResult("ok", f"{what} compute correctly"))
    return results


def _no_cuda(gpus: Mapping[str, Any]) -> str:
    if gpus["built_for"] is None:
        return " (it was built without CUDA)"
    return f" ({gpus['cause']})" if gpus["cause"] else ""


def check_sum(profile: SlurmProfile, shape: Shape, reports: Reports) -> list[CheckResult]:
    """Check that the ranks met and that their all-reduce had the right sum."""
    sums = [(r["node"], r["sum"]) for r in reports if r.get("sum")]
    missing = sorted({rank for _, s in sums for rank in s["missing"]})
    faults = [s["fault"] for _, s in sums if s["missing"]] + [s["fault"] for _, s in sums if s["fault"]]
    fault = next((fault for fault in faults if fault), "")
    if fault:
        where = f" ({listed(unique(r['node'] for r in reports if r.get('rank') in missing))})" if missing else ""
        via = f" over {profile.network_interface}" if profile.network_interface else ""
        hint = "profile.network_interface=NAME of a network that connects the nodes (`ip link`)"
        return [CheckResult("error", f"the all-reduce of {shape.tasks} ranks failed{via}: {fault}{where}", hint)]
    if not sums:
        return []
    slowest = max(s["seconds"] for _, s in sums)
    return [CheckResult("ok", f"the all-reduce of {shape.tasks} ranks is right, in {slowest:.1f} s")]
