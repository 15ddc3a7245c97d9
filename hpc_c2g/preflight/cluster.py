"""What would stop a study on a cluster, as far as the login node can tell: the questions to Slurm."""

from __future__ import annotations

import os
import pwd
import shutil
from pathlib import Path

from hpc_c2g.errors import UserError
from hpc_c2g.preflight.check_result import CheckResult, wrong
from hpc_c2g.preflight.cluster_checks import (
    NEEDED,
    USEFUL,
    check_account,
    check_array,
    check_limits,
    check_nodes,
    check_partitions,
    check_ping,
    check_programs,
    check_variables,
    settled,
)
from hpc_c2g.scheduling.batch_script import Shape, sbatch_text
from hpc_c2g.scheduling.profile import SlurmProfile
from hpc_c2g.scheduling.programs import TIMEOUT_S, Record, query, records, settings
from hpc_c2g.scheduling.sbatch import check_script


def check_slurm(
    profile: SlurmProfile, shape: Shape, folder: Path, seconds: float = TIMEOUT_S
) -> tuple[list[CheckResult], bool]:
    """(all that the login node can ask, whether a job that is submitted now may start at all).

    Args:
        profile: of the cluster.
        shape: of one run.
        folder: of the study.
        seconds: after which a program counts as not answered.
    """
    found = check_programs({name: shutil.which(name) for name in (*NEEDED, *USEFUL)})
    found += check_variables(os.environ)
    if wrong(found):
        return found, False
    found.append(check_ping(query("scontrol", "ping", seconds=seconds)))
    if wrong(found):
        return found, False
    config = settings(query("scontrol", "show", "config", seconds=seconds).output)
    partitions = records(query("scontrol", "-a", "-o", "show", "partition", seconds=seconds).output)
    named, chosen = check_partitions(profile, partitions)
    found += named
    found += check_limits(profile, shape, chosen) + check_array(profile, config)
    found += _account(profile, config, seconds)
    hardware: list[CheckResult] = []
    service: list[CheckResult] = []
    if chosen:
        nodes = records(query("scontrol", "-a", "-o", "show", "node", seconds=seconds).output)
        hosts = {name: _hosts(getattr(profile, name), seconds) for name in ("nodelist", "exclude")}
        hardware, service = check_nodes(profile, shape, chosen, nodes, hosts["nodelist"], hosts["exclude"])
    taken, words = _rehearsal(profile, shape, folder, seconds)
    # away nodes make sbatch refuse a rehearsal, but no job
    startable = not wrong([*found, *hardware]) and (taken is not False or wrong(service))
    return settled([*found, *service], hardware, taken, words), startable


def _hosts(names: str | None, seconds: float) -> list[str] | None:
    return query("scontrol", "show", "hostnames", names, seconds=seconds).output.split() if names else None


def _account(profile: SlurmProfile, config: Record, seconds: float) -> list[CheckResult]:
    if shutil.which("sacctmgr") is None:
        return []  # told already
    cluster = config.get("ClusterName", "")
    answer = query(
        *("sacctmgr", "-n", "-P", "show", "associations", f"user={pwd.getpwuid(os.getuid()).pw_name}"),
        *([f"cluster={cluster}"] if cluster else []),
        "format=account,partition,qos",
        seconds=seconds,
    )
    if answer.code != 0:
        what = f"account and qos could not be checked: {answer.fault}"
        return [CheckResult("unknown", what, "sbatch has the last word on them")]
    rows = [line.split("|") for line in answer.output.splitlines() if line.count("|") == 2]
    return check_account(profile, config.get("AccountingStorageEnforce", "none"), rows)


def _rehearsal(profile: SlurmProfile, shape: Shape, folder: Path, seconds: float) -> tuple[bool | None, str]:
    """(whether sbatch takes the script of a run, its words)."""
    try:
        text = sbatch_text(profile, shape, "c2g-doctor", folder)
    except UserError as error:
        return False, str(error)
    answer = check_script(text, 3 * seconds)
    return None if answer.code is None else answer.code == 0, answer.output or answer.fault
