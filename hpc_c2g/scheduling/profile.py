"""Profile of a Slurm cluster in one yaml file. Every value that reaches a script is checked here; only ``setup`` is shell."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import hpc_c2g
from hpc_c2g.errors import UserError

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
_NAMES = rf"{_NAME}(,{_NAME})*"
_PATTERNS = {
    "name": (_NAME, "use letters, digits and . _ + -"),
    "partition": (_NAMES, "give a partition of `sinfo`, or several with commas"),
    "account": (_NAME, "give an account of `sacctmgr show associations`"),
    "qos": (_NAME, "give one of `sacctmgr show qos`"),
    "constraint": (r"[A-Za-z0-9_(\[][A-Za-z0-9_.+:,&|*()\[\]-]*", "join features of `sinfo -o %f` by & or |"),
    "nodelist": (r"[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]*", "give hosts such as gpu[01-04],gpu9"),
    "exclude": (r"[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]*", "give hosts such as gpu[01-04],gpu9"),
    "gpu_type": (_NAME, "give a type of `sinfo -o %G`, such as a100"),
    "network_interface": (r"[A-Za-z0-9_][A-Za-z0-9_.:-]*(,[A-Za-z0-9_][A-Za-z0-9_.:-]*)*", "give a name of `ip link`"),
    "cpu_bind": (r"[a-z][a-z_]*([,:][A-Za-z0-9_]+)*", "give cores, threads, sockets, or none to leave it to srun"),
}
_MODULE = r"[A-Za-z0-9_][A-Za-z0-9_.+/@:=-]*"
_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
_OPTION = r"[a-z][a-z0-9]+(-[a-z0-9]+)*"
_LEAST = {"gpus_per_task": 0, "cpus_per_task": 1, "time_minutes": 1, "signal_seconds": 1, "throttle": 1, "max_array": 1}
_LONGEST_SIGNAL = 65_535  # the limit of sbatch's --signal

_BASH_VARIABLES = re.compile(  # bash runs, rewrites or refuses these, so that the job would not see the value
    r"BASH.*|ENV|PS[0-4]|PROMPT_COMMAND|SHELLOPTS|POSIXLY_CORRECT|IFS|PPID|E?UID|GROUPS|DIRSTACK|FUNCNAME|FUNCNEST"
    r"|LINENO|S?RANDOM|SECONDS|EPOCHSECONDS|EPOCHREALTIME|HISTCMD|OPT(IND|ERR)|PIPESTATUS|COMP_WORDBREAKS|SHLVL|PWD|OLDPWD|_"
)
_OWNED = {  # options of sbatch -> the field that sets them; "": submission sets or needs them itself
    option: place
    for place, options in {
        "partition": "partition",
        "account": "account",
        "qos": "qos",
        "constraint": "constraint",
        "nodelist": "nodelist",
        "exclude": "exclude",
        "gpus_per_task": "gpus gpus-per-node gpus-per-task gpus-per-socket",
        "cpus_per_task": "cpus-per-task cpus-per-gpu",
        "mem_gb": "mem",
        "time_minutes": "time",
        "signal_seconds": "signal",
        "throttle": "array",
        "": "nodes ntasks ntasks-per-node ntasks-per-gpu job-name dependency output error input open-mode requeue"
        " no-requeue chdir export wrap wait parsable test-only quiet clusters help usage version",
    }.items()
    for option in options.split()
}


@dataclass
class SlurmProfile:
    """Settings of jobs on one Slurm cluster. ``None`` leaves a choice to the cluster.

    Attributes:
        name: Name of the profile, for messages.
        partition: One partition, or several with commas.
        account: Account that is charged.
        qos: Quality of service.
        constraint: Features that the nodes must have.
        nodelist: Nodes that the job must have.
        exclude: Nodes that the job must not have.
        gpus_per_task: Number of GPUs per task (rank); every task sees all GPUs of its node.
        gpu_type: Type of GPU as in gres.conf, for clusters with several.
        cpus_per_task: Number of cores per task.
        mem_gb: Memory per task in GiB; a node is asked for the sum over its tasks; 0 takes all memory of the node.
        time_minutes: Time limit of one attempt; a run that is not done resumes in the next one.
        signal_seconds: Seconds before the limit at which the tasks get SIGUSR2: longer than a step and a checkpoint together.
            Slurm may send it up to a minute earlier.
        throttle: Number of elements of an array that run at once.
        max_array: Length of an array above which it is split; the limit is MaxArraySize - 1 of `scontrol show config`.
        purge_modules: Run `module purge` before the modules are loaded.
        modules: Modules for `module load`.
        setup: Further lines of bash before the run, used as they are: this is the user's own shell.
        container: Command that runs the interpreter, word by word, such as [apptainer, exec, --nv, image.sif].
        python: Interpreter on the nodes; None is the one that submits.
        environment: Variables of the job, taken literally: $HOME is five characters.
        network_interface: Network interface for NCCL and Gloo, such as ib0.
        scratch: Folder for temporary files, created on every node; absolute.
        cpu_bind: Option --cpu-bind of srun; "none" omits it.
        extra: Further options of sbatch without the dashes, such as {reservation: night, exclusive: true}.
    """

    name: str = "custom"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodelist: str | None = None
    exclude: str | None = None
    gpus_per_task: int = 0
    gpu_type: str | None = None
    cpus_per_task: int = 1
    mem_gb: float | None = None
    time_minutes: int = 60
    signal_seconds: int = 120
    throttle: int = 16
    max_array: int = 1000
    purge_modules: bool = False
    modules: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    container: list[str] = field(default_factory=list)
    python: str | None = None
    environment: dict[str, str | int] = field(default_factory=dict)
    network_interface: str | None = None
    scratch: str | None = None
    cpu_bind: str = "cores"
    extra: dict[str, str | int | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (pattern, hint) in _PATTERNS.items():
            value = getattr(self, name)
            optional = name not in ("name", "cpu_bind")
            if not (value is None and optional) and not (isinstance(value, str) and re.fullmatch(pattern, value)):
                raise self._wrong(name, value, hint)
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise self._wrong(name, value, f"give a whole number >= {least}")
        if self.mem_gb is not None and not (_is_number(self.mem_gb) and 0 <= self.mem_gb < 2**20):
            raise self._wrong(
                "mem_gb", self.mem_gb, "give GiB, 0 for all of the node, or null for the cluster's default"
            )
        if self.gpu_type is not None and not self.gpus_per_task:
            raise self._wrong("gpu_type", self.gpu_type, "set gpus_per_task too")
        self._check_signal()
        self._check_shell()
        self._check_command()
        self._check_environment()
        self._check_extra()

    def _wrong(self, name: str, value: object, hint: str) -> UserError:
        return UserError(f"{name}={value!r} is not possible in the Slurm profile {self.name!r}", hint)

    def _check_signal(self) -> None:
        longest = min(60 * self.time_minutes - 1, _LONGEST_SIGNAL)
        if self.signal_seconds > longest:
            hint = f"time_minutes={self.time_minutes} leaves at most {longest}"
            raise self._wrong("signal_seconds", self.signal_seconds, hint)

    def _check_shell(self) -> None:
        if type(self.purge_modules) is not bool:
            raise self._wrong("purge_modules", self.purge_modules, "give true or false")
        for name in ("modules", "setup", "container"):
            value = getattr(self, name)
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise self._wrong(name, value, "give a list of texts")
        for module in self.modules:
            if not re.fullmatch(_MODULE, module):
                raise self._wrong("modules", module, "give names of `module avail`, one per element")
        for line in self.setup:
            if not line.replace("\t", " ").isprintable():
                raise self._wrong("setup", line, "give one line per element, without control characters")

    def _check_command(self) -> None:
        for word in self.container:
            if not word.isprintable() or not word:
                raise self._wrong("container", word, "give one word of the command per element")
        for name, program in (("container", self.container[0] if self.container else None), ("python", self.python)):
            if program is not None and not _is_program(program):
                raise self._wrong(name, program, "give a program's name or full path; ~ and variables are not expanded")
        if self.container and self.python is None:
            raise self._wrong("python", self.python, "name the interpreter inside the container, such as python3")
        if self.scratch is not None and not (_is_program(self.scratch) and self.scratch.startswith("/")):
            hint = "give an absolute folder; variables are not expanded (export TMPDIR in setup for that)"
            raise self._wrong("scratch", self.scratch, hint)

    def _check_environment(self) -> None:
        if not isinstance(self.environment, dict):
            raise self._wrong("environment", self.environment, "give NAME: value pairs")
        for name, value in self.environment.items():
            if not (isinstance(name, str) and re.fullmatch(_VARIABLE, name)):
                raise self._wrong("environment", name, "a variable's name has letters, digits and _")
            if re.fullmatch(_BASH_VARIABLES, name):
                raise self._wrong("environment", name, "bash uses this variable itself: export it in setup")
            if not (type(value) is int or (isinstance(value, str) and value.isprintable())):
                hint = "give a whole number or printable text in quotes"
                raise self._wrong(f"environment.{name}", value, hint)

    def _check_extra(self) -> None:
        if not isinstance(self.extra, dict):
            raise self._wrong("extra", self.extra, "give option: value pairs")
        for name, value in self.extra.items():
            if not (isinstance(name, str) and re.fullmatch(_OPTION, name)):
                raise self._wrong("extra", name, "give a long option of sbatch without its dashes, such as reservation")
            for owned in (option for option in _OWNED if option.startswith(name)):  # sbatch takes beginnings too
                hint = f"set {_OWNED[owned]} instead" if _OWNED[owned] else "drop it: submission needs it itself"
                raise self._wrong("extra", name, hint)
            if isinstance(value, str):
                if not value or not value.isascii() or not value.isprintable() or re.search(r"[\"'\\$`#]", value):
                    raise self._wrong(f"extra.{name}", value, "give printable ASCII without quotes, \\, $, ` and #")
            elif not isinstance(value, int):
                raise self._wrong(f"extra.{name}", value, "give a text, a whole number, true or false")
            if name in ("mem-per-cpu", "mem-per-gpu") and self.mem_gb is not None:
                raise self._wrong("extra", name, "sbatch takes one of it and mem_gb: set mem_gb=null")


def profiles_folder() -> Path:
    """Return the folder of the profiles: inside the package in an installed wheel, beside it in a checkout."""
    package = Path(hpc_c2g.__file__).parent
    installed = package / "slurm_profiles"
    return installed if installed.is_dir() else package.parent / "slurm" / "profiles"


def profile_names() -> list[str]:
    """Return the names that ``load_profile`` accepts."""
    return sorted(path.stem for path in profiles_folder().glob("*.yaml"))


def load_profile(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> SlurmProfile:
    """Return a profile by its name in ``slurm/profiles``, or from a path that ends in ``.yaml``.

    Args:
        name_or_path: Name or path of the profile.
        overrides: Values by field; dicts are merged, lists replaced.

    Raises:
        UserError: The profile does not exist, a name is no field, or a value is not possible.
    """
    if name_or_path.endswith(".yaml"):
        path = Path(name_or_path).expanduser()
    else:
        names = profile_names()
        if name_or_path not in names:
            close = difflib.get_close_matches(name_or_path, names, n=3, cutoff=0.5)
            meant = f"did you mean {' or '.join(close)}? " if close else ""
            known = f"there are {', '.join(names)}, or give a path that ends in .yaml"
            raise UserError(f"there is no Slurm profile {name_or_path!r}", meant + known)
        path = profiles_folder() / f"{name_or_path}.yaml"
    values = {"name": path.stem, **_read(path)}
    merged = OmegaConf.structured(SlurmProfile)
    for source, part in ((str(path), values), ("the overrides", dict(overrides or {}))):
        for key, value in part.items():
            merged = _with(merged, source, key, value)
    plain = _replaced(OmegaConf.to_container(merged, resolve=False), _MASK, "${")
    return SlurmProfile(**plain)


_MASK = "\ue000{"
"""Replaces `${` while OmegaConf reads a profile, which would take shell variables for its own."""


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = OmegaConf.to_container(OmegaConf.create(text.replace("${", _MASK)))
    except Exception as error:  # raised by the file system, YAML or OmegaConf
        reason = " ".join(str(error).split())
        hint = "copy slurm/profiles/example_cpu.yaml"
        raise UserError(f"the Slurm profile {path} cannot be read: {reason}", hint) from error
    if not isinstance(values, dict):
        raise UserError(f"the Slurm profile {path} holds no fields", "write field: value, one per line")
    return {str(key): value for key, value in values.items()}


def _with(config: Any, source: str, key: str, value: object) -> Any:
    known = [item.name for item in fields(SlurmProfile)]
    if key not in known:
        close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"the fields are {', '.join(known)}"
        raise UserError(f"{source}: a Slurm profile has no field {key!r}", hint)
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    try:
        return OmegaConf.merge(config, {key: _replaced(value, "${", _MASK)})
    except Exception as error:  # raised by OmegaConf: a wrong type
        reason = str(error).splitlines()[0].replace(_MASK, "${")
        raise UserError(f"{source}: {key}={value!r}: {reason}", f"give {key} a value of the right type") from error


def _replaced(value: Any, old: str, new: str) -> Any:
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, list):
        return [_replaced(item, old, new) for item in value]
    if isinstance(value, dict):
        return {_replaced(key, old, new): _replaced(item, old, new) for key, item in value.items()}
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_program(text: str) -> bool:
    """Return True if the text is printable and neither a shell would expand it nor srun read it as an option."""
    return isinstance(text, str) and bool(text) and text.isprintable() and text[0] not in "-~" and "$" not in text
