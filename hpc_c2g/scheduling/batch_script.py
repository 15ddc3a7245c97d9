"""Batch scripts for sbatch from a profile, as pure functions: nothing here touches a file or calls Slurm."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import _make_sbatch_string

from hpc_c2g.errors import UserError
from hpc_c2g.scheduling.profile import SlurmProfile
from hpc_c2g.scheduling.queue import check_ids, check_name

_MIB_PER_GIB = 1024


@dataclass(frozen=True)
class Shape:
    """Layout of the ranks of one run.

    Attributes:
        nodes: Number of nodes of the job.
        tasks_per_node: Number of ranks on each node.
    """

    nodes: int = 1
    tasks_per_node: int = 1

    def __post_init__(self) -> None:
        for name in ("nodes", "tasks_per_node"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"{name}={value!r} is not possible", "give a whole number >= 1")

    @property
    def tasks(self) -> int:
        """Number of ranks of the run."""
        return self.nodes * self.tasks_per_node


def python_command(profile: SlurmProfile) -> str:
    """Return the command of the interpreter, inside its container if there is one, quoted for bash."""
    return shlex.join([*profile.container, profile.python or sys.executable])


def submitit_parameters(
    profile: SlurmProfile, shape: Shape, job_name: str, after: Sequence[str] = (), epilog: str = ""
) -> dict[str, Any]:
    """Return the arguments of ``submitit.SlurmExecutor.update_parameters``.

    Args:
        profile: Profile of the cluster.
        shape: Shape of one run.
        job_name: Name of the job or array.
        after: Ids of jobs that must have ended, successfully or not, before this one starts.
        epilog: Command, quoted for bash, that runs with the exit code of the ranks as its last argument once they have ended,
            unless the shell itself was killed. The job's exit code is the epilog's.

    Raises:
        UserError: A name, an id or a command would not reach Slurm as it was written.
    """
    check_name(job_name)
    check_ids(after)
    if not epilog.isprintable():
        raise UserError(f"the command {epilog!r} has a control character", "give one line")
    extra = {name: value for name, value in profile.extra.items() if value is not False}
    return {
        "job_name": job_name,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "nodelist": profile.nodelist,
        "exclude": profile.exclude,
        "time": profile.time_minutes,
        "nodes": shape.nodes,
        "ntasks_per_node": shape.tasks_per_node,
        "cpus_per_task": profile.cpus_per_task,
        "gpus_per_node": _gpus(profile, shape),
        "mem": _memory(profile, shape),
        "dependency": f"afterany:{':'.join(after)}" if after else None,
        "array_parallelism": profile.throttle,
        "signal_delay_s": profile.signal_seconds,
        "stderr_to_stdout": False,
        "wckey": None,  # submitit's own default is refused where wckeys are enforced
        # the signal is set again, because submitit takes its own from SUBMITIT_PREEMPT_SIGNAL
        "additional_parameters": {"requeue": True, "signal": f"USR2@{profile.signal_seconds}", **extra},
        "setup": _setup(profile, shape),
        "srun_args": _srun_arguments(profile),
        "teardown": _teardown(epilog),
    }


def sbatch_text(
    profile: SlurmProfile,
    shape: Shape,
    job_name: str,
    folder: Path,
    elements: int = 1,
    after: Sequence[str] = (),
    epilog: str = "",
) -> str:
    """Return the text that submitit gives to sbatch for an array of ``elements`` runs; a single run is no array.

    Raises:
        UserError: As ``submitit_parameters`` and ``check_folder``.
    """
    if elements < 1:
        raise UserError(f"an array of {elements} elements is not possible", "give at least one run")
    place = check_folder(folder)
    text: str = _make_sbatch_string(
        command=f"{python_command(profile)} -u -m submitit.core._submit {shlex.quote(str(place))}",
        folder=place,
        map_count=elements if elements > 1 else None,
        **submitit_parameters(profile, shape, job_name, after, epilog),
    )
    return text


def check_folder(path: str | Path) -> Path:
    """Return the absolute path of a folder for logs, which sbatch and srun read as a pattern.

    Raises:
        UserError: The path has a character that one of them, or bash, would interpret.
    """
    folder = Path(path)
    if folder.parts and folder.parts[0].startswith(("-", "~")):
        raise UserError(
            f"the folder {str(path)!r} starts with {str(path)[0]!r}", "give another folder, or its full path"
        )
    absolute = folder.absolute()
    for character in str(absolute):
        if character in "%\"'\\$`" or not character.isprintable():
            what = f"the folder {str(absolute)!r} has the character {character!r}, which Slurm or the shell interprets"
            raise UserError(what, "choose a folder without it")
    return absolute


def _gpus(profile: SlurmProfile, shape: Shape) -> str | int | None:
    """Return the GPUs per node: with --gpus-per-task a rank would not see its neighbors, which NCCL needs for fast transfers."""
    if not profile.gpus_per_task:
        return None
    count = profile.gpus_per_task * shape.tasks_per_node
    return f"{profile.gpu_type}:{count}" if profile.gpu_type else count


def _memory(profile: SlurmProfile, shape: Shape) -> str | None:
    if profile.mem_gb is None:
        return None
    return f"{math.ceil(profile.mem_gb * shape.tasks_per_node * _MIB_PER_GIB)}M"


def _setup(profile: SlurmProfile, shape: Shape) -> list[str]:
    lines = [
        "# bash must outlive the SIGTERM of a cancelled, preempted or timed-out job, to run the epilog.",
        "# A trap is not inherited by the ranks; an ignored signal would be.",
        "trap : TERM USR2",
        "# srun does not inherit --cpus-per-task since 22.05",
        f"export SRUN_CPUS_PER_TASK={profile.cpus_per_task}",
    ]
    if profile.purge_modules:
        lines.append("module purge")
    if profile.modules:
        lines.append(f"module load {shlex.join(profile.modules)} || exit")
    variables: dict[str, str | int] = {"PYTHONUNBUFFERED": 1, "OMP_NUM_THREADS": profile.cpus_per_task}
    if profile.network_interface is not None:
        variables |= {f"{library}_SOCKET_IFNAME": profile.network_interface for library in ("NCCL", "GLOO")}
    if profile.scratch is not None:
        variables["TMPDIR"] = profile.scratch
    variables |= profile.environment
    lines += [f"export {name}={shlex.quote(str(value))}" for name, value in variables.items()]
    if profile.scratch is not None:
        everywhere = (
            f"srun --nodes={shape.nodes} --ntasks={shape.nodes} --ntasks-per-node=1 " if shape.nodes > 1 else ""
        )
        lines.append(f"{everywhere}mkdir -p -- {shlex.quote(profile.scratch)} || exit")
    if profile.setup:
        lines += [*profile.setup, "set +e  # the epilog runs also when the ranks fail"]
    return lines


def _srun_arguments(profile: SlurmProfile) -> list[str]:
    """Return srun's options: one dead rank ends the step; a rank that outlives the first by a minute hangs in a collective."""
    arguments = [
        "--open-mode=append",
        f"--cpus-per-task={profile.cpus_per_task}",
        "--kill-on-bad-exit=1",
        "--wait=60",
    ]
    return arguments if profile.cpu_bind == "none" else [*arguments, f"--cpu-bind={profile.cpu_bind}"]


def _teardown(epilog: str) -> list[str]:
    """Return the lines right after the run, so that ``$?`` is its exit code; the job exits with the epilog's."""
    if not epilog:
        return ["exit"]
    return ["code=$?", f'{epilog} "$code"', "exit"]
