"""A study's results as files: results.json, results.csv and results.md."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_c2g import markdown
from hpc_c2g.files import write_atomically
from hpc_c2g.reporting.results import Results, Row, bound_groups


def write_tables(study: Path, name: str, found: Results) -> list[str]:
    """Write the tables into the study's folder; returns the files' names.

    Raises:
        UserError: A file cannot be written.
    """
    content = {
        "study": name,
        "uses_real_data": True,
        "runs": found.rows,
        "groups": found.groups,
        "sampling": found.sampling,
        "left_out": found.left_out,
    }
    files = {
        "results.md": as_markdown(name, found).encode(),
        "results.csv": as_csv(found.rows).encode(),
        "results.json": json.dumps(content, indent=1).encode(),
    }
    for file, text in files.items():
        if not (study / file).is_file() or (study / file).read_bytes() != text:
            write_atomically(study / file, text)
    return list(files)


def columns(found: Sequence[Row]) -> list[str]:
    """Return every field that occurs in a row."""
    return list(dict.fromkeys(k for row in found for k in row))


def as_csv(found: Sequence[Row]) -> str:
    """Return all rows as CSV, a column per field that occurs."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns(found), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return out.getvalue()


def shown(grouped: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return columns and cells of the table of groups, mean ± standard deviation."""
    names = [c for c in columns(grouped) if not c.endswith("_sd")]
    return names, [[cell(row.get(c), row.get(f"{c}_sd")) for c in names] for row in grouped]


def cell(value: Any, deviation: Any = None) -> str:
    """Return a value as text, with its standard deviation if there is one."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if deviation is None else f"{value:.4g} ± {deviation:.2g}"
    return str(value)


def as_markdown(name: str, found: Results) -> str:
    """Return the table of groups, the sampling errors, and the missing results."""
    lines = [
        f"# {name}",
        "",
        "Means ± standard deviations over runs that differ in their seed alone; evaluation uses real data.",
        "",
    ]
    for rows in (found.groups, bound_groups(found.sampling)):
        if rows:
            names, cells = shown(rows)
            lines += [*markdown.table(names, cells), ""]
    if found.left_out:
        lines += ["Left out:", "", *(f"- {text}" for text in found.left_out), ""]
    return "\n".join(lines)
