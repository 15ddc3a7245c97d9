"""Checks of Slurm's answers: pure functions from its output to results."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hpc_c2g.preflight.check_result import CheckResult, has_errors
from hpc_c2g.scheduling.batch_script import Shape
from hpc_c2g.scheduling.profile import SlurmProfile
from hpc_c2g.scheduling.programs import Answer, Record

NEEDED = ("sbatch", "srun", "squeue", "scontrol", "scancel")
USEFUL = {"sacct": "jobs that end without a report", "sacctmgr": "account and qos"}
MEMORY = "MiB of memory"
OTHER_PARTITION = "or name another profile.partition (`sinfo -o '%P %c %m %G'`)"


def check_programs(places: Mapping[str, str | None]) -> list[CheckResult]:
    """Check that Slurm's programs are on PATH; those for accounting are optional."""
    missing = [name for name in NEEDED if not places.get(name)]
    if missing:
        hint = "run this on a login node, or load the module that puts Slurm on PATH"
        return [CheckResult("error", f"not on PATH: {', '.join(missing)}", hint)]
    results = [CheckResult("ok", f"Slurm's programs: {', '.join(NEEDED)}")]
    for name, use in USEFUL.items():
        if not places.get(name):
            message = f"{name} is not on PATH: {use} cannot be checked"
            results.append(CheckResult("unknown", message, "a study runs without it; a module may provide it"))
    return results


def check_variables(environment: Mapping[str, str]) -> list[CheckResult]:
    """Check for environment variables of sbatch, which override the options of a script."""
    harmless = ("SBATCH_EXPORT", "SBATCH_NO_REQUEUE", "SBATCH_REQUEUE", "SBATCH_DEBUG", "SBATCH_IGNORE_PBS")
    overriding = sorted(n for n in environment if n.startswith("SBATCH_") and n not in harmless)
    return [
        CheckResult("warning", f"{name}={environment[name]} overrides the profile", f"unset {name}")
        for name in overriding
    ]


def check_ping(answer: Answer) -> CheckResult:
    """Check that a controller is up."""
    text = " ".join((answer.output or answer.fault).split())
    if answer.code == 0 and "is UP" in answer.output:
        return CheckResult("ok", f"the controller answers: {text}")
    return CheckResult(
        "error", f"the controller does not answer: {text or 'no output'}", "wait, or ask the cluster's administrators"
    )


def check_partitions(profile: SlurmProfile, partitions: Sequence[Record]) -> tuple[list[CheckResult], list[Record]]:
    """Check the profile's partitions; returns the results and the partitions that exist."""
    by_name = {p.get("PartitionName", ""): p for p in partitions}
    known = f"profile.partition=NAME, one of {', '.join(by_name) or 'none'}"
    if not partitions:
        return [CheckResult("unknown", "Slurm shows no partition", "see `sinfo`")], []
    if profile.partition is None:
        default = [p for p in partitions if p.get("Default") == "YES"]
        if not default:
            return [CheckResult("error", "partition=null, and the cluster has no default partition", known)], []
        wanted = [default[0]["PartitionName"]]
    else:
        wanted = profile.partition.split(",")
    results = []
    for name in wanted:
        if name not in by_name:
            close = difflib.get_close_matches(name, by_name, n=1, cutoff=0.5)
            meant = f"did you mean {close[0]}? " if close else ""
            results.append(CheckResult("error", f"partition={name} does not exist", meant + known))
    there = [by_name[name] for name in wanted if name in by_name]
    up = [p["PartitionName"] for p in there if p.get("State") == "UP"]
    for p in there:
        if p["PartitionName"] not in up:
            message = f"partition={p['PartitionName']} is {p.get('State')}: it starts no jobs"
            hint = "wait, or choose another with profile.partition=NAME (`sinfo`)"
            results.append(CheckResult("warning" if up else "error", message, hint))
    if up:
        results.append(CheckResult("ok", f"partition {', '.join(up)} is up"))
    return results, there


def check_limits(profile: SlurmProfile, shape: Shape, partitions: Sequence[Record]) -> list[CheckResult]:
    """Check time and nodes against the partitions' limits. sbatch may accept a job above them, which then never starts."""
    results = []
    longest = [parse_minutes(p.get("MaxTime", "")) for p in partitions]
    if longest and all(m is not None and m < profile.time_minutes for m in longest):
        most = max(m for m in longest if m is not None)
        message = f"time_minutes={profile.time_minutes} is more than {_names(partitions)} allows ({most:g})"
        hint = f"profile.time_minutes={int(most)}: an unfinished run resumes in the next attempt"
        results.append(CheckResult("error", message, hint))
    widest = [int(n) if (n := p.get("MaxNodes", "")).isdecimal() else None for p in partitions]
    if widest and all(w is not None and w < shape.nodes for w in widest):
        most = max(w for w in widest if w is not None)
        message = f"nodes={shape.nodes} is more than {_names(partitions)} allows a job ({most:g})"
        results.append(CheckResult("error", message, f"runs on at most {most:g} nodes, or another partition"))
    return results


def check_array(profile: SlurmProfile, config: Record) -> list[CheckResult]:
    """Check the length of job arrays."""
    longest = config.get("MaxArraySize", "")
    if longest.isdecimal() and profile.max_array > int(longest):
        message = f"max_array={profile.max_array} is more than the cluster's MaxArraySize ({longest})"
        hint = f"profile.max_array={int(longest) - 1}" if int(longest) > 1 else "this cluster has no arrays"
        return [CheckResult("error", message, hint)]
    return []


def check_account(profile: SlurmProfile, enforced: str, rows: Sequence[Sequence[str]]) -> list[CheckResult]:
    """Check that the user has the account and the qos.

    Args:
        profile: Profile with account and qos; None is the user's default.
        enforced: Value of AccountingStorageEnforce.
        rows: Account, partition and qos (comma-separated) of each association of the user.
    """
    status = "error" if enforced.lower() not in ("none", "0", "") else "warning"
    lax = "" if status == "error" else " (Slurm does not enforce it here)"
    if not rows:
        if status == "warning" and profile.account is None and profile.qos is None:
            return []
        hint = "ask the cluster's administrators for an account (`sacctmgr show associations user=$USER`)"
        return [CheckResult(status, f"you have no account on this cluster{lax}", hint)]
    accounts = list(dict.fromkeys(row[0] for row in rows))
    if profile.account is not None and profile.account.lower() not in (a.lower() for a in accounts):
        message = f"account={profile.account} is not one of yours{lax}"
        return [CheckResult(status, message, f"profile.account=NAME, one of {', '.join(accounts)}")]
    own = [r for r in rows if profile.account is None or r[0].lower() == profile.account.lower()]
    qos = list(dict.fromkeys(q for row in own for q in row[2].split(",") if q))
    if profile.qos is not None and profile.qos.lower() not in (q.lower() for q in qos):
        message = f"qos={profile.qos} is not allowed for account {profile.account or ', '.join(accounts)}{lax}"
        return [CheckResult(status, message, f"profile.qos=NAME, one of {', '.join(qos) or 'none'}")]
    text = ", ".join(f"{k} {v}" for k, v in (("account", profile.account), ("qos", profile.qos)) if v)
    return [CheckResult("ok", f"{text or 'default account and qos'}: allowed")]


def check_nodes(
    profile: SlurmProfile,
    shape: Shape,
    partitions: Sequence[Record],
    nodes: Sequence[Record],
    only: Sequence[str] | None = None,
    without: Sequence[str] | None = None,
) -> tuple[list[CheckResult], list[CheckResult]]:
    """Check that enough nodes are large enough, and in service.

    Args:
        profile: Resources of one rank.
        shape: Nodes and ranks of the job.
        partitions: Partitions that the job may run in.
        nodes: Nodes of the cluster.
        only: Nodes that the job must have.
        without: Nodes that it must not have.

    Returns:
        The results about the nodes' size, and those about their state.
    """
    names = {p.get("PartitionName", "") for p in partitions}
    mine = [n for n in nodes if names & set(n.get("Partitions", "").split(","))]
    unknown = sorted(set(only or ()) - {n.get("NodeName", "") for n in mine})
    if unknown:
        message = f"nodelist={profile.nodelist}: {', '.join(unknown)} is not in {_names(partitions)}"
        return [CheckResult("error", message, "profile.nodelist=null leaves the choice to Slurm")], []
    mine = [n for n in mine if n.get("NodeName") not in set(without or ())]
    if not mine:
        return [], [CheckResult("unknown", f"Slurm shows no node of {_names(partitions)}", "see `sinfo -N`")]
    requested = _requested(profile, shape)
    available = {n["NodeName"]: _available(n, profile.gpu_type) for n in mine}
    lacking = []
    for resource, (amount, terms) in requested.items():
        most = max(node[resource] for node in available.values())
        if amount > most:
            message = f"the profile asks for {amount} {resource} on a node ({terms}), a node of {_names(partitions)} has at most {most}"
            lacking.append(
                CheckResult("error", message, _smaller_request(resource, most, amount // shape.tasks_per_node))
            )
    if lacking:
        return lacking, []
    fitting = [n for n in mine if all(available[n["NodeName"]][r] >= amount for r, (amount, _) in requested.items())]
    wanted = ", ".join(f"{amount} {resource}" for resource, (amount, _) in requested.items())
    if len(fitting) < shape.nodes:
        message = f"{len(fitting)} nodes of {_names(partitions)} have {wanted}, {shape.nodes} are asked for"
        return [
            CheckResult("error", message, "ask for less per rank, fewer nodes, or name another profile.partition")
        ], []
    out = [n for n in fitting if not in_service(n.get("State", ""))]
    if len(fitting) - len(out) < shape.nodes:
        some = ", ".join(f"{n['NodeName']} {n.get('State', '?').lower()}" for n in out[:5])
        message = (
            f"{len(fitting) - len(out)} of {len(fitting)} nodes with {wanted} are in service,"
            f" {shape.nodes} needed: {some}{', ...' if len(out) > 5 else ''}"
        )
        hint = "wait until they return (`sinfo -R` shows the reasons), or name another profile.partition"
        return [], [CheckResult("error", message, hint)]
    return [], [CheckResult("ok", f"{len(fitting) - len(out)} nodes in service have {wanted}")]


def combine_results(
    results: Sequence[CheckResult], size_results: Sequence[CheckResult], accepted: bool | None, text: str
) -> list[CheckResult]:
    """Combine the results with sbatch's answer, which overrides those about the nodes' size.

    Args:
        results: Results other than those about the nodes' size.
        size_results: Results about the nodes' size.
        accepted: True if sbatch accepts the script, None if it did not answer.
        text: Answer of sbatch.
    """
    if accepted:
        size_results = [
            replace(r, status="unknown", message=f"{r.message}; but sbatch accepts it") for r in size_results
        ]
        return [*results, *size_results, CheckResult("ok", f"sbatch accepts the script: {text}")]
    results = [*results, *size_results]
    if accepted is None:
        return [*results, CheckResult("unknown", text, "try again when the cluster is less busy")]
    if not has_errors(results):  # else the same fault would be reported twice
        hint = "correct the profile (profile.FIELD=VALUE); `sinfo -o '%P %c %m %G %l %f'` shows what there is"
        results.append(CheckResult("error", f"sbatch refuses the script: {text}", hint))
    return results


def in_service(state: str) -> bool:
    """Return True if a node of this state (such as ``IDLE+DRAIN`` or ``DOWN*``) accepts jobs, now or after others."""
    out = {"DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING", "NOT_RESPONDING", "ERROR", "UNKNOWN", "FUTURE"}
    out |= {"INVAL", "INVALID_REG", "POWERING_DOWN"}
    return "*" not in state and not out & set(re.split(r"[^A-Z_]+", state.upper()))


def parse_minutes(text: str) -> float | None:
    """Minutes of ``2-12:00:00``, ``01:30:00`` or ``30:00``; None for no limit or no time."""
    parts = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not parts:
        return None
    days, hours, minute, second = (int(p or 0) for p in parts.groups())
    return days * 1440 + hours * 60 + minute + second / 60


def count_gpus(gres: str, kind: str | None = None) -> int:
    """Number of GPUs in ``gpu:a100:4(S:0-1),gpu:v100:2``, of one type or of all."""
    found = re.findall(r"(?:^|,)gpu(?::([^:(),]+))?:(\d+)(?=[(,]|$)", gres)
    return sum(int(number) for name, number in found if kind is None or name.lower() == kind.lower())


def _requested(profile: SlurmProfile, shape: Shape) -> dict[str, tuple[int, str]]:
    """Amount of each resource on a node, and the terms that it is the product of."""
    ranks = shape.tasks_per_node
    requested = {"CPUs": (profile.cpus_per_task * ranks, f"cpus_per_task={profile.cpus_per_task} x {ranks} ranks")}
    if profile.mem_gb:
        requested[MEMORY] = (int(profile.mem_gb * ranks * 1024), f"mem_gb={profile.mem_gb:g} x {ranks} ranks")
    if profile.gpus_per_task:
        kind = f" of type {profile.gpu_type}" if profile.gpu_type else ""
        requested["GPUs"] = (
            profile.gpus_per_task * ranks,
            f"gpus_per_task={profile.gpus_per_task} x {ranks} ranks{kind}",
        )
    return requested


def _smaller_request(resource: str, most: int, each: int) -> str:
    """Hint for a node that has ``most`` of a resource of which a rank requests ``each``."""
    if most >= each:
        return f"tasks_per_node={most // each} at most, {OTHER_PARTITION}"
    fields = {
        "CPUs": f"profile.cpus_per_task={most} at most",
        MEMORY: f"profile.mem_gb={int(most / 102.4) / 10} at most (0 takes all of the node)",
        "GPUs": f"profile.gpus_per_task={most} at most",
    }
    return f"{fields[resource]}, {OTHER_PARTITION}"


def _available(node: Record, gpu_type: str | None) -> dict[str, int]:
    def number(key: str) -> int:
        return int(node[key]) if node.get(key, "").isdecimal() else 0

    cpus = number("CPUEfctv") or number("CPUTot")
    return {"CPUs": cpus, MEMORY: number("RealMemory"), "GPUs": count_gpus(node.get("Gres", ""), gpu_type)}


def _names(partitions: Sequence[Record]) -> str:
    return ",".join(p.get("PartitionName", "?") for p in partitions)
