"""Cost of a study beyond its runs: ``c2g status`` on 10,000 runs, planning a grid, and the way from submission to the first step.

``python -m benchmarks.studies [--runs 10000] [--quick]``. The way to the first step needs a Slurm (``make slurm-up``), else it is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
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
from hpc_c2g.studies.journal import open_journal
from hpc_c2g.studies.reports import Report, read_report, write_report
from hpc_c2g.studies.study import StudyFile, save_study
from hpc_c2g.studies.submissions import Submission
from hpc_c2g.studies.task_status import read_statuses
from hpc_c2g.studies.tasks import Task
from launch._compose.grid import resolved

ROOT = Path(__file__).parents[1]
REPEATS = 5


def command(*arguments: str) -> dict[str, float]:
    """Return wall and CPU seconds of ``c2g``, its interpreter's start included."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "launch", *arguments], check=True, capture_output=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - began, "cpu_seconds": cpu}


def fastest(*arguments: str) -> dict[str, float]:
    """Return the smallest seconds of ``REPEATS`` calls of ``command``."""
    found = [command(*arguments) for _ in range(REPEATS)]
    return {key: min(f[key] for f in found) for key in found[0]}


def big_study(folder: Path, runs: int) -> Path:
    """Write a study of so many training runs with the settings of real ones, all submitted as one array and done."""
    config = resolved("train", ())
    tasks = {
        f"{i:012x}": Task(f"{i:012x}", "train", f"runs/{i:012x}", {**config, "seed": i}, points=({"seed": str(i)},))
        for i in range(runs)
    }
    folder.mkdir(parents=True)
    save_study(folder, StudyFile(StudyConfig(name="big")), tasks)
    journal = open_journal(folder)
    submission = Submission.of("big", list(tasks.values()), [2] * runs)
    journal.begin(submission)
    journal.submit(submission.token, "1")
    for i, task in enumerate(tasks.values()):
        report = Report(task.id, versions={"python": "3.11.2", "torch": "2.9.0", "hpc_c2g": "0.1.0"})
        report.next_attempt(f"1_{i}", "n1", 0)
        report.seconds = {"import": 1.3, "hold": 0.1, "work": 60.0}
        report.end("done")
        write_report(folder, task, report)
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
    submit = command(*sweep)["seconds"]
    while subprocess.run(["squeue", "-h"], capture_output=True, text=True).stdout.strip():
        time.sleep(1)
    found: dict[str, list[float]] = {"import": [], "hold": [], "work": [], "begin": [], "after": []}
    for status in read_statuses(study, None):
        report = read_report(study, status.task)
        if status.task.stage != "train" or report is None or report.ended is None:
            continue
        job = report.job
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
        study = big_study(Path(name) / "study", runs)
        rows: list[dict[str, Any]] = [
            {"what": f"c2g status, {runs} runs", **fastest("status", str(study))},
            {"what": "c2g --version, the interpreter's start", **fastest("--version")},
        ]
        grid = [
            "sweep",
            "study=batch_scaling",
            f"study_dir={name}/plan",
            f"train.seed=range({min(runs, 450)})",
            "seed=0",
            "global_batch=8",
        ]
        rows.append({"what": f"c2g sweep --dry-run of {min(runs, 450)} runs", **command(*grid, "--dry-run")})
        first = to_first_step(Path(name))
        rows += [{"what": f"on Slurm, {phase}", "seconds": value} for phase, value in (first or {}).items()]
    show("what a study costs beyond its runs", rows)
    if first is None:
        print("no Slurm answers: the way to the first step was not measured")
    if not args.quick:
        write_result("studies", {"runs": runs}, rows=rows)


if __name__ == "__main__":
    main()
