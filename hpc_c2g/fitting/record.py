"""Training data of a classifier: from the fit record beside its bundle, checked against the user's settings."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from hpc_c2g.data.config import DataConfig
from hpc_c2g.errors import UserError
from hpc_c2g.fitting.make import read_record


def fitted_data(classifier: str, asked: DataConfig | None) -> DataConfig:
    """Return the data configuration of the classifier's training part.

    Fields of ``asked`` left at their defaults come from the record; ``root`` may differ, since folders differ between machines.

    Raises:
        UserError: neither record nor ``asked``, or the two contradict each other.
    """
    record = read_record(Path(classifier)).get("settings", {})
    recorded = DataConfig(**record["data"]) if record and record["fit"]["name"] != "import" else None
    if asked is None:
        if recorded is None:
            raise UserError(
                f"classifier={classifier} has no record of its training data",
                "add data=NAME (and data.train_size=N)",
            )
        return recorded
    if recorded is None:
        return asked
    default = DataConfig(name=asked.name)
    for field in fields(DataConfig):
        value, there = getattr(asked, field.name), getattr(recorded, field.name)
        if field.name == "root" or value == there or (field.name != "name" and value == getattr(default, field.name)):
            continue
        raise UserError(
            f"data.{field.name}={value}, but the classifier was fitted with {there}",
            f"drop data.{field.name}, or name the classifier that was fitted to this data",
        )
    return replace(recorded, root=asked.root if asked.root != default.root else recorded.root)
