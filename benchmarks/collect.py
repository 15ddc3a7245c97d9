"""``python -m benchmarks.collect [--quick]``: seconds and memory of ``c2g collect``, first and again: 500 runs, 50 scalars, 200 steps."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
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


def collected(folder: Path) -> tuple[float, float]:
    """(wall seconds, peak GiB) of ``c2g collect`` in a process of its own, and its helpers."""
    script = (
        "import resource, sys\nfrom launch.__main__ import main\n"
        "try:\n    main()\nfinally:\n"
        "    peak = [resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]\n"
        "    print('peak', max(peak), file=sys.stderr)\n"
    )
    began = time.perf_counter()
    words = [sys.executable, "-c", script, "collect", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    took = time.perf_counter() - began
    return took, int(done.stderr.rsplit("peak", 1)[1].split()[0]) / 2**20


def main() -> None:
    """Print the table and write ``results/collect.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 runs")
    quick = parser.parse_args().quick
    runs = 20 if quick else 500
    with tempfile.TemporaryDirectory() as scratch:
        folder = study(Path(scratch) / "study", runs)
        first, peak = collected(folder)
        again, peak_again = collected(folder)
        (folder / f"runs/{0:012x}" / "evaluation.json").write_text('{"coverage": 0.5}')
        one, _ = collected(folder)
    peak = max(peak, peak_again)
    rows = [{"first s": first, "again s": again, "after one change s": one, "peak GiB": peak}]
    show(f"c2g collect, {runs} runs x {TAGS} scalars x {STEPS} steps", rows)
    if not quick:
        settings = {"runs": runs, "tags": TAGS, "steps": STEPS, "seeds": SEEDS}
        print(f"written: {write_result('collect', settings, rows=rows)}")


if __name__ == "__main__":
    main()
