"""The cluster of ``slurm/local`` for tests: start it, ask it, hurt it, stop it."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "slurm" / "local"


def why_not() -> str | None:
    """Why no cluster can be started here."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [p for p in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(p, path=path) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm)"
    return "the local Slurm cluster needs root" if os.geteuid() != 0 else None


def free_ports(count: int) -> int:
    """The first of ``count`` free ports in a row, below those that the kernel hands out."""
    for first in random.sample(range(17000, 32000 - count), 100):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("", port))
            return first
    raise OSError(f"no {count} free ports in a row")


def call(command: list[str | Path], environment: Mapping[str, str]) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stderr}{done.stdout}")
    return done.stdout


def outside() -> dict[str, str]:
    """The environment without any cluster's settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("C2G_SLURM_", "SLURM_CONF"))}


@dataclass(frozen=True)
class Cluster:
    """The cluster in ``folder``."""

    folder: Path

    @classmethod
    def start(cls, folder: Path, **settings: object) -> Cluster:
        """A new one on free ports; ``settings`` are those of up.sh without their prefix, such as ``NODES=2``."""
        cluster = cls(folder)
        defaults = {"NODES": 4, "PORT": free_ports(11 + int(str(settings.get("NODES", 4))))}
        try:
            cluster.script("up.sh", **(defaults | settings))
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def stop(self) -> None:
        """End its processes and forget its state."""
        self.script("down.sh", "--purge")

    def script(self, name: str, *arguments: str, **settings: object) -> str:
        """Run one of the scripts in ``slurm/local`` for this cluster, as it was set up but for ``settings``."""
        changes = {f"C2G_SLURM_{key}": str(value) for key, value in settings.items()}
        environment = outside() | self.environment | {"C2G_SLURM_DIR": str(self.folder)} | changes
        return call([SCRIPTS / name, *arguments], environment)

    @property
    def environment(self) -> dict[str, str]:
        """What its ``env.sh`` sets, for ``os.environ``: SLURM_CONF, PATH and the settings; nothing before it was up."""
        if not (self.folder / "env.sh").exists():
            return {}
        lines = call(["bash", "-c", '. "$0" && env -0', self.folder / "env.sh"], outside()).split("\0")
        found = dict(line.split("=", 1) for line in lines if line)
        return {k: v for k, v in found.items() if k in ("SLURM_CONF", "PATH") or k.startswith("C2G_SLURM_")}

    @property
    def answers(self) -> bool:
        """Whether it is up."""
        try:
            return bool(self.environment) and "is UP" in self.run("scontrol", "ping")
        except RuntimeError:
            return False

    @property
    def namespaces(self) -> bool:
        """Whether its nodes have names and processes of their own."""
        return self.environment["C2G_SLURM_NS"] == "1"

    def run(self, *command: str | Path) -> str:
        """The output of a command on the login node, so to speak; it must succeed."""
        return call(list(command), outside() | self.environment)

    def nodes(self) -> dict[str, str]:
        """State of each node."""
        return dict(line.split() for line in self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines())

    def kill_node(self, name: str) -> None:
        """A power cut, of which Slurm knows at once."""
        self.script("node.sh", "kill", name)

    def resume_nodes(self) -> None:
        """Bring every node back."""
        self.script("node.sh", "resume", *self.nodes())

    def restart_controller(self, kill: bool = False) -> None:
        """Stop slurmctld in order, or ``kill`` it, and start it again."""
        self.script("ctld.sh", "restart", *(["--kill"] if kill else []))

    def queue(self) -> dict[str, str]:
        """State of every job that slurmctld remembers, by job id; elements of an array are ``17_0``, ``17_1``, ..."""
        return dict(line.split() for line in self.run("squeue", "-h", "-r", "-t", "all", "-o", "%i %T").splitlines())

    def wait(self, job: str, *states: str, seconds: float = 60) -> str:
        """Wait until the job is in one of the states; which one."""
        end = time.monotonic() + seconds
        while (state := self.queue()[job]) not in states:
            if time.monotonic() > end:
                raise TimeoutError(f"job {job} is {state} after {seconds} s, not {' or '.join(states)}")
            time.sleep(0.2)
        return state

    def cancel_all(self) -> None:
        """Cancel every job."""
        self.run("scancel", "--user", "root")

    def idle(self, seconds: float) -> None:
        """Wait until no job waits, runs or ends."""
        end = time.monotonic() + seconds
        while jobs := self.run("squeue", "-h", "-o", "%i %T %N"):
            if time.monotonic() > end:
                raise TimeoutError(f"jobs left after {seconds} s:\n{jobs}")
            time.sleep(0.2)
