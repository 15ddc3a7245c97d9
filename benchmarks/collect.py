"""``python -m benchmarks.collect [--quick]``: seconds and memory of ``c2g collect``, first and again: 500 runs, 50 scalars, 200 steps.

CPU seconds are those of the process and of all its workers: unlike wall seconds they hardly depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import show, write_result
from hpc_c2g.evaluation.metric_registry import METRICS
from hpc_c2g.monitoring.layout import AVERAGED
from hpc_c2g.studies.config import StudyConfig
from hpc_c2g.studies.reports import Report, write_report
from hpc_c2g.studies.study import StudyFile, save_study
from hpc_c2g.studies.tasks import Task

ROOT = Path(__file__).parents[1]
SEEDS = 5
TAGS, STEPS = 50, 200


def study(folder: Path, runs: int) -> Path:
    """Write a study of ``runs`` runs in groups of ``SEEDS``, each trained and evaluated.

    Args:
        folder: Folder of the study.
        runs: Number of runs.
    """
    tasks: dict[str, Task] = {}
    for i in range(runs):
        name, place = f"{i:012x}", f"runs/{i:012x}"
        point = {"global_batch": str(10 * (1 + i // SEEDS)), "seed": str(i % SEEDS)}
        tasks[name] = Task(name, "train", place, {"global_batch": 10}, points=(point,))
        tasks[f"e{i:011x}"] = Task(f"e{i:011x}", "evaluate", place, {}, (name,), (place,), (point,))
    folder.mkdir(parents=True)
    save_study(folder, StudyFile(StudyConfig(name="big")), tasks)
    for number, task in enumerate(tasks.values()):
        (folder / task.folder).mkdir(parents=True, exist_ok=True)
        report = Report(task.id, versions={"torch": "2"})
        report.next_attempt("1_0", "n1", 0)
        report.end("done")
        write_report(folder, task, report)
        if task.stage == "train":
            write_run(folder / task.folder, random.Random(number))
    return folder


def write_run(folder: Path, chance: random.Random) -> None:
    """Write a run's metrics and evaluation."""
    tags = [*AVERAGED, *(f"group{k % 7}/scalar{k}" for k in range(TAGS - len(AVERAGED)))]
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, STEPS + 1):
            line = {"step": step, **{tag: chance.random() + 1 / step for tag in tags}}
            file.write(json.dumps(line) + "\n")
    (folder / "evaluation.json").write_text(json.dumps({metric.name: chance.random() for metric in METRICS}))


@dataclass(frozen=True)
class Cost:
    """Cost of one ``c2g collect``.

    Attributes:
        wall: Wall seconds.
        cpu: CPU seconds, user and system, of the process and its workers.
        peak: Peak memory of the largest process in GiB.
    """

    wall: float
    cpu: float
    peak: float


def measured(folder: Path) -> Cost:
    """Run ``c2g collect`` in a process of its own."""
    script = (
        "import resource, sys\nfrom launch.__main__ import main\n"
        "try:\n    main()\nfinally:\n"
        "    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]\n"
        "    cpu = sum(u.ru_utime + u.ru_stime for u in used)\n"
        "    print('used', cpu, max(u.ru_maxrss for u in used), file=sys.stderr)\n"
    )
    began = time.perf_counter()
    words = [sys.executable, "-c", script, "collect", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    wall = time.perf_counter() - began
    cpu, peak = done.stderr.rsplit("used", 1)[1].split()[:2]
    return Cost(wall, float(cpu), int(peak) / 2**20)


def main() -> None:
    """Print the table and write ``results/collect.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 runs")
    quick = parser.parse_args().quick
    runs = 20 if quick else 500
    with tempfile.TemporaryDirectory() as scratch:
        folder = study(Path(scratch) / "study", runs)
        costs = {"first": measured(folder), "again": measured(folder)}
        (folder / f"runs/{0:012x}" / "evaluation.json").write_text('{"coverage": 0.5}')
        costs["after one change"] = measured(folder)
    rows = [
        {"collect": name, "wall s": cost.wall, "CPU s": cost.cpu, "peak GiB": cost.peak} for name, cost in costs.items()
    ]
    show(f"c2g collect, {runs} runs x {TAGS} scalars x {STEPS} steps", rows)
    if not quick:
        settings = {"runs": runs, "tags": TAGS, "steps": STEPS, "seeds": SEEDS}
        print(f"written: {write_result('collect', settings, rows=rows)}")


if __name__ == "__main__":
    main()
