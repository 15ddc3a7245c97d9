"""Laws of the bundle: bitwise round trips, every fault found before it does harm, no code but modules, old files kept."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import pickle
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from hpc_c2g.classifiers.bundle import (
    META,
    WEIGHTS,
    Bundle,
    build_model,
    load_bundle,
    load_weights,
    save_bundle,
)
from hpc_c2g.classifiers.normalization import Normalization
from hpc_c2g.errors import UserError


def refused(match: str, call, *args, **kwargs) -> None:
    """``call`` raises a UserError of one line that names ``match`` and says how to mend it."""
    with pytest.raises(UserError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def edit(folder: Path, **changes) -> None:
    meta = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps(meta | changes))


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a saved bundle and its checksum with them."""
    tensors = {k: t.clone() for k, t in load((folder / WEIGHTS).read_bytes()).items()}
    change(tensors)
    blob = save(tensors)
    (folder / WEIGHTS).write_bytes(blob)
    edit(folder, sha256=hashlib.sha256(blob).hexdigest())


def state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


SHAPE = (2, 8, 8)
MODELS = [
    {"target": "mlp", "width": 5, "depth": 3, "bias": "all", "batch_norm": True},
    {"target": "mlp", "width": 5, "bias": "none", "activation": "leaky_relu"},
    {"target": "cnn", "width": 3, "batch_norm": True, "pooling": "max"},
    {"target": "cnn", "width": 3, "depth": 2},
    {"target": "residual_cnn", "width": 3, "depth": 2, "bias": "all", "batch_norm": True},
    {"target": "residual_cnn", "width": 3, "depth": 1},
]


def test_round_trip_is_bitwise(subtests, tmp_path):
    for number, (dtype, options) in enumerate(product([torch.float32, torch.float64], MODELS)):
        folder = tmp_path / str(number) / "folder"  # neither is there yet
        with subtests.test(f"{options} {dtype}"):
            architecture = {**options, "input_shape": list(SHAPE), "classes": 3}
            model = build_model(architecture).to(dtype)
            with torch.no_grad():
                model.train()(torch.randn(9, *SHAPE, dtype=dtype))  # running statistics and counters as after training
            normalization = Normalization.constant(SHAPE, mean=torch.rand(SHAPE), scale=[0.5, 2.0], value_range=(-1, 3))
            saved = Bundle(model, architecture, ["x", "y", "z"], SHAPE, normalization)
            save_bundle(saved, folder)
            loaded = load_bundle(str(folder))
            there = loaded.model.state_dict()
            assert list(there) == list(saved.model.state_dict())
            for name, tensor in saved.model.state_dict().items():
                assert torch.equal(there[name], tensor)
                assert there[name].dtype == tensor.dtype
            for name in ("mean", "scale", "lower", "upper"):
                assert torch.equal(getattr(loaded.normalization, name), getattr(normalization, name))
            for field in ("architecture", "classes", "input_shape", "dtype", "fingerprint"):
                assert getattr(loaded, field) == getattr(saved, field)
            assert not loaded.model.training
            assert not any(p.requires_grad for p in loaded.model.parameters())
            x = torch.randn(4, *SHAPE, dtype=dtype)
            assert torch.equal(loaded.model(x), saved.model(x))


def test_fingerprint_is_of_weights_and_normalization_not_of_the_place(bundle, tmp_path):
    save_bundle(bundle, tmp_path / "a")
    assert load_bundle(tmp_path / "a").fingerprint == bundle.fingerprint
    moved = dataclasses.replace(bundle, normalization=Normalization.constant((1, 4, 4), mean=0.3))
    assert moved.fingerprint != bundle.fingerprint
    with torch.no_grad():
        bundle.model.head.weight[0, 0] += 1e-15
    assert load_bundle(tmp_path / "a").fingerprint != bundle.fingerprint


def test_parameters_are_the_named_ones_without_a_graph(bundle):
    assert list(bundle.parameters) == [name for name, _ in bundle.model.named_parameters()]
    assert not any(t.requires_grad for t in bundle.parameters.values())


@pytest.mark.parametrize("name", [META, WEIGHTS])
def test_missing_file_is_named(bundle_dir, name):
    (bundle_dir / name).unlink()
    refused(f"no classifier bundle: {name} is missing", load_bundle, bundle_dir)
    refused("no classifier bundle", load_bundle, bundle_dir / "nowhere")


def flipped(blob: bytes, place: int) -> bytes:
    changed = bytearray(blob)
    changed[place] ^= 1
    return bytes(changed)


DAMAGE = {f"first {n} bytes": lambda blob, n=n: blob[:n] for n in (0, 7, 100, -1)}
DAMAGE |= {f"a bit at {place}": lambda blob, place=place: flipped(blob, place) for place in (0, 20, -100, -1)}


def test_truncated_or_altered_weights_are_refused(subtests, bundle_dir):
    intact = (bundle_dir / WEIGHTS).read_bytes()
    for damage in DAMAGE:
        with subtests.test(damage):
            (bundle_dir / WEIGHTS).write_bytes(DAMAGE[damage](intact))
            refused("truncated or altered", load_bundle, bundle_dir)


def test_weights_that_are_no_safetensors_are_refused(bundle_dir):
    blob = pickle.dumps({"a": 1})
    (bundle_dir / WEIGHTS).write_bytes(blob)
    edit(bundle_dir, sha256=hashlib.sha256(blob).hexdigest())
    refused(f"{WEIGHTS} cannot be read", load_bundle, bundle_dir)


def test_broken_description_is_refused(subtests, bundle_dir):
    for text in ["", "{", "[]", "3", "null", '"abc"', "{}", '{"format": 1}', "\xff"]:
        with subtests.test(repr(text)):
            (bundle_dir / META).write_bytes(text.encode("latin-1"))
            refused("is not a bundle description", load_bundle, bundle_dir)


WRONG = [
    ({"format": 2}, "has format 2, this version reads 1"),
    ({"classes": ["a", "b"]}, "2 classes are named"),
    ({"classes": ["a", "b", "c", "d"]}, "4 classes are named"),
    ({"input_shape": [1, 5, 5]}, r"cannot take an input of shape \[1, 5, 5\]"),
    ({"architecture": {"target": "mlp", "input_shape": [1, 4, 4], "classes": 3, "width": 13}}, "does not fit"),
    ({"architecture": {"target": "mlp"}}, "missing 2 required"),
    ({"architecture": {"target": "mlp", "input_shape": [1, 4, 4], "classes": 3, "wide": 12}}, "unexpected keyword"),
    ({"architecture": {"target": "transformer"}}, "'transformer' cannot be imported"),
    ({"architecture": {"target": "no.such.Net"}}, "'no.such.Net' cannot be imported"),
    ({"architecture": {"target": "torch.nn.NoSuchNet"}}, "cannot be imported"),
    ({"architecture": {"target": 3}}, "target=3 is no name"),
    ({"architecture": {}}, "target=None is no name"),
    ({"architecture": {"target": ".relative.Net"}}, "cannot be imported"),
    ({"architecture": {"target": "torch.nn.Linear", "in_features": -1, "out_features": 3}}, "torch.nn.Linear"),
    ({"architecture": 5}, "architecture"),
    ({"classes": 3}, "classes"),
]


def test_description_that_does_not_fit_is_refused(subtests, bundle_dir):
    meta = (bundle_dir / META).read_bytes()
    for changes, match in WRONG:
        (bundle_dir / META).write_bytes(meta)
        with subtests.test(match):
            edit(bundle_dir, **changes)
            refused(match, load_bundle, bundle_dir)


UNFIT = [
    (lambda t: t.pop("model.head.weight"), r"missing head\.weight"),
    (lambda t: t.update({"model.more": torch.zeros(2)}), "unexpected more"),
    (lambda t: t.update({"model.head.weight": torch.zeros(3, 13)}), r"head\.weight: \[3, 13\] instead of \[3, 12\]"),
    (lambda t: t.pop("normalization.mean"), r"lacks 'normalization\.mean'"),
    (lambda t: t["model.head.weight"].view(-1)[5:6].fill_(torch.nan), r"'head\.weight' holds NaN"),
    (lambda t: t["model.linear1.bias"][:1].fill_(-torch.inf), r"'linear1\.bias' holds NaN or infinite"),
    (lambda t: t["normalization.scale"].zero_(), r"normalization\.scale"),
    (lambda t: t["normalization.upper"].fill_(-1), r"normalization\.range is empty"),
]


def test_tensors_that_do_not_fit_are_refused(subtests, bundle_dir, tmp_path):
    for number, (change, match) in enumerate(UNFIT):
        folder = shutil.copytree(bundle_dir, tmp_path / str(number))
        with subtests.test(match):
            rewrite(folder, change)
            refused(match, load_bundle, folder)


def test_nan_weights_are_refused_at_once(bundle):
    with torch.no_grad():
        bundle.model.linear1.weight[3, 2] = torch.nan
    refused(r"'linear1\.weight' holds NaN", dataclasses.replace, bundle)


@pytest.mark.parametrize("name", ["mean", "upper"])
def test_normalization_that_is_not_finite_is_refused(bundle_dir, name):
    rewrite(bundle_dir, lambda tensors: tensors[f"normalization.{name}"].view(-1)[:1].fill_(torch.inf))
    refused("normalization", load_bundle, bundle_dir)


def test_input_shape_must_be_that_of_the_normalization(bundle_dir):
    edit(bundle_dir, input_shape=[16])  # an MLP flattens, so it takes this too
    refused("input_shape|normalization", load_bundle, bundle_dir)


def test_a_single_class_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
    refused("class", Bundle, model, {}, ["only"], (4,), Normalization.constant((4,)))


CALLED: list[object] = []


class NotAModule:
    def __init__(self, **kwargs) -> None:
        CALLED.append(kwargs)


def function(**kwargs) -> nn.Module:
    CALLED.append(kwargs)
    return nn.Linear(2, 2)


def test_a_target_that_is_no_module_is_refused_and_never_called(subtests, bundle_dir):
    for target in [f"{__name__}.function", f"{__name__}.NotAModule", f"{__name__}.CALLED"]:
        with subtests.test(target):
            edit(bundle_dir, architecture={"target": target})
            refused(r"is not a torch\.nn\.Module", load_bundle, bundle_dir)
            assert CALLED == []


def test_functions_of_libraries_are_refused_and_never_called(subtests, bundle_dir, tmp_path):
    for target in ["os.mkdir", "os.system", "pathlib.Path", "builtins.eval", "torch.load"]:
        with subtests.test(target):
            marker = tmp_path / "marker"
            edit(bundle_dir, architecture={"target": target, "path": str(marker), "command": f"touch {marker}"})
            refused(r"is not a torch\.nn\.Module", load_bundle, bundle_dir)
            assert not marker.exists()


def test_an_import_path_names_any_module():
    model = build_model({"target": "torch.nn.Linear", "in_features": 4, "out_features": 3, "bias": False})
    assert isinstance(model, nn.Linear)
    assert model.weight.shape == (3, 4)
    assert model.bias is None


def test_loaded_weights_keep_their_dtype_and_name_every_fault():
    model, weight = nn.Linear(3, 2), torch.rand(2, 3, dtype=torch.float64)
    load_weights(model, {"weight": weight, "bias": torch.zeros(2).double()}, "here")
    assert model.weight.dtype == torch.float64
    assert torch.equal(model.weight, weight)
    faulty: dict[str, Tensor] = {"weight": torch.zeros(3, 2), "extra": torch.zeros(1)}
    refused(
        r"missing bias; unexpected extra; weight: \[3, 2\] instead of \[2, 3\]", load_weights, model, faulty, "here"
    )
    assert torch.equal(model.weight, weight)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("successes", [0, 1])
def test_a_full_disk_leaves_the_old_bundle(bundle, bundle_dir, monkeypatch, call, successes):
    before, real, calls = state(bundle_dir), getattr(os, call), []

    def fail(*args):
        calls.append(args)
        if len(calls) > successes:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, call, fail)
    with torch.no_grad():
        bundle.model.head.weight.mul_(2)
    refused("No space left on device", save_bundle, bundle, bundle_dir)
    assert state(bundle_dir) == before


def test_weights_of_another_bundle_are_refused(bundle, bundle_dir, tmp_path):
    with torch.no_grad():
        bundle.model.head.weight.mul_(2)
    save_bundle(bundle, tmp_path / "other")
    (tmp_path / "other" / WEIGHTS).replace(bundle_dir / WEIGHTS)
    refused("truncated or altered", load_bundle, bundle_dir)


def test_a_folder_that_is_a_file_is_refused(bundle, tmp_path):
    (tmp_path / "out").write_text("mine")
    refused("cannot write", save_bundle, bundle, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
