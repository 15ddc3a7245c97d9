"""A study of many runs on the local Slurm cluster while nodes die, jobs are preempted, and slurmctld and the submitter are killed.

``make slurm-up``, then ``python -m benchmarks.chaos [--runs 200] [--preemptions 10] [--nodes 5] [--seed 0] [--quick] [--keep DIR]``.
Afterwards the same study is run undisturbed in one process: metrics, weights and evaluations must be the same. A watcher reads every
run's lease twice a second: nobody may hold a run that another has taken over.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import show, write_result
from benchmarks.launched import differences
from hpc_c2g.lease import live_holder
from hpc_c2g.studies.reports import load_report, read_report
from hpc_c2g.studies.study import FILE
from hpc_c2g.studies.tasks import find_specs

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "slurm" / "local"
NODES = ("n1", "n2", "n3", "n4")
SETTINGS = (
    "data.train_size=20",
    "data.classes=[0,1]",
    "model.width=32",
    "fit.target_margin=20",
    "steps=600",
    "global_batch=32",
    "deterministic=true",
    "deterministic_shards=1",
    "alpha.pilot_steps=20",
    "checkpoint.every=50",
    "log.every=50",
    "log.images_every=1000",
    "count=200",
)
"""Settings of runs of a few seconds; deterministic, so that differences come from the cluster, and without DeepSpeed's import."""
GIVE_UP = 3600.0


def sweep(study_dir: Path, runs: int, *more: str) -> list[str]:
    """Command line of ``c2g sweep``."""
    grid = [
        "study=batch_scaling",
        f"study_dir={study_dir}",
        *SETTINGS,
        "seed=0",
        f"train.seed=range({runs})",
    ]
    return [sys.executable, "-m", "launch", "sweep", *grid, *more]


@dataclass
class Watcher:
    """Reads every run's lease twice a second.

    Attributes:
        study_dir: Folder of the study.
        holders: Tokens of the holders of each run, in the order of observation.
        back: Runs that returned to an earlier holder: two processes were at work at once.
    """

    study_dir: Path
    holders: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    back: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Watch until the context ends."""
        stop = threading.Event()
        thread = threading.Thread(target=self._watch, args=(stop,))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(0.5):
            for folder in self.study_dir.glob("runs/*"):
                holder = live_holder(folder)
                seen = self.holders[folder.name]
                if holder is None or not holder.token or (seen and seen[-1] == holder.token):
                    continue
                if holder.token in seen:
                    self.back.append(folder.name)
                seen.append(holder.token)


@dataclass
class Chaos:
    """Fault injector for a Slurm cluster, with a log of the injected faults.

    Attributes:
        chance: Random generator that chooses the faults.
        done: (second, description) of every injected fault.
    """

    chance: random.Random
    began: float = field(default_factory=time.monotonic)
    done: list[tuple[float, str]] = field(default_factory=list)

    def note(self, fault: str) -> None:
        """Record and print an injected fault."""
        self.done.append((time.monotonic() - self.began, fault))
        print(f"{self.done[-1][0]:6.0f} s  {fault}", flush=True)

    def preempt(self) -> None:
        """Submit a job of the high partition to a busy node, which preempts the low jobs there for a few seconds."""
        busy = [line for line in slurm("squeue", "-h", "-t", "R", "-p", "low", "-o", "%N").split() if line in NODES]
        node = self.chance.choice(busy or list(NODES))
        job = [
            "--parsable",
            "-p",
            "high",
            "-N1",
            "-c",
            "4",
            "-t",
            "5",
            f"--nodelist={node}",
            "-o",
            "/dev/null",
            "--wrap",
            "sleep 6",
        ]
        slurm("sbatch", "-J", "preemptor", *job)
        self.note(f"preempt the jobs on {node} ({busy.count(node)} there)")

    def kill_node(self) -> None:
        """Kill a node and restart it after a few seconds."""
        busy = [line for line in slurm("squeue", "-h", "-t", "R", "-p", "low", "-o", "%N").split() if line in NODES]
        node = self.chance.choice(busy or list(NODES))
        script("node.sh", "kill", node)
        self.note(f"kill {node} ({busy.count(node)} jobs there)")
        time.sleep(self.chance.uniform(3, 12))
        script("node.sh", "resume", node)

    def restart_controller(self) -> None:
        """slurmctld ends and comes again."""
        script("ctld.sh", "restart")
        self.note("restart slurmctld")


def slurm(*command: str) -> str:
    """Output of one of Slurm's commands."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def script(name: str, *arguments: str) -> None:
    """One of the scripts of slurm/local."""
    subprocess.run([SCRIPTS / name, *arguments], check=True, capture_output=True, timeout=120)


def states(study_dir: Path) -> dict[str, int]:
    """How many training runs have which state by their own reports."""
    found: dict[str, int] = defaultdict(int)
    for task in find_specs(study_dir):
        if task.stage == "train":
            report = read_report(study_dir, task)
            found[report.state if report else "new"] += 1
    return found


def disturbed(study_dir: Path, runs: int, chaos: Chaos, preemptions: int, nodes: int, watcher: Watcher) -> None:
    """Run the study with faults injected over its training; the submitter is killed in the middle and started again.

    Raises:
        RuntimeError: the study did not end in time.
    """
    faults: list[Callable[[], None]] = [chaos.preempt] * preemptions + [chaos.kill_node] * nodes
    chaos.chance.shuffle(faults)
    command = sweep(
        study_dir,
        runs,
        "cluster=local_slurm",
        "profile.partition=low",
        "parallel=8",
        "profile.signal_seconds=30",
        "--watch",
    )
    with open(study_dir.with_suffix(".out"), "ab") as out, watcher.at_work():
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT)
        try:
            steps = [(i + 1) / (len(faults) + 3) for i in range(len(faults))]
            killed = restarted = False
            while process.poll() is None and time.monotonic() - chaos.began < GIVE_UP:
                time.sleep(1)
                share = states(study_dir).get("done", 0) / runs if (study_dir / FILE).exists() else 0.0
                if steps and share >= steps[0]:
                    steps.pop(0)
                    faults.pop()()
                if share > 0.4 and not restarted:
                    restarted = True
                    chaos.restart_controller()
                if share > 0.6 and not killed:
                    killed = True
                    process.kill()
                    process.wait()
                    chaos.note("kill -9 of the submitter, and the same command again")
                    process = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT)
        finally:
            process.kill()
            process.wait()
    if process.returncode not in (0, -9):
        print(study_dir.with_suffix(".out").read_text()[-2000:], file=sys.stderr)
        raise RuntimeError(f"the study ended with {process.returncode}")


def compare(one: Path, other: Path) -> list[str]:
    """Runs whose last checkpoint, metrics or evaluation differ; the undisturbed study is ``other``."""
    different = []
    for task in find_specs(other):
        if task.stage != "train":
            continue
        mine, theirs = one / task.folder, other / task.folder
        wrong = differences(mine, theirs) if (mine / "metrics.jsonl").exists() else ["missing"]
        if not wrong and _evaluation(mine) != _evaluation(theirs):
            wrong = ["evaluation.json"]
        different += [f"{task.id}: {', '.join(wrong)}"] if wrong else []
    return different


def _evaluation(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return {k: v for k, v in content.items() if k != "classifier"}  # its path


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--preemptions", type=int, default=10)
    parser.add_argument("--nodes", type=int, default=5, help="nodes killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="12 runs, 2 preemptions, 1 node, and no result file")
    parser.add_argument("--keep", type=Path, help="a folder for the studies; default: a temporary one")
    args = parser.parse_args()
    runs, preemptions, nodes = (12, 2, 1) if args.quick else (args.runs, args.preemptions, args.nodes)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with contextlib.ExitStack() as held:
        scratch = args.keep or Path(held.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        scratch.mkdir(parents=True, exist_ok=True)
        study, chaos = (scratch / "disturbed").absolute(), Chaos(random.Random(args.seed))
        watcher = Watcher(study)
        disturbed(study, runs, chaos, preemptions, nodes, watcher)
        seconds = time.monotonic() - chaos.began
        calm = (scratch / "calm").absolute()
        subprocess.run(sweep(calm, runs, "cluster=debug"), check=True, capture_output=True, cwd=ROOT)
        different = compare(study, calm)
        views = [
            r
            for r in (load_report(f, json.loads(f.read_text())["id"]) for f in study.glob("runs/*/train.report.json"))
            if r
        ]
        summary = {
            "runs": runs,
            "done": states(study).get("done", 0),
            "evaluated": len(list(study.glob("runs/*/evaluation.json"))),
            "lost": runs - states(study).get("done", 0),
            "held twice at once": len(watcher.back),
            "different from the undisturbed study": len(different),
            "attempts": sum(r.attempts for r in views),
            "runs of several attempts": sum(r.attempts > 1 for r in views),
            "failures of their own": sum(r.failures for r in views),
            "faults": len(chaos.done),
            "seconds": seconds,
        }
    show("a study with injected faults", [{"what": k, "number": v} for k, v in summary.items()])
    print("\n".join(different[:10]))
    if not args.quick:
        write_result(
            "chaos", {"settings": SETTINGS, "seed": args.seed}, summary=summary, faults=chaos.done, different=different
        )
    if summary["lost"] or watcher.back or different:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
