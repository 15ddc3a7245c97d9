"""Command-line syntax of the verbs (``c2g status DIR --json``), translated into Hydra's ``field=value``."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import get_type_hints

from hpc_c2g.errors import UserError

WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--info", "-i")
INFORMATION = ("--resolve", *WITH_VALUE)
"""Flags of Hydra that print the composed configuration."""
HYDRA_FLAGS = ("--help", "-h", "--hydra-help", "--version", *INFORMATION)


def as_overrides(argv: Sequence[str], schema: type, positional: Sequence[str] = ()) -> list[str]:
    """Return ``field=value`` for flags (``--dry-run``, ``--only failed``) and for words in order (``DIR``); Hydra's own flags come last.

    Args:
        argv: Command line after the verb.
        schema: Dataclass with the verb's fields.
        positional: Fields that words without ``=`` set in order; the last takes all remaining words if it is a list.

    Raises:
        UserError: A flag is unknown or has no value, or there are more words than fields.
    """
    types, names = get_type_hints(schema), {f.name for f in fields(schema)}
    words: dict[str, list[str]] = {}
    result, hydra, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        field = name.replace("-", "_")
        if word.split("=")[0] in HYDRA_FLAGS:
            hydra.append(word)
            if word in WITH_VALUE and rest:
                hydra.append(rest.pop(0))
        elif word.startswith("--") and field in names:
            if not equals:
                value = "true" if types[field] is bool else rest.pop(0) if rest else ""
            if not value:
                raise UserError(f"{word} has no value", f"write {word} VALUE")
            result.append(f"{field}={quoted(value)}")
        elif word.startswith("-"):
            raise UserError(f"{word} is unknown", "see --help")
        elif re.match(r"[+~]*[A-Za-z_][\w./@]*=", word) or word.startswith("~"):
            result.append(word)
        else:
            fitting = next((p for p in positional if p not in words or types[p] == list[str]), None)
            if fitting is None:
                raise UserError(f"{word!r} is one word too many", "write field=value; see --help")
            words.setdefault(fitting, []).append(word)
    for name, values in words.items():
        several = types[name] == list[str]
        result.append(f"{name}=[{','.join(map(quoted, values))}]" if several else f"{name}={quoted(values[0])}")
    return result + hydra  # argparse, which Hydra reads with, refuses overrides that flags split


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the overrides, and the names of Hydra's flags without their values."""
    words: list[str] = []
    flags: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            words.append(word)
            continue
        flags.append(word.partition("=")[0])
        if word in WITH_VALUE and rest:
            rest.pop(0)
    return words, flags


def home_expanded(word: str) -> str:
    """Expand ``~`` to the home folder at the beginning of an override's value and of each entry of a list, which no shell does."""
    home = os.path.expanduser("~")
    return re.sub(r"(?<=[=\[,])(?P<mark>[\"']?)~(?=/)", lambda m: m["mark"] + home, word)


def quoted(value: str) -> str:
    """Return a value in Hydra's syntax, whatever characters it has."""
    if re.fullmatch(r"[A-Za-z0-9_./:-]+", value):
        return value
    # within quotes Hydra reads a backslash only before a quote
    inner = re.sub(r'(\\*)"', lambda m: m[1] * 2 + '\\"', value)
    inner = re.sub(r"(\\+)$", lambda m: m[1] * 2, inner)
    return f'"{inner}"'


def split_grid(overrides: Sequence[str], schema: type) -> tuple[list[str], list[str]]:
    """Return (the verb's own overrides, those of the grid); a field that ``schema`` lacks belongs to the grid.

    ``cluster=NAME`` is short for ``cluster.name=NAME`` (Hydra would take it for a choice of the group of `c2g plan`), and
    ``profile.FIELD`` for ``cluster.profile.FIELD``, ``experiment=NAME`` for ``study=experiment/NAME``.
    """
    own: list[str] = []
    grid: list[str] = []
    names = {f.name for f in fields(schema)}
    for word in overrides:
        short = re.sub(r"^cluster=", "cluster.name=", re.sub(r"^profile\.", "+cluster.profile.", word))
        short = re.sub(r"^experiment=", "study=experiment/", short)
        top = re.split(r"[.@/=]", short.lstrip("+~"))[0]
        mine = word.startswith("-") or top in names or (bool(own) and own[-1] in WITH_VALUE)
        (own if mine else grid).append(short)
    return own, grid
