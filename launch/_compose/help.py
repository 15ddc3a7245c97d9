"""The text of ``c2g VERB --help``: usage, choices, and a line per field, generated from the dataclasses."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from launch._compose.cli import config_folder

MISSING = "required"


def help_text(verb: str, overrides: Sequence[str] = (), width: int | None = None) -> str:
    """Return the help of a verb with the given choices.

    Args:
        verb: Name of the verb; its dataclasses are registered.
        overrides: Overrides of the command line, such as ``generator=conv``: their fields are listed.
        width: Columns of the text; None takes the terminal's.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base=None, config_dir=str(config_folder())):
        config = compose(verb, overrides=list(overrides), return_hydra_config=True)
    choices = {group: choice for group, choice in config.hydra.runtime.choices.items() if "/" not in group}
    header, footer = config.hydra.help.header.rstrip(), config.hydra.help.footer.rstrip()
    width = width or min(shutil.get_terminal_size((120, 24)).columns, 140)
    lines = []
    for group, choice in sorted(choices.items()):
        names = "|".join(sorted(file.stem for file in (config_folder() / group).glob("*.yaml")))
        lines += _entry(f"{group}={names}", f"now {choice}" if choice else "", width)
    with_choices = ["", "Choices:", *lines] if lines else []
    rows = [line for name, value, text in _rows(config) for line in _entry(f"{name}={value}", text, width)]
    return "\n".join([header, *with_choices, "", "Fields and their values:", *rows, "", footer])


def _rows(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield dotted name, value and description of every field."""
    schema = OmegaConf.get_type(config)
    descriptions = described(schema) if is_dataclass(schema) else {}
    for key in config:
        name = str(key)
        if name == "hydra" and not prefix:
            continue
        text = descriptions.get(name, "")
        if OmegaConf.is_missing(config, name):
            yield f"{prefix}{name}", "", f"{text} ({MISSING})".strip()
            continue
        value = config[key]
        if isinstance(value, DictConfig) and len(value):
            yield from _rows(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _shown(value), text


def _shown(value: Any) -> str:
    """Return a value in the syntax of the command line."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value).replace("'", "").replace(", ", ",")


def described(schema: type) -> dict[str, str]:
    """Return the first sentence of each entry under ``Attributes:`` in the docstrings of a dataclass and of those that it extends."""
    found: dict[str, str] = {}
    for cls in reversed(schema.__mro__):
        if is_dataclass(cls):
            section = re.search(r"^Attributes:\n((?:    .*\n?|\n)*)", textwrap.dedent(_docstring(cls)), re.MULTILINE)
            for name, text in re.findall(
                r"^(\w+): (.*(?:\n {2,}.*)*)", textwrap.dedent(section[1] if section else ""), re.M
            ):
                found[name] = first_sentence(text)
    return {field.name: found[field.name] for field in fields(schema) if field.name in found}


def _docstring(cls: type) -> str:
    """Return a docstring with all lines indented alike."""
    first, _, rest = (cls.__doc__ or "").partition("\n")
    return f"{first}\n{textwrap.dedent(rest)}"


def first_sentence(text: str) -> str:
    """Return the text up to the first full stop that ends a sentence, in one line and without the marks of inline code."""
    whole = " ".join(text.split()).replace("``", "")
    return re.split(r"(?<=[\w)]\.)\s+(?=[A-Z0-9])", whole, maxsplit=1)[0].rstrip(".")


def _entry(name: str, text: str, width: int) -> list[str]:
    """Return the lines of one field; its description is wrapped in a column of its own."""
    column = 40
    body = textwrap.wrap(text, max(width - column - 2, 30)) or [""]
    head = f"  {name}"
    if len(head) >= column:
        return [head, *(f"{'':<{column}}  {line}" for line in body if line)]
    return [f"{head:<{column}}  {body[0]}".rstrip(), *(f"{'':<{column}}  {line}" for line in body[1:])]
