"""What the ranks of the doctor's job told, and what became of those that told nothing, as findings. Pure: nothing here looks anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpc_c2g.preflight.check_result import CheckResult
from hpc_c2g.scheduling.batch_script import Shape
from hpc_c2g.scheduling.profile import SlurmProfile

CLOCK_SECONDS, SLOW_FILES, SLOW_IMPORT = 2.0, 15.0, 60.0
"""Above these a warning is given."""
SHOWN = 5
NO_LOG = "Slurmd could not connect IO"
"""What srun says where a node cannot open a task's log."""
SHARE = "choose a folder that all nodes share, or have it mounted with a shorter cache (NFS: actimeo=10)"
NO_SCRIPT_LOG = "0:53"
"""Exit code and signal of a job whose script's log cannot be opened."""
BUSY = ("Priority", "Resources", "None", "BeginTime", "")
REASONS = {
    r"DOWN|ReqNodeNotAvail|UnavailableNodes": "see `sinfo -R`: wait until the nodes return, or name another profile.partition",
    r"PartitionTimeLimit": "lower profile.time_minutes",
    r"PartitionNodeLimit|PartitionConfig": "ask for fewer nodes, or name another profile.partition",
    r"PartitionDown|PartitionInactive": "wait, or name another profile.partition",
    r"Held": "see `scontrol show job`; `scontrol release` where you may",
    r"Reserv": "wait, or correct profile.extra.reservation",
    r"QOS|Assoc|MaxCpu|GrpTRES|Account": "a limit of your account or qos: end other jobs, or name another profile.qos",
    r"License": "wait for licences",
    r"BadConstraints": "correct profile.constraint",
}
FAULTS = {
    r"No module named": "install it in the environment of profile.python, or load what brings it by profile.modules or setup",
    r"mkdir": "name another profile.scratch",
    r"\bmodule\b|[Ll]mod": "correct profile.modules (`module avail` on a node)",
    r"[Kk]illed|oom|[Oo]ut [Oo]f [Mm]emory": "raise profile.mem_gb",
    r"execve|[Nn]o such file|not found": "profile.python, container and setup must exist on the nodes",
}


@dataclass(frozen=True)
class Job:
    """What became of the doctor's job.

    Attributes:
        id: its number.
        state: Slurm's last word, such as COMPLETED.
        reason: Slurm's, for waiting or for failing.
        code: exit code and signal, ``0:53``.
        nodes: that it ran on, in order.
        batch_host: node of its script.
        waited: seconds that it waited for its start; None where it started.
        errors: per rank, the last line that tells a fault in its log.
        launch: per rank that did not start, why.
        shell_ok: whether its shell ended well, the epilog last; None where something else ended the job.
        logs: their folder.
    """

    id: str
    state: str
    reason: str = ""
    code: str = ""
    nodes: tuple[str, ...] = ()
    batch_host: str = ""
    waited: float | None = None
    errors: Mapping[int, str] = field(default_factory=dict)
    launch: Mapping[int, str] = field(default_factory=dict)
    shell_ok: bool | None = None
    logs: str = ""

    def node(self, rank: int, shape: Shape) -> str:
        """Of a rank: they are laid out in blocks."""
        index = rank // shape.tasks_per_node
        return self.nodes[index] if index < len(self.nodes) else "?"


@dataclass(frozen=True)
class Login:
    """The same of the login node.

    Attributes:
        versions: as ``node_probe.versions``.
        clock: as ``node_probe.clock_offset``.
    """

    versions: Mapping[str, str]
    clock: tuple[float, float] = (0.0, 0.0)


def judge(
    profile: SlurmProfile, shape: Shape, folder: str, job: Job, login: Login, reports: Sequence[Mapping[str, Any]]
) -> list[CheckResult]:
    """All findings; ``reports`` may be incomplete, ``folder`` is the study's."""
    if job.waited is not None:
        return [check_wait(job)]
    blocked = check_silence(shape, folder, job, reports)
    found = [*blocked, *check_files(folder, reports), *check_versions(login, reports), *check_clocks(login, reports)]
    found += check_scratch(reports) + check_devices(profile, shape, reports)
    network = check_interfaces(profile, reports)
    found += network
    if not any(f.status == "error" for f in (*blocked, *network)):  # else one fault would be told twice
        found += check_sum(profile, shape, reports)
    return found


def check_wait(job: Job) -> CheckResult:
    """Why the job did not start in time. A busy cluster is no fault, but then nothing was seen of the nodes."""
    level = "unknown" if job.reason in BUSY else "error"
    busy = "the cluster is busy: try again with a longer wait=SECONDS, see `squeue --start`"
    hint = busy if level == "unknown" else _mend(REASONS, job.reason, "see `sinfo` and `scontrol show job`")
    reason = job.reason if job.reason not in ("None", "") else "no reason given"
    what = f"the job did not start within {job.waited:.0f} s, Slurm says: {reason}; it was cancelled"
    return CheckResult(level, what, hint)


def check_silence(shape: Shape, folder: str, job: Job, reports: Sequence[Mapping[str, Any]]) -> list[CheckResult]:
    """Ranks that told nothing, or did not come to their end."""
    if job.code == NO_SCRIPT_LOG:
        return [_unwritable(folder, [job.batch_host or "?"])]
    found = []
    nodes = _unique(job.node(rank, shape) for rank, why in job.launch.items() if NO_LOG in why)
    if nodes:
        found.append(_unwritable(folder, nodes))
    told = {r["rank"] for r in reports if r.get("rank") is not None}
    early = [r for r in reports if r.get("rank") is None]  # they do not know yet who they are
    silent = [rank for rank in range(shape.tasks) if rank not in told and NO_LOG not in job.launch.get(rank, "")]
    silent = [] if len(silent) <= len(early) else silent
    causes = {rank: job.launch.get(rank) or job.errors.get(rank, "") for rank in silent}
    for cause in _unique(causes.values()):
        ranks = [rank for rank in silent if causes[rank] == cause]
        who = f"rank {_some(ranks)} of {shape.tasks} on {_some(_unique(job.node(r, shape) for r in ranks))}"
        if not cause and job.state == "COMPLETED":
            what = f"{who} ended well, but what it wrote into study_dir={folder} does not arrive here"
            found.append(CheckResult("error", what, SHARE))
            continue
        why = cause or f"the job ended as {job.state} {job.code}".rstrip()
        found.append(CheckResult("error", f"{who} told nothing: {why}", _mend(FAULTS, why, f"see {job.logs}")))
    for node, why in _by_text((r["node"], r["stopped"]) for r in reports if r.get("stopped")):
        what = f"the package cannot be used on {node}: {why}"
        found.append(CheckResult("error", what, _mend(FAULTS, why, f"see {job.logs}")))
    stuck = [r for r in reports if r.get("part") != "done" and not nodes]  # else they waited for those in vain
    for part in _unique(str(r.get("part")) for r in stuck):
        here = [r for r in stuck if str(r.get("part")) == part]
        ranks = [r["rank"] for r in here if r.get("rank") is not None]
        who = (f"rank {_some(ranks)} on " if ranks else "") + _some(_unique(r["node"] for r in here))
        why = next((job.errors[rank] for rank in ranks if rank in job.errors), f"the job ended as {job.state}")
        what = f"the checks of {who} did not get through the part {part!r}: {why}"
        found.append(CheckResult("error", what, _mend(FAULTS, why, f"see {job.logs}")))
    if job.shell_ok is False and not found:
        why = job.errors.get(0, f"exit code {job.code}")
        what = f"the job's shell could not run what follows the ranks, outside of any container: {why}"
        hint = f"profile.python must have the package without profile.container, too; see {job.logs}"
        found.append(CheckResult("error", what, hint))
    return found


def _unwritable(folder: str, nodes: Sequence[str]) -> CheckResult:
    what = f"study_dir={folder} cannot be written from {_some(nodes)}: ranks could not open their logs there"
    return CheckResult("error", what, f"choose a folder that all nodes share, or profile.exclude={','.join(nodes)}")


def check_files(folder: str, reports: Sequence[Mapping[str, Any]]) -> list[CheckResult]:
    """Whether what one side writes reaches the other, and how soon."""
    replies = [(r["node"], r["reply"]) for r in reports if r.get("reply")]
    lost = _unique(node for node, reply in replies if reply["got"] is None)
    if lost:
        what = f"files in study_dir={folder} do not arrive: {_some(lost)} greeted, and did not see the answer in time"
        return [CheckResult("error", what, SHARE)]
    if not replies:
        return []
    slowest, node = max((reply["got"] - reply["sent"], node) for node, reply in replies)
    if slowest > SLOW_FILES:
        what = f"files in study_dir={folder} arrive late: {node} had its answer after {slowest:.0f} s"
        return [CheckResult("warning", what, "states are told that much too late; nothing is lost")]
    many = len(_unique(node for node, _ in replies))
    return [CheckResult("ok", f"{many} nodes read and write study_dir={folder}: an answer takes {slowest:.1f} s")]


def check_versions(login: Login, reports: Sequence[Mapping[str, Any]]) -> list[CheckResult]:
    """Whether the nodes have the login node's versions."""
    found = []
    for name, own in login.versions.items():
        pairs = ((r["node"], str(r["versions"].get(name))) for r in reports if r.get("versions"))
        for nodes, theirs in _by_text(pairs):
            if theirs != own:
                level = "error" if name in ("hpc_c2g", "code") or theirs == "missing" else "warning"
                what = f"{name} is {theirs} on {nodes}, {own} on the login node"
                hint = "use one environment for both: profile.python, modules, container"
                found.append(CheckResult(level, what, hint))
    if not found and any(r.get("versions") for r in reports):
        found.append(CheckResult("ok", f"versions as here: {', '.join(f'{k} {v}' for k, v in login.versions.items())}"))
    took = max(((r["took"]["import"], r["node"]) for r in reports if "import" in r.get("took", {})), default=(0.0, ""))
    if took[0] > SLOW_IMPORT:
        what = f"the import takes {took[0]:.0f} s on {took[1]}, before every run"
        found.append(CheckResult("warning", what, "put the environment into a container, or on a faster file system"))
    return found


def check_clocks(login: Login, reports: Sequence[Mapping[str, Any]]) -> list[CheckResult]:
    """Clocks of nodes against the login node's."""
    ahead = {r["node"]: clock_skew(login.clock, r["clock"], r["reply"]) for r in reports if r.get("clock")}
    found = []
    for node, skew in ahead.items():
        if abs(skew) > CLOCK_SECONDS:
            side = "ahead of" if skew > 0 else "behind"
            what = f"the clock of {node} is {abs(skew):.1f} s {side} the login node's"
            hint = (
                "leases survive it, they use the file server's clock; times in logs are wrong: tell the administrators"
            )
            found.append(CheckResult("warning", what, hint))
    if ahead and not found:
        worst = max(abs(skew) for skew in ahead.values())
        found.append(
            CheckResult("ok", f"clocks of {len(ahead)} nodes agree with the login node's within {worst:.2f} s")
        )
    return found


def clock_skew(login: Sequence[float], node: Sequence[float], reply: Mapping[str, float | None]) -> float:
    """Seconds that a node's clock is ahead.

    Both were compared with the file system's clock. Where that is the clock of whoever writes, the two messages still bound it: none
    arrives before it is sent.
    """
    skew = node[0] - login[0]
    sent, given, got = reply["sent"], reply["given"], reply["got"]
    if sent is None or given is None or got is None:
        return skew
    return min(max(skew, sent - given), got - given)


def check_scratch(reports: Sequence[Mapping[str, Any]]) -> list[CheckResult]:
    """Folders for temporary files."""
    faults = _by_text((r["node"], r["scratch"]) for r in reports if r.get("scratch"))
    hint = "name a folder that can be written there: profile.scratch=DIR"
    return [CheckResult("error", f"temporary files on {nodes}: {why}", hint) for nodes, why in faults]


def check_interfaces(profile: SlurmProfile, reports: Sequence[Mapping[str, Any]]) -> list[CheckResult]:
    """Whether the profile's network is there."""
    if profile.network_interface is None:
        return []
    found = []
    for name in profile.network_interface.split(","):
        lacking = [(r["node"], ", ".join(r["interfaces"])) for r in reports if name not in r.get("interfaces", [name])]
        for nodes, there in _by_text(lacking):
            what = f"network_interface={name} is not on {nodes}"
            found.append(CheckResult("error", what, f"profile.network_interface=NAME, one of {there}"))
    return found


def check_devices(profile: SlurmProfile, shape: Shape, reports: Sequence[Mapping[str, Any]]) -> list[CheckResult]:
    """Number and health of GPUs."""
    found: list[CheckResult] = []
    asked = profile.gpus_per_task * shape.tasks_per_node
    seen = [(r["node"], r["gpus"]) for r in reports if r.get("gpus")]
    few = [(n, g) for n, g in seen if g["count"] < asked]
    for nodes, cause in _by_text((n, f"{g['count']}{_no_gpu(g)}") for n, g in few):
        hint = "install a torch for CUDA, load the driver's module, or give the container its GPUs (--nv)"
        found.append(CheckResult("error", f"{asked} GPUs were asked for on {nodes}, torch sees {cause}", hint))
    many = _by_text((n, str(g["count"])) for n, g in seen if g["count"] > asked)
    for nodes, count in many:
        what = f"torch sees {count} GPUs on {nodes}, {asked} were asked for: others' jobs may use them as well"
        hint = (
            "take whole nodes (profile.extra.exclusive=true)" if asked else "set profile.gpus_per_task, or device=cpu"
        )
        found.append(CheckResult("warning", what, hint))
    for nodes, fault in _by_text((n, f) for n, g in seen for f in g["faults"]):
        hint = "leave out what is broken with profile.exclude=NODES, and tell the administrators"
        found.append(CheckResult("error", f"a device fails on {nodes}: {fault}", hint))
    for node, gpu, number in ((n, gpu, k) for n, g in seen for gpu, k in g["ecc"].items() if k):
        what = f"GPU {gpu} on {node} has {number} uncorrected memory errors since its driver started"
        found.append(CheckResult("error", what, f"profile.exclude={node}, and tell the administrators"))
    if seen and not found:
        told = f"{asked} GPUs on each of {len(_unique(n for n, _ in seen))} nodes" if asked else "processors"
        found.append(CheckResult("ok", f"{told} compute right"))
    return found


def _no_gpu(gpus: Mapping[str, Any]) -> str:
    if gpus["built_for"] is None:
        return " (it was built without CUDA)"
    return f" ({gpus['cause']})" if gpus["cause"] else ""


def check_sum(profile: SlurmProfile, shape: Shape, reports: Sequence[Mapping[str, Any]]) -> list[CheckResult]:
    """Whether the ranks met and added up."""
    sums = [(r["node"], r["sum"]) for r in reports if r.get("sum")]
    missing = sorted({rank for _, s in sums for rank in s["missing"]})
    fault = next((s["fault"] for _, s in sums if s["missing"]), "") or next(
        (s["fault"] for _, s in sums if s["fault"]), ""
    )
    if fault:
        here = f" ({_some(_unique(r['node'] for r in reports if r.get('rank') in missing))})" if missing else ""
        hint = "profile.network_interface=NAME of a network that joins the nodes (`ip link`)"
        also = f" over {profile.network_interface}" if profile.network_interface else ""
        return [CheckResult("error", f"{shape.tasks} ranks could not add up{also}: {fault}{here}", hint)]
    if not sums:
        return []
    took = max(s["seconds"] for _, s in sums)
    return [CheckResult("ok", f"{shape.tasks} ranks met and added up right in {took:.1f} s")]


def _mend(patterns: Mapping[str, str], text: str, otherwise: str) -> str:
    return next((hint for pattern, hint in patterns.items() if re.search(pattern, text)), otherwise)


def _by_text(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(nodes, text) for each text, each node once."""
    nodes: dict[str, list[str]] = {}
    for node, text in pairs:
        nodes.setdefault(text, []).append(node)
    return [(_some(_unique(some)), text) for text, some in nodes.items()]


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))


def _some(items: Sequence[object]) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(map(str, items[:SHOWN])) + more
