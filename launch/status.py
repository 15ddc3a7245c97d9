"""``c2g status DIR``: state of a study's tasks, from its files and the scheduler's queue. Writes nothing."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hpc_c2g.errors import UserError
from hpc_c2g.monitoring.signatures import BY_NAME
from hpc_c2g.scheduling.queue import Entry, Queue
from hpc_c2g.studies.study import read_study
from hpc_c2g.studies.task_status import ACTIVE, STATES, Progress, TaskStatus, progress, read_statuses
from launch._compose.arguments import as_overrides
from launch._compose.cli import run_verb, user_errors

STYLES = {"failed": "red", "blocked": "red", "lost": "red", "running": "green", "done": "dim"}
SHOWN = 30
"""Number of tasks that are listed without ``--all``."""


@dataclass
class StatusConfig:
    """A study, and how to show it.

    Attributes:
        study_dir: Folder of the study.
        json: Print every task as JSON.
        all: List every task, not only those that run or are in trouble.
        watch: Seconds between refreshes, until all tasks are done; 0 shows the state once.
    """

    study_dir: str = "???"
    json: bool = False
    all: bool = False
    watch: float = 0.0

    def __post_init__(self) -> None:
        if self.watch < 0:
            raise UserError(f"watch={self.watch} is negative", "give seconds, or leave it out")


def queue_of(cluster: str) -> tuple[dict[str, Entry] | None, str]:
    """Return (the scheduler's queue, a warning); no queue if the study runs on this machine or the scheduler does not answer."""
    if cluster in ("local", "debug"):
        return None, ""
    try:
        return Queue().query(), ""
    except UserError as error:
        return None, " ".join(str(error).split())


def counts(statuses: Sequence[TaskStatus]) -> dict[str, dict[str, int]]:
    """Return the number of tasks of each stage in each state."""
    found: dict[str, Counter[str]] = {}
    for status in statuses:
        found.setdefault(status.task.stage, Counter())[status.state] += 1
    return {stage: {s: n for s in STATES if (n := number[s])} for stage, number in found.items()}


def summary_line(statuses: Sequence[TaskStatus]) -> str:
    """Return the number of tasks in each state, in one line."""
    total = Counter(s.state for s in statuses)
    return ", ".join(f"{total[s]} {s}" for s in STATES if total[s])


def seconds_left(statuses: Sequence[TaskStatus]) -> dict[str, float | None]:
    """Return per stage: tasks left times the median seconds of those done, over the number that runs; None if none is done."""
    left: dict[str, float | None] = {}
    for stage in dict.fromkeys(s.task.stage for s in statuses):
        own = [s for s in statuses if s.task.stage == stage]
        to_come = sum(s.state not in ("done", "failed", "blocked", "cancelled") for s in own)
        took = [s.seconds for s in own if s.state == "done" and s.seconds is not None]
        at_work = max(1, sum(s.state == "running" for s in own))
        left[stage] = 0.0 if not to_come else statistics.median(took) * to_come / at_work if took else None
    return left


def counts_table(folder: Path, statuses: Sequence[TaskStatus]) -> Table:
    """Return a table with a line per stage."""
    out = Table(title=str(folder))
    always = ("pending", "running", "done", "failed", "requeued")
    shown = [state for state in STATES if state in always or any(s.state == state for s in statuses)]
    for column in ("stage", *shown, "ETA"):
        out.add_column(column, justify="left" if column == "stage" else "right")
    left = seconds_left(statuses)
    for stage, number in counts(statuses).items():
        cells = [Text(str(number.get(s, "")), style=STYLES.get(s, "")) for s in shown]
        out.add_row(stage, *cells, _duration(left[stage]))
    return out


def tasks_table(folder: Path, statuses: Sequence[TaskStatus], everything: bool) -> Table:
    """Return a table with a line per task that runs or is in trouble, or per task if ``everything``."""
    troubled = [s for s in statuses if everything or s.alarms or s.state not in ("done", "new", "pending")]
    out = Table()
    for column in ("stage", "run", "point", "state", "tries", "step", "residual", "alarms", "job", "why"):
        out.add_column(column, justify="right" if column in ("tries", "step", "residual") else "left")
    for status in troubled if everything else troubled[:SHOWN]:
        last = progress(folder, status.task) if status.task.stage == "train" else None
        step, value = (str(last.step), f"{last.residual:.4f}") if last else ("", "")
        fired = "\n".join(_alarms(status, last))
        state = Text(status.state, style=STYLES.get(status.state, ""))
        out.add_row(
            status.task.stage,
            status.task.id,
            status.task.label,
            state,
            str(status.attempts),
            step,
            value,
            Text(fired, style="yellow"),
            status.job,
            status.reason,
        )
    if len(troubled) > SHOWN and not everything:
        out.caption = f"{len(troubled) - SHOWN} more: --all lists them"
    return out


def _alarms(status: TaskStatus, last: Progress | None) -> tuple[str, ...]:
    """Return the failure signatures that fire now, or fired when the run ended."""
    return last.alarms if last and status.state in ACTIVE else status.alarms


def advice(folder: Path, statuses: Sequence[TaskStatus]) -> list[str]:
    """Return a line for each failure signature that fires in a run, or fired when one ended."""
    at_work = [s for s in statuses if s.state == "running" and s.task.stage == "train"]
    found = {name for s in statuses for name in s.alarms} | {
        name for s in at_work for name in _alarms(s, progress(folder, s.task))
    }
    return [f"{name}: {s.reason} -- {s.advice}" for name, s in BY_NAME.items() if name in found]


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes = round(seconds / 60)
    return (
        ""
        if not seconds
        else f"{seconds:.0f} s"
        if seconds < 90
        else f"{minutes} min"
        if minutes < 90
        else f"{minutes / 60:.1f} h"
    )


def as_json(folder: Path, statuses: Sequence[TaskStatus], warning: str) -> dict[str, Any]:
    """Return the state of every task as plain values."""
    tasks: list[Mapping[str, Any]] = []
    for status in statuses:
        last = progress(folder, status.task) if status.task.stage == "train" and status.state != "new" else None
        tasks.append(
            {
                "stage": status.task.stage,
                "id": status.task.id,
                "folder": status.task.folder,
                "point": status.task.label,
                "state": status.state,
                "attempts": status.attempts,
                "failures": status.failures,
                "job": status.job,
                "reason": status.reason,
                "step": last.step if last else None,
                "residual": last.residual if last else None,
                "alarms": list(_alarms(status, last)),
                "upstream": list(status.task.upstream),
            }
        )
    return {
        "study_dir": str(folder),
        "warning": warning or None,
        "counts": counts(statuses),
        "seconds_left": seconds_left(statuses),
        "tasks": tasks,
    }


def status(config: StatusConfig) -> None:
    """Print the state."""
    folder = Path(config.study_dir)
    cluster = read_study(folder).cluster

    def now() -> tuple[list[TaskStatus], str]:
        queue, warning = queue_of(cluster)
        return read_statuses(folder, queue), warning

    def picture(statuses: Sequence[TaskStatus], warning: str) -> Group:
        parts: list[Any] = [counts_table(folder, statuses)]
        table = tasks_table(folder, statuses, config.all)
        parts += [table] if table.row_count else []
        parts += [Text(line, style="yellow") for line in advice(folder, statuses)]
        return Group(*parts, *([Text(f"warning: {warning}", style="yellow")] if warning else []))

    statuses, warning = now()
    if config.json:
        print(json.dumps(as_json(folder, statuses, warning), indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    if not config.watch:
        console.print(picture(statuses, warning))
        return
    with Live(picture(statuses, warning), console=console, auto_refresh=False) as live:
        while any(s.state in (*ACTIVE, "new") for s in statuses):
            time.sleep(config.watch)
            statuses, warning = now()
            live.update(picture(statuses, warning), refresh=True)


def main() -> None:
    """Run the verb."""
    with user_errors("status"):
        overrides = as_overrides(sys.argv[1:], StatusConfig, ["study_dir"])
    run_verb("status", StatusConfig, status, overrides=overrides)


if __name__ == "__main__":
    main()
