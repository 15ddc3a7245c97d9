"""What Slurm's answers mean for a study: pure functions from what it said to findings."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hpc_c2g.preflight.check_result import CheckResult, wrong
from hpc_c2g.scheduling.batch_script import Shape
from hpc_c2g.scheduling.profile import SlurmProfile
from hpc_c2g.scheduling.programs import Answer, Record

NEEDED = ("sbatch", "srun", "squeue", "scontrol", "scancel")
USEFUL = {"sacct": "jobs that end without a word", "sacctmgr": "account and qos"}
MEMORY = "MiB of memory"
ELSEWHERE = "or name another profile.partition (`sinfo -o '%P %c %m %G'`)"


def check_programs(places: Mapping[str, str | None]) -> list[CheckResult]:
    """Where each program is; accounting is useful, the others are needed."""
    missing = [name for name in NEEDED if not places.get(name)]
    if missing:
        hint = "run this on a login node; a module may bring Slurm into PATH"
        return [CheckResult("error", f"not on PATH: {', '.join(missing)}", hint)]
    found = [CheckResult("ok", f"Slurm's programs: {', '.join(NEEDED)}")]
    for name, use in USEFUL.items():
        if not places.get(name):
            what = f"{name} is not on PATH: {use} cannot be looked up"
            found.append(CheckResult("unknown", what, "a study runs without it; a module may bring it"))
    return found


def check_variables(environment: Mapping[str, str]) -> list[CheckResult]:
    """Variables of sbatch, which go before what stands in a script."""
    harmless = ("SBATCH_EXPORT", "SBATCH_NO_REQUEUE", "SBATCH_REQUEUE", "SBATCH_DEBUG", "SBATCH_IGNORE_PBS")
    strange = sorted(n for n in environment if n.startswith("SBATCH_") and n not in harmless)
    return [
        CheckResult("warning", f"{name}={environment[name]} goes before the profile", f"unset {name}")
        for name in strange
    ]


def check_ping(answer: Answer) -> CheckResult:
    """Whether a controller is up."""
    said = " ".join((answer.output or answer.fault).split())
    if answer.code == 0 and "is UP" in answer.output:
        return CheckResult("ok", f"the controller answers: {said}")
    return CheckResult(
        "error", f"the controller does not answer: {said or 'no word'}", "wait, or tell the cluster's administrators"
    )


def check_partitions(profile: SlurmProfile, partitions: Sequence[Record]) -> tuple[list[CheckResult], list[Record]]:
    """(findings, the profile's partitions that exist)."""
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
    found = []
    for name in wanted:
        if name not in by_name:
            close = difflib.get_close_matches(name, by_name, n=1, cutoff=0.5)
            meant = f"did you mean {close[0]}? " if close else ""
            found.append(CheckResult("error", f"partition={name} does not exist", meant + known))
    there = [by_name[name] for name in wanted if name in by_name]
    up = [p["PartitionName"] for p in there if p.get("State") == "UP"]
    for p in there:
        if p["PartitionName"] not in up:
            what = f"partition={p['PartitionName']} is {p.get('State')}: it starts no jobs"
            hint = "wait, or choose another with profile.partition=NAME (`sinfo`)"
            found.append(CheckResult("warning" if up else "error", what, hint))
    if up:
        found.append(CheckResult("ok", f"partition {', '.join(up)} is up"))
    return found, there


def check_limits(profile: SlurmProfile, shape: Shape, partitions: Sequence[Record]) -> list[CheckResult]:
    """Limits of partitions. sbatch may take a job above them, which then waits for ever."""
    found = []
    longest = [minutes(p.get("MaxTime", "")) for p in partitions]
    if longest and all(m is not None and m < profile.time_minutes for m in longest):
        most = max(m for m in longest if m is not None)
        what = f"time_minutes={profile.time_minutes} is more than {_names(partitions)} allows ({most:g})"
        hint = f"profile.time_minutes={int(most)}: a run that is not done goes on in the next attempt"
        found.append(CheckResult("error", what, hint))
    widest = [int(n) if (n := p.get("MaxNodes", "")).isdecimal() else None for p in partitions]
    if widest and all(w is not None and w < shape.nodes for w in widest):
        most = max(w for w in widest if w is not None)
        what = f"nodes={shape.nodes} is more than {_names(partitions)} allows a job ({most:g})"
        found.append(CheckResult("error", what, f"runs on at most {most:g} nodes, or another partition"))
    return found


def check_array(profile: SlurmProfile, config: Record) -> list[CheckResult]:
    """Whether arrays as long as the profile's may be submitted."""
    longest = config.get("MaxArraySize", "")
    if longest.isdecimal() and profile.max_array > int(longest):
        what = f"max_array={profile.max_array} is more than the cluster's MaxArraySize ({longest})"
        hint = f"profile.max_array={int(longest) - 1}" if int(longest) > 1 else "this cluster has no arrays"
        return [CheckResult("error", what, hint)]
    return []


def check_account(profile: SlurmProfile, enforced: str, rows: Sequence[Sequence[str]]) -> list[CheckResult]:
    """Whether the user may charge the account and use the qos.

    Args:
        profile: with the account and the qos; None is the user's default.
        enforced: AccountingStorageEnforce.
        rows: (account, partition, qos with commas) of each of the user's associations.
    """
    level = "error" if enforced.lower() not in ("none", "0", "") else "warning"
    lax = "" if level == "error" else " (Slurm does not enforce it here)"
    if not rows:
        if level == "warning" and profile.account is None and profile.qos is None:
            return []
        hint = "ask the cluster's administrators for an account (`sacctmgr show associations user=$USER`)"
        return [CheckResult(level, f"you have no account on this cluster{lax}", hint)]
    accounts = list(dict.fromkeys(row[0] for row in rows))
    if profile.account is not None and profile.account.lower() not in (a.lower() for a in accounts):
        what = f"account={profile.account} is none of yours{lax}"
        return [CheckResult(level, what, f"profile.account=NAME, one of {', '.join(accounts)}")]
    own = [r for r in rows if profile.account is None or r[0].lower() == profile.account.lower()]
    qos = list(dict.fromkeys(q for row in own for q in row[2].split(",") if q))
    if profile.qos is not None and profile.qos.lower() not in (q.lower() for q in qos):
        what = f"qos={profile.qos} is not allowed for account {profile.account or ', '.join(accounts)}{lax}"
        return [CheckResult(level, what, f"profile.qos=NAME, one of {', '.join(qos) or 'none'}")]
    told = ", ".join(f"{k} {v}" for k, v in (("account", profile.account), ("qos", profile.qos)) if v)
    return [CheckResult("ok", f"{told or 'account and qos by default'}: yours")]


def check_nodes(
    profile: SlurmProfile,
    shape: Shape,
    partitions: Sequence[Record],
    nodes: Sequence[Record],
    only: Sequence[str] | None = None,
    without: Sequence[str] | None = None,
) -> tuple[list[CheckResult], list[CheckResult]]:
    """(what the nodes do not have, who of those that have it is out of service).

    Args:
        profile: what one rank asks for.
        shape: how many ranks there are.
        partitions: that the job may run in.
        nodes: of the cluster.
        only: nodes that the job must have.
        without: nodes that it must not have.
    """
    names = {p.get("PartitionName", "") for p in partitions}
    mine = [n for n in nodes if names & set(n.get("Partitions", "").split(","))]
    unknown = sorted(set(only or ()) - {n.get("NodeName", "") for n in mine})
    if unknown:
        what = f"nodelist={profile.nodelist}: {', '.join(unknown)} is not in {_names(partitions)}"
        return [CheckResult("error", what, "profile.nodelist=null leaves the choice to Slurm")], []
    mine = [n for n in mine if n.get("NodeName") not in set(without or ())]
    if not mine:
        return [], [CheckResult("unknown", f"Slurm shows no node of {_names(partitions)}", "see `sinfo -N`")]
    asked = _asked(profile, shape)
    has = {n["NodeName"]: _has(n, profile.gpu_type) for n in mine}
    lacking = []
    for thing, (amount, reckoning) in asked.items():
        most = max(h[thing] for h in has.values())
        if amount > most:
            what = f"the profile asks for {amount} {thing} on a node ({reckoning}), a node of {_names(partitions)} has at most {most}"
            lacking.append(CheckResult("error", what, _less(thing, most, amount // shape.tasks_per_node)))
    if lacking:
        return lacking, []
    fitting = [n for n in mine if all(has[n["NodeName"]][t] >= amount for t, (amount, *_) in asked.items())]
    wish = ", ".join(f"{amount} {thing}" for thing, (amount, *_) in asked.items())
    if len(fitting) < shape.nodes:
        what = f"{len(fitting)} nodes of {_names(partitions)} have {wish} together, {shape.nodes} are asked for"
        return [CheckResult("error", what, "ask for less per rank, fewer nodes, or name another profile.partition")], []
    out = [n for n in fitting if not in_service(n.get("State", ""))]
    if len(fitting) - len(out) < shape.nodes:
        some = ", ".join(f"{n['NodeName']} {n.get('State', '?').lower()}" for n in out[:5])
        what = (
            f"{len(fitting) - len(out)} of {len(fitting)} nodes with {wish} are in service,"
            f" {shape.nodes} needed: {some}{', ...' if len(out) > 5 else ''}"
        )
        hint = "wait until they return (`sinfo -R` tells why they are away), or name another profile.partition"
        return [], [CheckResult("error", what, hint)]
    return [], [CheckResult("ok", f"{len(fitting) - len(out)} nodes in service have {wish}")]


def settled(
    found: Sequence[CheckResult], hardware: Sequence[CheckResult], taken: bool | None, words: str
) -> list[CheckResult]:
    """All findings, sbatch having the last word: on what nodes have, whatever was reckoned; on everything, where it refuses."""
    if taken:
        # our reading of the nodes was wrong
        hardware = [replace(f, status="unknown", message=f"{f.message}; but sbatch takes it") for f in hardware]
        return [*found, *hardware, CheckResult("ok", f"sbatch takes the script: {words}")]
    found = [*found, *hardware]
    if taken is None:
        return [*found, CheckResult("unknown", words, "try again when the cluster is less busy")]
    if not wrong(found):  # else one fault would be told twice
        hint = "correct the profile (profile.FIELD=VALUE); `sinfo -o '%P %c %m %G %l %f'` tells what there is"
        found.append(CheckResult("error", f"sbatch refuses the script: {words}", hint))
    return found


def in_service(state: str) -> bool:
    """Whether a node of this state (``IDLE+DRAIN``, ``DOWN*``) takes jobs, now or after others."""
    away = {"DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING", "NOT_RESPONDING", "ERROR", "UNKNOWN", "FUTURE"}
    away |= {"INVAL", "INVALID_REG", "POWERING_DOWN"}
    return "*" not in state and not away & set(re.split(r"[^A-Z_]+", state.upper()))


def minutes(text: str) -> float | None:
    """Of ``2-12:00:00``, ``01:30:00`` or ``30:00``; None for no limit or no time."""
    parts = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not parts:
        return None
    days, hours, minute, second = (int(p or 0) for p in parts.groups())
    return days * 1440 + hours * 60 + minute + second / 60


def gpus(gres: str, kind: str | None = None) -> int:
    """How many GPUs ``gpu:a100:4(S:0-1),gpu:v100:2`` are, of one kind or of all."""
    found = re.findall(r"(?:^|,)gpu(?::([^:(),]+))?:(\d+)(?=[(,]|$)", gres)
    return sum(int(number) for name, number in found if kind is None or name.lower() == kind.lower())


def _asked(profile: SlurmProfile, shape: Shape) -> dict[str, tuple[int, str]]:
    """thing -> (how much on a node, how that was reckoned)."""
    ranks = shape.tasks_per_node
    asked = {"CPUs": (profile.cpus_per_task * ranks, f"cpus_per_task={profile.cpus_per_task} x {ranks} ranks")}
    if profile.mem_gb:
        asked[MEMORY] = (int(profile.mem_gb * ranks * 1024), f"mem_gb={profile.mem_gb:g} x {ranks} ranks")
    if profile.gpus_per_task:
        kind = f" of type {profile.gpu_type}" if profile.gpu_type else ""
        asked["GPUs"] = (profile.gpus_per_task * ranks, f"gpus_per_task={profile.gpus_per_task} x {ranks} ranks{kind}")
    return asked


def _less(thing: str, most: int, each: int) -> str:
    """What to ask for where a node has ``most`` and a rank wants ``each``."""
    if most >= each:
        return f"tasks_per_node={most // each} at most, {ELSEWHERE}"
    fields = {
        "CPUs": f"profile.cpus_per_task={most} at most",
        MEMORY: f"profile.mem_gb={int(most / 102.4) / 10} at most (0 takes all of the node)",
        "GPUs": f"profile.gpus_per_task={most} at most",
    }
    return f"{fields[thing]}, {ELSEWHERE}"


def _has(node: Record, gpu_type: str | None) -> dict[str, int]:
    def number(key: str) -> int:
        return int(node[key]) if node.get(key, "").isdecimal() else 0

    cpus = number("CPUEfctv") or number("CPUTot")
    return {"CPUs": cpus, MEMORY: number("RealMemory"), "GPUs": gpus(node.get("Gres", ""), gpu_type)}


def _names(partitions: Sequence[Record]) -> str:
    return ",".join(p.get("PartitionName", "?") for p in partitions)
