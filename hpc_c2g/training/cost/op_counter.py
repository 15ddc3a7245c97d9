"""Counter of the cost of PyTorch operators, while they run on the meta device and compute nothing."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ATEN = torch.ops.aten
_UNWRITTEN = {ATEN.empty, ATEN.empty_like, ATEN.new_empty, ATEN.empty_strided, ATEN.new_empty_strided}
_GATHERING = {ATEN.index, ATEN.index_select, ATEN.gather, ATEN.embedding}  # read as much as they write
_SCATTERING = {ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_, ATEN.embedding_dense_backward}


@dataclass(frozen=True)
class OpCost:
    """Work of a part of a program on a device. Supports sums, differences, and factors for repetitions.

    Attributes:
        flops: Floating-point operations of matrix products and convolutions (a multiply-add counts as two).
        matrix_bytes: Bytes read and written by matrix products and convolutions.
        moved_bytes: Bytes read and written by all other operators, which are bound by memory.
        calls: Number of operators called, views included: each costs the host its overhead.
    """

    flops: float = 0.0
    matrix_bytes: float = 0.0
    moved_bytes: float = 0.0
    calls: float = 0.0

    def __add__(self, other: OpCost) -> OpCost:
        return OpCost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: OpCost) -> OpCost:
        return self + other * -1

    def __mul__(self, factor: float) -> OpCost:
        return OpCost(*(factor * getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True)
class TensorShape:
    """Shape and data type of a tensor that is an argument of an ``Op``."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Op:
    """One operator with its arguments: enough to call it again with other numbers.

    Attributes:
        name: Name below ``torch.ops``, such as ``aten.mm.default``.
        arguments: Positional arguments, tensors as ``TensorShape``, lists as tuples.
        keywords: Keyword arguments as (name, argument) pairs.
        flops: Floating-point operations of one call, 0 if it is bound by memory.
        nbytes: Bytes read and written by one call.
    """

    name: str
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]
    flops: float
    nbytes: float


class OpCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode that counts work and live bytes of all operators called inside ``with meter:``.

    Tensors on the meta device have no numbers. If the program reads one, to log or to scale with it, it gets 1; a boolean
    mask selects everything. Programs that branch on values are therefore counted on one of their branches.

    Attributes:
        work: Work since the last ``reset``.
        peak: Largest sum of bytes alive at once, in storages allocated since the last ``reset``.
        operators: Number of calls of each operator.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reset()

    def reset(self) -> None:
        """Reset all counts; storages alive now are not counted."""
        self.work, self.peak, self.live = OpCost(), 0, 0
        self.operators: Counter[Op] = Counter()
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and count it."""
        kwargs = dict(kwargs or {})
        out = _without_numbers(func, args, kwargs)
        if out is None:
            out = func(*args, **kwargs)
        self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        packet = func._overloadpacket
        inputs, outputs = list(_tensors([args, kwargs])), list(_tensors(out))
        held = {t.untyped_storage()._cdata for t in inputs}
        inputs = [t for t in inputs if t is not kwargs.get("out")]  # written, not read
        made = [t for t in outputs if t.untyped_storage()._cdata not in held]
        for tensor in made:
            self._watch(tensor)
        flops, size = 0.0, _nbytes([*inputs, *outputs])
        product = getattr(ATEN, str(packet.__name__).removesuffix("_"), packet)  # the registry lacks addmm_
        if product in flop_registry:
            flops = float(flop_registry[product](*args, **kwargs, out_val=out))
        elif not outputs or packet in _UNWRITTEN or not (made or func._schema.is_mutable):  # the last: views
            size = 0
        elif packet in _GATHERING:
            size = 2 * _nbytes(outputs)
        elif packet in _SCATTERING:
            values = args[0] if packet is ATEN.embedding_dense_backward else args[2]
            size = 3 * _nbytes([values]) + _nbytes(made)
        self.work += OpCost(flops, size, 0, 1) if flops else OpCost(0, 0, size, 1)
        if size:
            self.operators[Op(str(func), _frozen(args), _frozen(sorted(kwargs.items())), flops, size)] += 1

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        alive = self._alive

        def gone(_: Any) -> None:
            if alive is self._alive and alive.pop(key, None) is not None:
                self.live -= size

        alive[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def _without_numbers(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return a substitute for a value that the meta device cannot compute; None if the operator can run."""
    first = args[0] if args and isinstance(args[0], Tensor) else None
    if first is None or not first.is_meta:
        return None
    if func is ATEN._local_scalar_dense.default:
        return True if first.dtype == torch.bool else 1 if not first.is_floating_point() else 1.0
    if func is ATEN._to_copy.default and kwargs.get("device") == torch.device("cpu"):
        return torch.ones(first.shape, dtype=kwargs.get("dtype") or first.dtype)
    if func is ATEN.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
        return first.new_empty(first.numel())
    return None


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _nbytes(tensors: Sequence[Tensor]) -> int:
    """Return the bytes behind the tensors; an expanded one is read from its few stored bytes."""
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return TensorShape(tuple(value.shape), value.stride(), value.dtype)
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value
