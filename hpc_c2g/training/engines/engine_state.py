"""Layout-free engine state: full float32 weights and moments by name, for any number of ranks and any ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpc_c2g.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """The elements of one parameter that this rank's Adam updates.

    Attributes:
        master: float32 leaf of Adam, which may hold other parameters too.
        start: Index of the first element in the flattened master.
        offset: Index of the first element in the flattened parameter.
        count: Number of elements.
    """

    master: Tensor
    start: int
    offset: int
    count: int


@dataclass(frozen=True)
class Layout:
    """Location of the tensors that Adam updates, in an engine.

    Attributes:
        shapes: Full shape of every parameter, by name.
        fragments: Fragments of this rank, by parameter name; absent if the rank has none of a parameter.
        masters: float32 leaves of this rank's Adam.
        gradients: Returns the reduced gradient: the full one, or this rank's part of it if ``sum`` is given.
        publish: Copies changed masters to the weights of the module (collective if ``sum`` is given).
        sum: Sums tensors over ranks in place; None if every rank holds everything.
    """

    shapes: dict[str, torch.Size]
    fragments: dict[str, Fragment]
    masters: list[Tensor]
    gradients: Callable[[], list[Tensor]]
    publish: Callable[[], None]
    sum: Callable[[list[Tensor]], None] | None = None

    def gather(self, part: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return full float32 tensors on the CPU, by parameter name; ``part`` maps a master to a tensor of its shape."""
        device, full = self.masters[0].device, {}
        for name, shape in self.shapes.items():  # one by one: a second generator may not fit on the device
            whole = torch.zeros(shape.numel(), device=device)
            if name in self.fragments:
                f = self.fragments[name]
                kept = part(f.master).detach().reshape(-1).narrow(0, f.start, f.count)
                whole.narrow(0, f.offset, f.count).copy_(kept)
            if self.sum is not None:
                self.sum([whole])
            full[name] = whole.view(shape).cpu()
        return full

    @torch.no_grad()
    def scatter(self, part: Callable[[Tensor], Tensor], full: Mapping[str, Tensor]) -> None:
        """Write this rank's elements of ``full`` into the tensors that ``part`` returns for its masters; no communication."""
        for name, f in self.fragments.items():
            kept = full[name].reshape(-1).narrow(0, f.offset, f.count)
            part(f.master).view(-1).narrow(0, f.start, f.count).copy_(kept)

    def gradient_norm(self) -> Tensor:
        """Return the L2 norm of the whole reduced gradient, float64 scalar, the same on every rank."""
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in self.gradients()]
        squares = torch.stack(norms).square().sum().reshape(1)  # float64: a square of 1e30 is no overflow
        if self.sum is not None:
            self.sum([squares])
        return squares.sqrt().squeeze(0)


class EngineState:
    """Reads and restores weights and Adam's moments in full; every method is collective if the layout is sharded.

    Adam's state is allocated at once, before its first step, so that it can be restored and is the same in every layout.

    Args:
        names: Names in the module's ``state_dict``, in order.
        buffers: Buffers of the module before an engine cast them: no network changes them, so they stay exact in any dtype.
        layout: Location of the tensors that Adam updates.
        adam: Innermost optimizer.
    """

    def __init__(self, names: list[str], buffers: dict[str, Tensor], layout: Layout, adam: torch.optim.Adam) -> None:
        self.names, self.buffers, self.layout, self.adam = names, buffers, layout, adam
        self.shapes = {n: buffers[n].shape if n in buffers else layout.shapes[n] for n in names}
        for master in layout.masters:
            zeros = {moment: torch.zeros_like(master, requires_grad=False) for moment in MOMENTS}
            adam.state[master] = {"step": torch.tensor(0.0), **zeros}

    def weights(self) -> dict[str, Tensor]:
        """Return the module's full ``state_dict`` with float32 masters, on the CPU of every rank; collective."""
        full = self.buffers | self.layout.gather(lambda master: master)
        return {name: full[name].clone() if name in self.buffers else full[name] for name in self.names}

    def state_dict(self, updates: int) -> dict[str, Any]:
        """Return weights, moments and the number of updates so far, on every rank; collective."""
        gathered = {key: self.layout.gather(self._moment(key)) for key in MOMENTS}
        moments = {name: {key: gathered[key][name] for key in MOMENTS} for name in self.layout.shapes}
        return {"weights": self.weights(), "moments": moments, "updates": updates}

    def _moment(self, key: str) -> Callable[[Tensor], Tensor]:
        def part(master: Tensor) -> Tensor:
            moment: Tensor = self.adam.state[master][key]
            return moment

        return part

    def load_state_dict(self, module: nn.Module, state: Mapping[str, Any]) -> int:
        """Restore the result of ``state_dict`` in any layout, and return its number of updates; collective.

        Raises:
            UserError: The state belongs to another network or format; nothing was changed.
        """
        check_fit(state, self.shapes, self.layout.shapes)
        weights, moments, updates = state["weights"], state["moments"], int(state["updates"])
        self.layout.scatter(lambda master: master, weights)
        for key in MOMENTS:
            full = {name: moment[key] for name, moment in moments.items()}
            self.layout.scatter(self._moment(key), full)
        for master in self.layout.masters:
            self.adam.state[master]["step"].fill_(updates)
        current = dict(module.named_buffers())
        for name in self.buffers:
            self.buffers[name] = weights[name].clone()
            current[name].copy_(weights[name])
        self.layout.publish()
        return updates


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Return copies on the CPU of the buffers in the module's ``state_dict``."""
    parameters = {name for name, _ in module.named_parameters()}
    return {n: t.detach().clone().cpu() for n, t in module.state_dict().items() if n not in parameters}


def check_fit(
    state: Mapping[str, Any], shapes: Mapping[str, torch.Size], moments: Mapping[str, torch.Size] | None = None
) -> None:
    """Check an engine's state against the network that it is restored to.

    Args:
        state: State of an engine.
        shapes: Shapes of the network's weights and buffers, by name.
        moments: Shapes of the parameters whose moments are required too; None if only the weights are read.

    Raises:
        UserError: An entry is missing, unexpected or of another shape.
    """
    hint = "choose another run_dir, or the generator and the version of hpc_c2g that the run began with"
    wanted = ["weights"] if moments is None else ["weights", "moments", "updates"]
    absent = [name for name in wanted if name not in state]
    if absent:
        raise UserError(
            f"the checkpoint's engine state has no {', '.join(absent)}: it holds {', '.join(map(str, state))}", hint
        )
    there = {name: tensor.shape for name, tensor in state["weights"].items()}
    _same_shapes("weights", there, shapes, hint)
    if moments is not None:
        for key in MOMENTS:
            there = {name: moment[key].shape for name, moment in state["moments"].items() if key in moment}
            _same_shapes(f"moments {key}", there, moments, hint)


def _same_shapes(what: str, there: Mapping[str, torch.Size], shapes: Mapping[str, torch.Size], hint: str) -> None:
    differences = [f"missing {name}" for name in shapes if name not in there]
    differences += [f"unexpected {name}" for name in there if name not in shapes]
    differences += [
        f"{name}: {list(there[name])} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in there and there[name] != shape
    ]
    if differences:
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise UserError(f"the checkpoint's {what} do not fit the network: {'; '.join(differences[:4])}{more}", hint)
