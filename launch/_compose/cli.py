"""Composition of a command line into a typed configuration, and one-line errors; shared by all verbs."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

import hpc_c2g
from hpc_c2g.errors import UserError
from hpc_c2g.renamed import refuse_old_name, refuse_old_value
from hpc_c2g.training.preemption import EXIT_PREEMPTED, Preempted
from launch._compose.arguments import INFORMATION, home_expanded, quoted, split_flags

T = TypeVar("T")
EXIT_USER_ERROR = 2


def config_folder() -> Path:
    """Return the folder of the configs: inside the package in an installed wheel, beside it in a checkout."""
    package = Path(hpc_c2g.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def run_verb(
    verb: str,
    schema: type[T],
    main: Callable[[T], None],
    groups: dict[str, dict[str, type]] | None = None,
    overrides: list[str] | None = None,
) -> None:
    """Compose ``configs/<verb>.yaml`` with the overrides and call ``main`` with the typed configuration.

    Args:
        verb: Name of the verb and of its config.
        schema: Dataclass of the whole configuration.
        main: Function that runs the verb.
        groups: Dataclass of each choice, by Hydra group.
        overrides: Overrides of the fields; None takes the command line's.
    """
    register(verb, schema, groups or {})
    argv = [home_expanded(word) for word in (sys.argv[1:] if overrides is None else overrides)]
    sys.argv = [f"c2g {verb}", *argv]
    warnings.simplefilter("ignore", FutureWarning)  # between libraries: no user can fix them
    words, flags = split_flags(argv)

    def run(config: DictConfig) -> None:
        with user_errors(verb):
            main(typed(config, schema))  # imports torch: late, so that a mistake is reported at once

    with user_errors(verb):
        if {"--help", "-h"} & set(flags):
            checked(verb, words, schema)
            from launch._compose.help import help_text  # depends on this module

            print(help_text(verb, words), flush=True)
            return
        config = None if set(flags) - set(INFORMATION) else checked(verb, words, schema)
    if config is not None and not flags:
        run(config)
    else:
        hydra.main(version_base=None, config_path=str(config_folder()), config_name=verb)(run)()


@contextlib.contextmanager
def user_errors(verb: str) -> Iterator[None]:
    """Context in which a user's mistake or a signal ends the process with one line and a dedicated exit code."""
    try:
        yield
    except UserError as error:
        print(f"c2g {verb}: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except Preempted as stop:
        print(f"c2g {verb}: {stop}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT if stop.signal_name == "SIGINT" else EXIT_PREEMPTED)
    except KeyboardInterrupt:
        print(f"c2g {verb}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter fails again at exit
        sys.exit(128 + signal.SIGPIPE)


def register(verb: str, schema: type, groups: dict[str, dict[str, type]]) -> None:
    """Register the dataclasses with Hydra: ``<verb>_schema`` and ``<group>/<choice>_schema``."""
    store = ConfigStore.instance()
    whole = OmegaConf.structured(schema)
    for group, choices in groups.items():
        if len(set(choices.values())) > 1:  # other choices have dataclasses that do not extend the default's
            whole[group] = MISSING
        for choice, node in choices.items():
            store.store(group=group, name=f"{choice}_schema", node=node)
    store.store(name=f"{verb}_schema", node=whole)


def typed(config: DictConfig, schema: type[T]) -> T:
    """Return the dataclass of a composed configuration, every ``__post_init__`` check passed.

    Raises:
        UserError: A mandatory value is missing, or a check failed.
    """
    try:
        missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
    except InterpolationResolutionError as error:
        raise UserError(
            f"{error.full_key} cannot be read: {str(error).splitlines()[0]}", "write a $ that is text as \\$ in quotes"
        ) from error
    if missing:
        raise UserError(f"{missing[0]} is not given", f"add {missing[0]}=VALUE to the command line")
    try:
        result = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        raise UserError(str(error).splitlines()[0], "give it on the command line") from error
    assert isinstance(result, schema)
    extra = set(keys(OmegaConf.to_container(config))) - set(keys(asdict(result)))  # type: ignore[call-overload]
    if extra:  # Hydra's +key=value adds fields that no dataclass has
        for key in sorted(extra, reverse=True):  # fields before their group
            refuse_old_name(key, str(OmegaConf.select(config, key)))
        raise UserError(f"there is no setting {min(extra)!r}", "drop it; see --help for what can be set")
    return result


def composed(verb: str, overrides: list[str]) -> DictConfig:
    """Compose ``configs/<verb>.yaml`` with overrides, also from inside another verb."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base=None, config_dir=str(config_folder())):
            return compose(verb, overrides=overrides)
    finally:
        GlobalHydra.instance().clear()


def checked(verb: str, overrides: list[str], schema: type) -> DictConfig:
    """Return the composed configuration.

    Raises:
        UserError: A field or choice is unknown, or a value has the wrong type; Hydra's several lines become one that names the fix.
    """
    chosen = {override.partition("=")[0] for override in overrides}
    optional = {f.name for f in fields(schema) if f.default is None}
    for group in sorted({name.partition(".")[0] for name in chosen if "." in name} - chosen):
        if group in optional and (config_folder() / group).is_dir():
            raise UserError(f"a field of {group} is set, but no {group} is chosen", f"add {group}=NAME")
    for override in overrides:
        refuse_old_value(*override.partition("=")[::2])
    try:
        return composed(verb, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        known = list(keys(OmegaConf.to_container(composed(verb, []))))
        for key, _, value in (override.lstrip("+").partition("=") for override in overrides):
            if key not in known:
                refuse_old_name(key, value)
        raise readable(error, known) from error


def readable(error: Exception, known: list[str]) -> UserError:
    """Return an error of Hydra or OmegaConf as one line that names the fix."""
    if isinstance(error, OverrideParseException):
        field, _, value = str(error.override).partition("=")
        text_of = f", or as text {shlex.quote(f'{field}={quoted(value)}')}" if value and value[0] not in "[{" else ""
        return UserError(
            f"{error.override!r} cannot be read", f"write field=value, a list as 'field=[1,2]' in quotes{text_of}"
        )
    text = f"{error}\n{error.__cause__ or ''}"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown and "append" in text:
        refuse_old_name(unknown[1])
        close = difflib.get_close_matches(unknown[1], known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "see --help for what can be set"
        return UserError(f"there is no setting {unknown[1]!r}", hint)
    choice = re.search(r"(?:Could not find|In '[^']+': Could not find) '([^']+)'", text)
    if choice:
        options = re.search(r"Available options in '[^']+':\s*((?:\s+\S+)+?)\n(?:\S|$)", text)
        names = [n for n in options[1].split() if not n.endswith("_schema")] if options else []
        group, _, name = choice[1].rpartition("/")
        return UserError(f"{group}={name} is unknown", f"choose one of {', '.join(names)}" if names else "see --help")
    wrong = re.search(r"Value '?(.+?)'? (?:of type '\w+' )?(could not be converted to \w+|is not .+)", text)
    key = re.search(r"full_key: (\S+)", text)
    if wrong and key:
        return UserError(f"{key[1]}={wrong[1]} {wrong[2]}", f"give {key[1]} a value of the right type")
    lines = [line.strip() for line in text.splitlines() if line.strip() and line.strip() != "None"]
    return UserError(" ".join(lines[:2]), "see --help for what can be set")


def keys(value: Any, prefix: str = "") -> Any:
    """Yield the dotted names of all fields of nested plain values."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{prefix}{key}"
            yield from keys(item, f"{prefix}{key}.")
