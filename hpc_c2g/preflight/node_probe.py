"""What each rank of the doctor's job does: look at its node, meet the others, tell all in a file of its own.

``python -m hpc_c2g.preflight.node_probe FOLDER`` or, through submitit, a ``NodeProbe``. A rank goes on as far as it can and writes before every
part, so that a part that never ends is known by its name. The login node answers each rank's greeting meanwhile: so both see that
files arrive, and how long that takes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hpc_c2g
from hpc_c2g.files import write_atomically

if TYPE_CHECKING:
    import torch

    from hpc_c2g.distributed.environment import LaunchEnvironment
    from hpc_c2g.distributed.world import World

PLAN, REPORT, GREETING, ANSWER, AFTER = "plan.json", "rank-", "greeting-", "answer-", "after.json"
"""Files in the folder; the last three begin so and end in .json."""
REPLY_SECONDS = 60.0
"""How long attributes of files may be cached."""
MEET_SECONDS = 120.0
SUM_SECONDS = 60.0
POLL_SECONDS = 0.1
ROLL_CALL_SECONDS = 2.0


@dataclass(frozen=True)
class NodeProbe:
    """What submitit carries to a node.

    Attributes:
        folder: of the plan and the reports.
    """

    folder: str

    def __call__(self) -> None:
        """Do it. It ends well whatever is found: a bad exit would end the ranks that still write."""
        check_up(Path(self.folder))


def code_digest() -> str:
    """Return a hash of the package's source files: a node with another checkout computes other results."""
    digest, package = hashlib.sha256(), Path(hpc_c2g.__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Of what a study's results depend on; the libraries' by their installation, for importing them takes seconds."""
    found = {"hpc_c2g": hpc_c2g.__version__, "python": platform.python_version()}
    found["code"] = code_digest()
    for library in ("torch", "deepspeed"):
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "missing"
    return found


def clock_offset(folder: Path, tries: int = 3) -> tuple[float, float]:
    """(this machine's clock minus that of the file system, how far off that may be), in seconds."""
    scratch = folder / f".clock-{uuid.uuid4().hex}"
    best = (0.0, float("inf"))
    try:
        for _ in range(tries):
            before = time.time()
            scratch.touch()
            os.utime(scratch)
            after = time.time()
            off = (after - before) / 2
            if off < best[1]:
                best = ((before + after) / 2 - scratch.stat().st_mtime, off)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()
    return best


def check_up(folder: Path) -> dict[str, Any]:
    """All parts in turn; returns what was reported."""
    plan = json.loads((folder / PLAN).read_text())
    name = f"{socket.gethostname()}.{os.getpid()}"
    report: dict[str, Any] = {"node": socket.gethostname(), "rank": None, "took": {}, "began": time.time()}
    began = time.monotonic()

    def enter(part: str) -> None:
        nonlocal began
        if "part" in report:
            report["took"][report["part"]] = time.monotonic() - began
        began = time.monotonic()
        report["part"] = part
        write_atomically(folder / f"{REPORT}{name}.json", json.dumps(report).encode())

    enter("files")
    report |= {"versions": versions(), "package": str(Path(hpc_c2g.__file__).parent)}
    report |= {"clock": clock_offset(folder), "reply": greet(folder, name, plan.get("reply", REPLY_SECONDS))}
    report |= {"scratch": scratch_fault(), "interfaces": [n for _, n in socket.if_nameindex()]}
    enter("import")
    try:
        importlib.import_module("hpc_c2g.training.loop")  # all that a run needs: seconds
        from hpc_c2g.distributed.environment import detect

        launch = detect()
    except Exception as error:
        report["stopped"] = f"{type(error).__name__}: {error}".splitlines()[0]
        enter("done")
        return report
    report |= {"rank": launch.rank, "size": launch.world_size}
    enter("devices")
    report["gpus"] = devices(launch.local_rank, launch.local_world_size)
    enter("sum")
    ended, report["sum"] = meet_and_sum(launch, plan.get("meet", MEET_SECONDS), plan.get("sum", SUM_SECONDS))
    enter("done")
    if not ended:  # a collective that hangs would also hold up the exit
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(ROLL_CALL_SECONDS if launch.rank == 0 else 0)  # it keeps the store that the others ask
        os._exit(0)
    return report


def greet(folder: Path, name: str, seconds: float) -> dict[str, float | None]:
    """Write a greeting and wait for the login node's answer.

    Returns:
        When it was sent and, unless no answer came, when the answer was given (the login node's clock) and got.
    """
    word, end = uuid.uuid4().hex, time.monotonic() + seconds
    sent = time.time()
    write_atomically(folder / f"{GREETING}{name}.json", json.dumps({"word": word, "sent": sent}).encode())
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError):
            answer = json.loads((folder / f"{ANSWER}{name}.json").read_text())
            if answer["word"] == word:
                return {"sent": sent, "given": answer["given"], "got": time.time()}
        time.sleep(POLL_SECONDS)
    return {"sent": sent, "given": None, "got": None}


def answer_greetings(folder: Path, answered: dict[str, str]) -> None:
    """The login node's part; ``answered`` remembers the word of each rank that has its answer."""
    for file in folder.glob(f"{GREETING}*.json"):
        name = file.name.removeprefix(GREETING)
        with contextlib.suppress(OSError, ValueError):
            word = json.loads(file.read_text())["word"]
            if answered.get(name) != word:
                answer = {"word": word, "given": time.time()}
                write_atomically(folder / f"{ANSWER}{name}", json.dumps(answer).encode())
                answered[name] = word


def scratch_fault() -> str:
    """Why the folder for temporary files cannot be used; empty where it can."""
    folder = os.environ.get("TMPDIR", tempfile.gettempdir())  # Python goes elsewhere where it is missing
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 20))
            file.flush()
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return ""


def devices(local_rank: int, local_size: int) -> dict[str, Any]:
    """What torch and the driver say of this node's GPUs; each GPU is tried by one rank of the node, the processor by all."""
    import torch

    found: dict[str, Any] = {"count": 0, "faults": [], "built_for": torch.version.cuda, "cause": ""}
    if torch.cuda.is_available():
        found["count"] = torch.cuda.device_count()
    elif torch.version.cuda:
        try:
            torch.zeros(1, device="cuda")
        except (RuntimeError, AssertionError) as error:
            found["cause"] = str(error).splitlines()[0]
    mine = [torch.device("cuda", i) for i in range(local_rank, found["count"], local_size)]
    for device in [torch.device("cpu"), *mine]:
        fault = product_fault(device)
        if fault:
            found["faults"].append(f"{device}: {fault}")
    found["ecc"] = ecc_errors() if local_rank == 0 else {}
    return found


def product_fault(device: torch.device, size: int = 256) -> str:
    """What is wrong with a product of two matrices of small whole numbers, which every precision computes exactly."""
    import torch

    left = (torch.arange(size * size).reshape(size, size) * 7) % 5
    right = (torch.arange(size * size).reshape(size, size) * 3) % 4
    try:
        product = left.to(device, torch.float32) @ right.to(device, torch.float32)
        wrong = int((product.cpu().long() != left @ right).sum())
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return f"{wrong} of {size * size} elements of a matrix product are wrong" if wrong else ""


def ecc_errors(seconds: float = 20.0) -> dict[str, int]:
    """Uncorrected memory errors of each GPU since its driver started, by ``index (uuid)``; {} where nobody counts them."""
    query = "index,uuid,ecc.errors.uncorrected.volatile.total"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return {f"{row[0]} ({row[1]})": int(row[2]) for row in rows if len(row) == 3 and row[2].isdecimal()}


def meet_and_sum(launch: LaunchEnvironment, meet: float, limit: float) -> tuple[bool, dict[str, Any]]:
    """Meet the other ranks and add something up; returns (whether that came to an end, what happened)."""
    told: dict[str, Any] = {"stage": "meet", "fault": "", "missing": []}
    met = threading.Event()
    worlds: list[World] = []

    def work() -> None:  # in one thread, because a GPU is chosen per thread
        try:
            from hpc_c2g.distributed.world import World

            world = World.start("auto", deterministic=False, launch=launch, seconds=meet)
            worlds.append(world)
            told["stage"] = "sum"
            met.set()
            told["fault"] = sum_fault(world)
            told["stage"] = "done"
        except Exception as error:
            told["fault"] = str(error).splitlines()[0] if str(error) else type(error).__name__
        finally:
            met.set()

    thread = threading.Thread(target=work, daemon=True)
    began = time.monotonic()
    thread.start()
    met.wait(meet + limit)  # who meets may still have to connect
    thread.join(limit)
    told["seconds"] = time.monotonic() - began
    if not thread.is_alive():
        return not told["fault"], told
    if not worlds:
        told["fault"] = f"no connection to the other ranks within {meet + limit:.0f} s"
        return False, told
    told["missing"] = absent(worlds[0])
    came = f"ranks {', '.join(map(str, told['missing']))} did not come" if told["missing"] else "all ranks came"
    told["fault"] = f"{came}, the sum did not end within {limit:.0f} s"
    return False, told


def sum_fault(world: World) -> str:
    """What is wrong with 1 + 2 + ... + ranks; empty where nothing is. Every rank signs in before."""
    import torch

    world.store.set(f"checkup/{world.rank}", "1")
    value = torch.tensor([world.rank + 1.0], dtype=torch.float64, device=world.device)
    world.sum([value])
    right = world.size * (world.size + 1) / 2
    return "" if float(value) == right else f"the sum over {world.size} ranks is {float(value)}, not {right}"


def absent(world: World) -> list[int]:
    """Ranks that have not signed in to the sum."""
    try:
        return [rank for rank in range(world.size) if not world.store.check([f"checkup/{rank}"])]
    except RuntimeError:  # rank 0 keeps the store
        return [0]


def after(folder: Path, code: str) -> int:
    """What the job's shell calls at the end, outside of any container, as it would call a study's epilog."""
    importlib.import_module("hpc_c2g.studies.epilog")
    write_atomically(folder / AFTER, json.dumps({"code": int(code)}).encode())
    return int(code)


def read_reports(folder: Path) -> list[Mapping[str, Any]]:
    """What the ranks have told so far."""
    found = []
    for file in sorted(folder.glob(f"{REPORT}*.json")):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(file.read_text()))
    return found


def main(arguments: list[str]) -> int:
    """``FOLDER``, or ``FOLDER CODE`` after the ranks."""
    if len(arguments) == 2:
        return after(Path(arguments[0]), arguments[1])
    check_up(Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
