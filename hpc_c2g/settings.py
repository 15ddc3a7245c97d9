"""Typed settings from plain values, such as those of a file: the same checks as on the command line, without Hydra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]  # OmegaConf does not wrap it

from hpc_c2g.errors import UserError
from hpc_c2g.renamed import VALUES, refuse_old_name, refuse_old_value

T = TypeVar("T")


def from_plain(
    schema: type[T], values: Mapping[str, Any], choices: Mapping[str, Mapping[str, type]] | None = None
) -> T:
    """Build the dataclass from plain values, with every ``__post_init__`` check.

    Args:
        schema: Dataclass of the settings.
        values: Nested values by field name.
        choices: Dataclasses by ``name``, for each field that has several.

    Raises:
        UserError: an unknown key, or a value of the wrong type or out of range.
    """
    for key, value in VALUES:
        if _lookup(values, key) == value:
            refuse_old_value(key, value)
    try:
        node = OmegaConf.structured(schema)
        for field, kinds in (choices or {}).items():
            name: str = (values.get(field) or {}).get("name", node[field].name)
            if name not in kinds:
                raise UserError(f"{field}.name={name!r} is unknown", f"choose one of {', '.join(kinds)}")
            node[field] = OmegaConf.structured(kinds[name])
        result = OmegaConf.to_object(OmegaConf.merge(node, dict(values)))
    except OmegaConfBaseException as error:
        if isinstance(error, ConfigKeyError):
            refuse_old_name(*_first_leaf(str(error.full_key), values))
        raise UserError(f"the settings do not fit: {str(error).splitlines()[0]}", "correct the named field") from error
    assert isinstance(result, schema)
    return result


def _lookup(values: Any, key: str) -> Any:
    """Value at a dotted key of nested mappings; None where there is none."""
    for name in key.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def _first_leaf(key: str, values: Mapping[str, Any]) -> tuple[str, str]:
    """Dotted key and value of the first field of a group, or of the key itself where it is no group."""
    value = _lookup(values, key)
    while isinstance(value, Mapping) and value:
        name, value = next(iter(value.items()))
        key = f"{key}.{name}"
    return key, str(value)


def read_plain(file: Path, absent: str, begin: str, restore: str) -> dict[str, Any]:
    """Read the plain values of a yaml file.

    Args:
        file: Path of the file.
        absent: Beginning of the error if it cannot be read, such as ``run_dir=x is no run``.
        begin: Hint of that error.
        restore: Hint if the file is damaged.

    Raises:
        UserError: the file cannot be read, or holds no settings.
    """
    try:
        values = OmegaConf.to_container(OmegaConf.create(file.read_text()))
    except OSError as error:
        raise UserError(f"{absent}: {file.name} cannot be read ({error.strerror})", begin) from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{file} is damaged: {str(error).splitlines()[0]}", restore) from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: it holds no settings", restore)
    return {str(k): v for k, v in values.items()}
