"""Cost of a study beyond its runs: ``c2g status`` on 10,000 runs, planning a grid, and the way from submission to the first step.

``python -m benchmarks.studies [--runs 10000] [--quick]``. The way to the first step needs a Slurm (``make slurm-up``), else it is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import show, write_result
from hpc_c2g.studies.config import StudyConfig
from hpc_c2g.studies.ledger import Ledger
from hpc_c2g.studies.reports import Report, load_report, write_report
from hpc_c2g.studies.study import StudyFile, save_study
from hpc_c2g.studies.tasks import Task, write_spec

ROOT = Path(__file__).parents[1]
REPEATS = 5


def command(*arguments: str) -> float:
    """Wall seconds of ``c2g``, its interpreter's start included."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "launch", *arguments], check=True, capture_output=True, cwd=ROOT)
    return time.perf_counter() - began


def big_study(folder: Path, runs: int, absorbed: bool) -> Path:
    """Write a study of finished training runs; the ledger holds their states, or must read the reports."""
    tasks = {
        f"{i:012x}": Task(f"{i:012x}", "train", f"runs/{i:012x}", {"seed": i}, points=({"seed": str(i)},))
        for i in range(runs)
    }
    folder.mkdir(parents=True)
    ledger = save_study(folder, StudyFile(StudyConfig(name="big")), {})
    ledger.add(tasks.values(), 2)
    reports = []
    for task in tasks.values():
        (folder / task.folder).mkdir(parents=True)
        report = Report(task.id)
        report.next_attempt("1_0", "n1", 0)
        report.end("done")
        reports.append(report)
        if not absorbed:
            write_spec(folder, task)
            write_report(folder, task, report)
    if absorbed:
        ledger.report(reports)
    else:  # handed out, and never looked at since
        with ledger._open() as connection:
            connection.execute("update tasks set job = '1_0', submission = 'x'")
    return folder


def to_first_step(scratch: Path) -> dict[str, float] | None:
    """Medians over runs, in seconds: what submitting, starting, importing and holding a run cost; None without a Slurm."""
    if shutil.which("squeue") is None or subprocess.run(["squeue", "-h"], capture_output=True).returncode:
        return None
    study = scratch / "first"
    grid = [
        "data.classes=[0,1]",
        "data.train_size=20",
        "model.width=8",
        "fit.target_margin=3",
        "global_batch=8",
        "alpha.init=-1",
    ]
    sweep = [
        "sweep",
        "study=batch_scaling",
        "study.stages=[classifier,train]",
        f"study_dir={study}",
        "cluster=local_slurm",
        *grid,
    ]
    sweep += ["steps=20", "seed=0", "parallel=1", f"train.seed=range({REPEATS})"]
    submit = command(*sweep)
    while subprocess.run(["squeue", "-h"], capture_output=True, text=True).stdout.strip():
        time.sleep(1)
    found: dict[str, list[float]] = {"import": [], "hold": [], "work": [], "begin": [], "after": []}
    for row in Ledger(study).rows():
        report = load_report(study / row.folder / f"{row.stage}.report.json", row.id)
        if row.stage != "train" or report is None or report.ended is None:
            continue
        job = row.job
        out = subprocess.run(
            ["sacct", "-n", "-X", "-P", "-j", job, "-o", "Start,End"], capture_output=True, text=True
        ).stdout
        with contextlib.suppress(ValueError):
            start, end = (time.mktime(time.strptime(t, "%Y-%m-%dT%H:%M:%S")) for t in out.strip().split("|"))
            found["begin"].append(report.began - start)
            found["after"].append(end - report.ended)
        for phase in ("import", "hold", "work"):
            found[phase].append(report.seconds[phase])
    return {"submit": submit, **{k: statistics.median(v) for k, v in found.items() if v}}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies", description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--quick", action="store_true", help="200 runs, and no result file")
    args = parser.parse_args()
    runs = 200 if args.quick else args.runs
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="studies-") as name:
        known = big_study(Path(name) / "known", runs, absorbed=True)
        untold = big_study(Path(name) / "untold", runs, absorbed=False)
        rows: list[dict[str, Any]] = [
            {
                "what": f"c2g status, {runs} runs in the ledger",
                "seconds": min(command("status", str(known)) for _ in range(REPEATS)),
            },
            {
                "what": "the same, reports not yet in the ledger",
                "seconds": min(command("status", str(untold)) for _ in range(REPEATS)),
            },
            {
                "what": "c2g --version, the interpreter's start",
                "seconds": min(command("--version") for _ in range(REPEATS)),
            },
        ]
        grid = [
            "sweep",
            "study=batch_scaling",
            f"study_dir={name}/plan",
            f"train.seed=range({min(runs, 450)})",
            "seed=0",
            "global_batch=8",
        ]
        rows.append({"what": f"c2g sweep --dry-run of {min(runs, 450)} runs", "seconds": command(*grid, "--dry-run")})
        first = to_first_step(Path(name))
        rows += [{"what": f"on Slurm, {phase}", "seconds": value} for phase, value in (first or {}).items()]
    show("what a study costs beyond its runs", rows)
    if first is None:
        print("no Slurm answers: the way to the first step was not measured")
    if not args.quick:
        write_result("studies", {"runs": runs}, rows=rows)


if __name__ == "__main__":
    main()
