"""Work of each rank of the doctor's job: test the node, meet the other ranks, write a report.

``python -m hpc_c2g.preflight.node_probe FOLDER`` or, through submitit, a ``NodeProbe``. A rank writes its report before every part
of the work, so that a part that never ends is known by its name.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hpc_c2g
from hpc_c2g.files import write_atomically
from hpc_c2g.preflight.devices import probe_devices
from hpc_c2g.preflight.exchange import EPILOG, PLAN, REPLY_TIMEOUT_S, REPORT, clock_offset, ping_login_node, versions

if TYPE_CHECKING:
    from hpc_c2g.distributed.environment import LaunchEnvironment
    from hpc_c2g.distributed.world import World

MEET_TIMEOUT_S = 120.0
SUM_TIMEOUT_S = 60.0
EXIT_DELAY_S = 2.0


@dataclass(frozen=True)
class NodeProbe:
    """Callable that submitit runs on every rank.

    Attributes:
        folder: Folder of the plan and of the reports.
    """

    folder: str

    def __call__(self) -> None:
        """Probe the node. The exit code is 0 whatever is found: another would end the ranks that still write."""
        probe_node(Path(self.folder))


def probe_node(folder: Path) -> dict[str, Any]:
    """Run all parts of the probe; returns the last report."""
    plan = json.loads((folder / PLAN).read_text())
    name = f"{socket.gethostname()}.{os.getpid()}"
    report: dict[str, Any] = {"node": socket.gethostname(), "rank": None, "seconds": {}, "began": time.time()}
    began = time.monotonic()

    def enter(part: str) -> None:
        nonlocal began
        if "part" in report:
            report["seconds"][report["part"]] = time.monotonic() - began
        began = time.monotonic()
        report["part"] = part
        write_atomically(folder / f"{REPORT}{name}.json", json.dumps(report).encode())

    enter("files")
    report |= {"versions": versions(), "package": str(Path(hpc_c2g.__file__).parent)}
    report |= {
        "clock": clock_offset(folder),
        "reply": ping_login_node(folder, name, plan.get("reply", REPLY_TIMEOUT_S)),
    }
    report |= {"scratch": scratch_fault(), "interfaces": [n for _, n in socket.if_nameindex()]}
    enter("import")
    try:
        importlib.import_module("hpc_c2g.training.loop")  # everything that a run imports
        from hpc_c2g.distributed.environment import detect

        launch = detect()
    except Exception as error:
        report["import_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        enter("done")
        return report
    report |= {"rank": launch.rank, "size": launch.world_size}
    enter("devices")
    report["gpus"] = probe_devices(launch.local_rank, launch.local_world_size)
    enter("sum")
    ended, report["sum"] = meet_and_sum(launch, plan.get("meet", MEET_TIMEOUT_S), plan.get("sum", SUM_TIMEOUT_S))
    enter("done")
    if not ended:  # a collective that hangs would also block the interpreter's exit
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(EXIT_DELAY_S if launch.rank == 0 else 0)  # rank 0 holds the store that the others read
        os._exit(0)
    return report


def scratch_fault() -> str:
    """Write into the folder of temporary files; return the error, or an empty text."""
    folder = os.environ.get("TMPDIR", tempfile.gettempdir())  # Python falls back to another folder if TMPDIR is missing
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 20))
            file.flush()
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return ""


def meet_and_sum(launch: LaunchEnvironment, meet: float, limit: float) -> tuple[bool, dict[str, Any]]:
    """Open a process group with the other ranks and do one all-reduce.

    Args:
        launch: Launch environment of this rank.
        meet: Seconds within which the ranks must meet.
        limit: Seconds within which the all-reduce must end.

    Returns:
        True if the all-reduce ended with the right sum, and the outcome: ``stage``, ``fault``, ``missing`` ranks, ``seconds``.
    """
    outcome: dict[str, Any] = {"stage": "meet", "fault": "", "missing": []}
    met = threading.Event()
    worlds: list[World] = []

    def work() -> None:  # in one thread, because the current GPU is a setting of the thread
        try:
            from hpc_c2g.distributed.world import World

            world = World.start("auto", deterministic=False, launch=launch, seconds=meet)
            worlds.append(world)
            outcome["stage"] = "sum"
            met.set()
            outcome["fault"] = sum_fault(world)
            outcome["stage"] = "done"
        except Exception as error:
            outcome["fault"] = str(error).splitlines()[0] if str(error) else type(error).__name__
        finally:
            met.set()

    thread = threading.Thread(target=work, daemon=True)
    began = time.monotonic()
    thread.start()
    met.wait(meet + limit)  # connecting comes after the meeting
    thread.join(limit)
    outcome["seconds"] = time.monotonic() - began
    if not thread.is_alive():
        return not outcome["fault"], outcome
    if not worlds:
        outcome["fault"] = f"no connection to the other ranks within {meet + limit:.0f} s"
        return False, outcome
    missing = outcome["missing"] = missing_ranks(worlds[0])
    who = f"ranks {', '.join(map(str, missing))} did not join" if missing else "all ranks joined"
    outcome["fault"] = f"{who}, the all-reduce did not end within {limit:.0f} s"
    return False, outcome


def sum_fault(world: World) -> str:
    """Sum 1 + 2 + ... over the ranks; return the error, or an empty text. Every rank signs in before."""
    import torch

    world.store.set(f"doctor/{world.rank}", "1")
    value = torch.tensor([world.rank + 1.0], dtype=torch.float64, device=world.device)
    world.sum([value])
    right = world.size * (world.size + 1) / 2
    return "" if float(value) == right else f"the sum over {world.size} ranks is {float(value)}, not {right}"


def missing_ranks(world: World) -> list[int]:
    """Ranks that have not signed in to the all-reduce."""
    try:
        return [rank for rank in range(world.size) if not world.store.check([f"doctor/{rank}"])]
    except RuntimeError:  # rank 0 holds the store
        return [0]


def epilog(folder: Path, code: str) -> int:
    """Import and write what a study's epilog does, in the job's shell and outside of any container; returns the ranks' exit code."""
    importlib.import_module("hpc_c2g.studies.epilog")
    write_atomically(folder / EPILOG, json.dumps({"code": int(code)}).encode())
    return int(code)


def main(arguments: list[str]) -> int:
    """Probe with ``FOLDER``; run the epilog with ``FOLDER CODE``."""
    if len(arguments) == 2:
        return epilog(Path(arguments[0]), arguments[1])
    probe_node(Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
