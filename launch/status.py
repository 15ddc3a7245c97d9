"""``c2g status DIR``: where a study stands, from its own files and the scheduler's queue. Writes nothing."""

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
from hpc_c2g.studies.ledger import Ledger
from hpc_c2g.studies.study import read_study
from hpc_c2g.studies.view import ACTIVE, STATES, Progress, View, look, progress
from launch._compose.arguments import as_overrides
from launch._compose.cli import run_verb, user_errors

STYLES = {"failed": "red", "blocked": "red", "lost": "red", "running": "green", "done": "dim"}
SHOWN = 30
"""Tasks that are listed unless all are asked for."""


@dataclass
class StatusConfig:
    """Of which study, and how.

    Attributes:
        study_dir: its folder.
        json: a machine-readable answer, every task in it.
        all: list every task, not those alone that are at work or in trouble.
        watch: look again every so many seconds, until all is done; 0: once.
    """

    study_dir: str = "???"
    json: bool = False
    all: bool = False
    watch: float = 0.0

    def __post_init__(self) -> None:
        if self.watch < 0:
            raise UserError(f"watch={self.watch} is negative", "give seconds, or leave it out")


def queue_of(cluster: str) -> tuple[dict[str, Entry] | None, str]:
    """(the scheduler's queue, a warning): no queue where the study runs on this machine, or the scheduler does not answer."""
    if cluster in ("local", "debug"):
        return None, ""
    try:
        return Queue().ask(), ""
    except UserError as error:
        return None, " ".join(str(error).split())


def counts(views: Sequence[View]) -> dict[str, dict[str, int]]:
    """How many tasks of each stage are in each state."""
    found: dict[str, Counter[str]] = {}
    for view in views:
        found.setdefault(view.row.stage, Counter())[view.state] += 1
    return {stage: {s: n for s in STATES if (n := number[s])} for stage, number in found.items()}


def told(views: Sequence[View]) -> str:
    """All stages in a line."""
    total = Counter(v.state for v in views)
    return ", ".join(f"{total[s]} {s}" for s in STATES if total[s])


def seconds_left(views: Sequence[View]) -> dict[str, float | None]:
    """Per stage: tasks to come times the median of those done, over how many are at work; None where none is done."""
    left: dict[str, float | None] = {}
    for stage in dict.fromkeys(v.row.stage for v in views):
        own = [v for v in views if v.row.stage == stage]
        to_come = sum(v.state not in ("done", "failed", "blocked", "cancelled") for v in own)
        took = [s for v in own if v.state == "done" and (s := _seconds(v)) is not None]
        at_work = max(1, sum(v.state == "running" for v in own))
        left[stage] = 0.0 if not to_come else statistics.median(took) * to_come / at_work if took else None
    return left


def _seconds(view: View) -> float | None:
    if view.report and view.report.ended:
        return view.report.ended - view.report.began
    return view.row.seconds


def counts_table(folder: Path, views: Sequence[View]) -> Table:
    """A line per stage."""
    out = Table(title=str(folder))
    shown = [
        s
        for s in STATES
        if s in ("pending", "running", "done", "failed", "requeued") or any(v.state == s for v in views)
    ]
    for column in ("stage", *shown, "ETA"):
        out.add_column(column, justify="left" if column == "stage" else "right")
    left = seconds_left(views)
    for stage, number in counts(views).items():
        cells = [Text(str(number.get(s, "")), style=STYLES.get(s, "")) for s in shown]
        out.add_row(stage, *cells, _duration(left[stage]))
    return out


def tasks_table(folder: Path, views: Sequence[View], everything: bool) -> Table:
    """A line per task that is at work or in trouble, or per task."""
    troubled = [v for v in views if everything or v.alarms or v.state not in ("done", "new", "pending")]
    out = Table()
    for column in ("stage", "run", "point", "state", "tries", "step", "residual", "alarms", "job", "why"):
        out.add_column(column, justify="right" if column in ("tries", "step", "residual") else "left")
    for view in troubled if everything else troubled[:SHOWN]:
        last = progress(folder, view.row) if view.row.stage == "train" else None
        step, value = (str(last.step), f"{last.residual:.4f}") if last else ("", "")
        fired = "\n".join(_alarms(view, last))
        state = Text(view.state, style=STYLES.get(view.state, ""))
        out.add_row(
            view.row.stage,
            view.row.id,
            view.row.label,
            state,
            str(view.attempts),
            step,
            value,
            Text(fired, style="yellow"),
            _job(view),
            view.reason,
        )
    if len(troubled) > SHOWN and not everything:
        out.caption = f"{len(troubled) - SHOWN} more: --all lists them"
    return out


def _alarms(view: View, last: Progress | None) -> tuple[str, ...]:
    """Signatures of failure that fire now, or fired when the run ended."""
    return last.alarms if last and view.state in ACTIVE else view.alarms


def advice(folder: Path, views: Sequence[View]) -> list[str]:
    """A line for each signature that fires in a run that is at work, or fired when one ended."""
    at_work = [v for v in views if v.state == "running" and v.row.stage == "train"]
    found = {name for v in views for name in v.alarms} | {
        name for v in at_work for name in _alarms(v, progress(folder, v.row))
    }
    return [f"{name}: {s.reason} -- {s.advice}" for name, s in BY_NAME.items() if name in found]


def _job(view: View) -> str:
    return view.report.job if view.report else view.row.job


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


def as_json(folder: Path, views: Sequence[View], warning: str) -> dict[str, Any]:
    """Everything, plain."""
    tasks: list[Mapping[str, Any]] = []
    for view in views:
        last = progress(folder, view.row) if view.row.stage == "train" and view.state != "new" else None
        tasks.append(
            {
                "stage": view.row.stage,
                "id": view.row.id,
                "folder": view.row.folder,
                "point": view.row.label,
                "state": view.state,
                "attempts": view.attempts,
                "failures": view.failures,
                "job": _job(view),
                "reason": view.reason,
                "step": last.step if last else None,
                "residual": last.residual if last else None,
                "alarms": list(_alarms(view, last)),
                "upstream": list(view.row.upstream),
            }
        )
    return {
        "study_dir": str(folder),
        "warning": warning or None,
        "counts": counts(views),
        "seconds_left": seconds_left(views),
        "tasks": tasks,
    }


def status(config: StatusConfig) -> None:
    """Look, and show."""
    folder = Path(config.study_dir)
    cluster = read_study(folder).cluster

    def now() -> tuple[list[View], str]:
        queue, warning = queue_of(cluster)
        return look(folder, Ledger(folder).rows(), queue), warning

    def picture(views: Sequence[View], warning: str) -> Group:
        parts: list[Any] = [counts_table(folder, views)]
        table = tasks_table(folder, views, config.all)
        parts += [table] if table.row_count else []
        parts += [Text(line, style="yellow") for line in advice(folder, views)]
        return Group(*parts, *([Text(f"warning: {warning}", style="yellow")] if warning else []))

    views, warning = now()
    if config.json:
        print(json.dumps(as_json(folder, views, warning), indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    if not config.watch:
        console.print(picture(views, warning))
        return
    with Live(picture(views, warning), console=console, auto_refresh=False) as live:
        while any(v.state in (*ACTIVE, "new") for v in views):
            time.sleep(config.watch)
            views, warning = now()
            live.update(picture(views, warning), refresh=True)


def main() -> None:
    """Entry point."""
    with user_errors("status"):
        overrides = as_overrides(sys.argv[1:], StatusConfig, ["study_dir"])
    run_verb("status", StatusConfig, status, overrides=overrides)


if __name__ == "__main__":
    main()
