"""Checks of a Slurm cluster from the login node: the queries."""

from __future__ import annotations

import os
import pwd
import shutil
from pathlib import Path

from hpc_c2g.errors import UserError
from hpc_c2g.preflight.check_result import CheckResult, has_errors
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
    combine_results,
)
from hpc_c2g.scheduling.batch_script import Shape, sbatch_text
from hpc_c2g.scheduling.profile import SlurmProfile
from hpc_c2g.scheduling.programs import TIMEOUT_S, Record, query, records, settings
from hpc_c2g.scheduling.sbatch import check_script


def check_slurm(
    profile: SlurmProfile, shape: Shape, folder: Path, seconds: float = TIMEOUT_S
) -> tuple[list[CheckResult], bool]:
    """Check the cluster and the profile.

    Args:
        profile: Profile of the cluster.
        shape: Nodes and ranks of one run.
        folder: Study folder.
        seconds: Time after which a program counts as not answering.

    Returns:
        The results, and True if a job that is submitted now can start.
    """
    results = check_programs({name: shutil.which(name) for name in (*NEEDED, *USEFUL)})
    results += check_variables(os.environ)
    if has_errors(results):
        return results, False
    results.append(check_ping(query("scontrol", "ping", seconds=seconds)))
    if has_errors(results):
        return results, False
    config = settings(query("scontrol", "show", "config", seconds=seconds).output)
    partitions = records(query("scontrol", "-a", "-o", "show", "partition", seconds=seconds).output)
    partition_results, chosen = check_partitions(profile, partitions)
    results += partition_results
    results += check_limits(profile, shape, chosen) + check_array(profile, config)
    results += _account_results(profile, config, seconds)
    size_results: list[CheckResult] = []
    state_results: list[CheckResult] = []
    if chosen:
        nodes = records(query("scontrol", "-a", "-o", "show", "node", seconds=seconds).output)
        hosts = {name: _hosts(getattr(profile, name), seconds) for name in ("nodelist", "exclude")}
        size_results, state_results = check_nodes(profile, shape, chosen, nodes, hosts["nodelist"], hosts["exclude"])
    accepted, text = _test_script(profile, shape, folder, seconds)
    # nodes out of service make sbatch refuse a test, but no job
    startable = not has_errors([*results, *size_results]) and (accepted is not False or has_errors(state_results))
    return combine_results([*results, *state_results], size_results, accepted, text), startable


def _hosts(names: str | None, seconds: float) -> list[str] | None:
    return query("scontrol", "show", "hostnames", names, seconds=seconds).output.split() if names else None


def _account_results(profile: SlurmProfile, config: Record, seconds: float) -> list[CheckResult]:
    if shutil.which("sacctmgr") is None:
        return []  # check_programs reports it
    cluster = config.get("ClusterName", "")
    answer = query(
        *("sacctmgr", "-n", "-P", "show", "associations", f"user={pwd.getpwuid(os.getuid()).pw_name}"),
        *([f"cluster={cluster}"] if cluster else []),
        "format=account,partition,qos",
        seconds=seconds,
    )
    if answer.code != 0:
        message = f"account and qos could not be checked: {answer.fault}"
        return [CheckResult("unknown", message, "sbatch checks them at submission")]
    rows = [line.split("|") for line in answer.output.splitlines() if line.count("|") == 2]
    return check_account(profile, config.get("AccountingStorageEnforce", "none"), rows)


def _test_script(profile: SlurmProfile, shape: Shape, folder: Path, seconds: float) -> tuple[bool | None, str]:
    """(True if sbatch accepts the script of a run or None if it does not answer, its answer)."""
    try:
        text = sbatch_text(profile, shape, "c2g-doctor", folder)
    except UserError as error:
        return False, str(error)
    answer = check_script(text, 3 * seconds)
    return None if answer.code is None else answer.code == 0, answer.output or answer.fault
