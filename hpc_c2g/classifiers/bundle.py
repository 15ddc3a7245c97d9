"""The classifier bundle: everything that generator training may know of a classifier.

A folder with ``classifier.safetensors`` (weights, buffers, normalization) and ``bundle.json`` (architecture, classes,
input shape, checksum). No code is unpickled; an architecture is a built-in name or the import path of an ``nn.Module``.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from hpc_c2g.classifiers.models import ARCHITECTURES
from hpc_c2g.classifiers.normalization import Normalization
from hpc_c2g.errors import UserError
from hpc_c2g.files import write_atomically

WEIGHTS, META, CERTIFICATE = "classifier.safetensors", "bundle.json", "certificate.json"
FORMAT = 1
OTHER_WEIGHTS = "classifier-b.safetensors"
"""Alternate name of the weights: replacing a bundle switches between the two names, and ``bundle.json`` names the valid one."""


@dataclass(frozen=True)
class Bundle:
    """A frozen classifier Phi(x; theta): R^[*S] -> R^C with its input normalization.

    Attributes:
        model: Module in eval mode, no parameter requires a gradient.
        architecture: ``{"target": built-in name or import path, **keyword arguments}``.
        classes: Names of the C classes.
        input_shape: ``[*S]`` of one input.
        normalization: Input normalization (mean and scale).
    """

    model: nn.Module
    architecture: dict[str, Any]
    classes: list[str]
    input_shape: tuple[int, ...]
    normalization: Normalization

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise UserError(f"classes={self.classes} leaves nothing to classify", "name at least two classes")
        self.model.eval().requires_grad_(False)
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise UserError(f"classifier weight {name!r} holds NaN or infinite values", "retrain or re-export it")
        try:
            logits = self.model(torch.zeros(2, *self.input_shape, dtype=self.dtype))
        except Exception as error:  # any failure of a user's module on the shape it was declared with
            raise UserError(
                f"the classifier cannot take an input of shape {list(self.input_shape)}: {_first_line(error)}",
                "give the input_shape of one sample, such as [1, 28, 28]",
            ) from error
        if logits.shape != (2, len(self.classes)):
            raise UserError(
                f"the classifier's output has shape {list(logits.shape[1:])} but {len(self.classes)} classes are named",
                "make classes match the number of outputs (a binary net needs two outputs)",
            )
        if self.normalization.mean.shape != tuple(self.input_shape):
            raise UserError(
                f"input_shape={list(self.input_shape)}, but the normalization has {list(self.normalization.mean.shape)}",
                "give both the shape of one sample",
            )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first parameter."""
        return next(self.model.parameters()).dtype

    @property
    def fingerprint(self) -> str:
        """Checksum of weights, buffers and normalization; independent of the bundle's path."""
        return hashlib.sha256(save_safetensors(_tensors(self))).hexdigest()

    @property
    def parameters(self) -> dict[str, Tensor]:
        """theta: one detached tensor per parameter name."""
        return {name: p.detach() for name, p in self.model.named_parameters()}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def build_model(architecture: Mapping[str, Any]) -> nn.Module:
    """Build the module that ``architecture`` names, freshly initialized.

    Only subclasses of ``nn.Module`` are called, so a downloaded bundle cannot name an arbitrary function.

    Raises:
        UserError: the name is unknown or no module, or the module refuses its arguments.
    """
    kwargs = {k: v for k, v in architecture.items() if k != "target"}
    target = architecture.get("target")
    if not isinstance(target, str):
        raise UserError(
            f"architecture.target={target!r} is no name", f"use one of {sorted(ARCHITECTURES)} or pkg.Class"
        )
    cls = ARCHITECTURES.get(target)
    if cls is None:
        module_name, _, class_name = target.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise UserError(
                f"architecture {target!r} cannot be imported: {error}",
                f"use one of {', '.join(sorted(ARCHITECTURES))}, or put the package of your module on PYTHONPATH",
            ) from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise UserError(f"architecture {target!r} is not a torch.nn.Module", "name a module class")
    try:
        return cls(**kwargs)
    except Exception as error:  # a module may refuse its arguments in any way
        raise UserError(f"architecture {target!r}: {error}", "check the keyword arguments of the model") from error


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy ``state`` into ``model``; names and shapes must match exactly, the dtype of ``state`` is kept."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{k}: {list(state[k].shape)} instead of {list(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    faults = (
        [f"missing {', '.join(missing)}"] * bool(missing) + [f"unexpected {', '.join(extra)}"] * bool(extra) + shapes
    )
    if faults:
        raise UserError(
            f"{source} does not fit the architecture: {'; '.join(faults)}", "name the architecture it was saved from"
        )
    floating = [v.dtype for v in state.values() if v.is_floating_point()]
    if floating:
        model.to(floating[0])
    model.load_state_dict(dict(state))


def load_state_dict_file(path: Path) -> dict[str, Tensor]:
    """Read a user's weights from ``.safetensors`` or a torch file (``weights_only``, no code is unpickled)."""
    if not path.is_file():
        raise UserError(f"state_dict={path} does not exist", "give the path of the saved weights")
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path.read_bytes())
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"state_dict={path} cannot be read as weights: {_first_line(error)}",
            "save it with torch.save(model.state_dict(), path) or as safetensors",
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"state_dict={path} holds no dictionary of tensors", "save model.state_dict(), not the model")
    return state


def _tensors(bundle: Bundle) -> dict[str, Tensor]:
    state = {f"model.{k}": v.detach().cpu().contiguous().clone() for k, v in bundle.model.state_dict().items()}
    norm = bundle.normalization
    return state | {
        f"normalization.{k}": getattr(norm, k).cpu().contiguous() for k in ("mean", "scale", "lower", "upper")
    }


def save_bundle(bundle: Bundle, folder: Path) -> None:
    """Write the bundle, each file complete or absent; the json (with the weights' checksum) comes last."""
    blob = save_safetensors(_tensors(bundle))
    meta = {
        "format": FORMAT,
        "architecture": bundle.architecture,
        "classes": bundle.classes,
        "input_shape": list(bundle.input_shape),
        "sha256": hashlib.sha256(blob).hexdigest(),
    }
    old = _weights_name(folder)
    meta["weights"] = new = OTHER_WEIGHTS if old == WEIGHTS else WEIGHTS
    write_atomically(folder / new, blob)
    try:  # bundle.json names its weights: until it is replaced, the old bundle stays valid
        write_atomically(folder / META, json.dumps(meta, indent=2).encode())
    except UserError:
        (folder / new).unlink()
        raise
    if old is not None:
        (folder / old).unlink(missing_ok=True)


def _weights_name(folder: Path) -> str | None:
    """Name of the weights file in ``folder``'s bundle.json; None without a bundle.json."""
    try:
        name = json.loads((folder / META).read_text()).get("weights", WEIGHTS)
    except (OSError, ValueError, AttributeError):
        return None
    return name if name in (WEIGHTS, OTHER_WEIGHTS) else None


def load_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """Read a bundle.

    Raises:
        UserError: folder or file missing, truncated or altered weights, an architecture that does not fit them.
    """
    folder = Path(folder)
    weights = _weights_name(folder) or WEIGHTS
    for name in (META, weights):
        if not (folder / name).is_file():
            raise UserError(
                f"classifier={folder} is no classifier bundle: {name} is missing",
                "make one with `c2g classifier out=DIR`",
            )
    try:
        meta = json.loads((folder / META).read_text())
        wanted = {"format", "architecture", "classes", "input_shape", "sha256"} - set(meta)
        if wanted:
            raise ValueError(f"it lacks {', '.join(sorted(wanted))}")
        for name, kind in {"architecture": dict, "classes": list, "input_shape": list}.items():
            if not isinstance(meta[name], kind):
                raise ValueError(f"{name}={meta[name]!r} is no {kind.__name__}")
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / META} is not a bundle description: {error}", "write the bundle again") from error
    if meta["format"] != FORMAT:
        raise UserError(
            f"{folder / META} has format {meta['format']}, this version reads {FORMAT}", "write the bundle again"
        )
    blob = (folder / weights).read_bytes()
    if hashlib.sha256(blob).hexdigest() != meta["sha256"]:
        raise UserError(
            f"{folder / weights} is truncated or altered (checksum mismatch)", "copy or write the bundle again"
        )
    try:
        tensors = load_safetensors(blob)
    except SafetensorError as error:
        raise UserError(f"{folder / weights} cannot be read: {error}", "write the bundle again") from error
    model = build_model(meta["architecture"])
    load_weights(model, {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}, str(folder / weights))
    try:
        # bundles written before 0.1.0 spell it the British way
        prefix = "normalisation" if "normalisation.mean" in tensors else "normalization"
        norm = Normalization(**{k: tensors[f"{prefix}.{k}"] for k in ("mean", "scale", "lower", "upper")})
    except KeyError as error:
        raise UserError(f"{folder / weights} lacks {error}", "write the bundle again") from error
    return Bundle(model, meta["architecture"], list(meta["classes"]), tuple(meta["input_shape"]), norm)
