"""``python -m benchmarks.floor [--quick]``: lower bound of a step's time by phase, and the measured distance from it.

The floor of a phase is the time of its matrix products plus that of its other operators' bytes, at the rates that this machine reaches
(a large square product, a copy). Of the KKT gradient alone (G, residual, cotangents) the floor is measured: its matrix products,
on operands of their shapes, and nothing else. Every way is compared with float64 before it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.common import show, write_result
from benchmarks.kkt import Gradient, Samples, error, objective_of, one_pass, products, refuse_wrong, sum_of, two_passes
from benchmarks.subject import classifier, our_step, standing
from benchmarks.timing import copy_rate, interleaved, product_rate, undisturbed
from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.denormals import flush_denormals
from hpc_c2g.distributed.environment import pick_device
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.cost.dry_run import DryRun
from hpc_c2g.training.cost.op_counter import OpCost

MUST = {"one pass": 1.1, "two passes of half": 1.35}


def gradients(bundle: Bundle, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Compare every way of one KKT gradient with its measured floor.

    Raises:
        SystemExit: a way's result is not that of float64.
    """
    device = pick_device("auto")
    samples = Samples.random(bundle, batch, device, torch.float32)
    exact = objective_of(bundle, batch, device, torch.float64, kkt_backend="autograd")
    reference = one_pass(exact, Samples.random(bundle, batch, device, torch.float64))
    fast, off = (objective_of(bundle, batch, device, kkt_backend=choice) for choice in ("auto", "autograd"))
    sum_off, sum_fast = sum_of(off), sum_of(fast)
    ways: dict[str, Callable[[], Gradient]] = {
        "autograd, one pass": lambda: one_pass(off, samples),
        "autograd, two passes of half": lambda: two_passes(off, samples, batch // 2, sum_off),
        "one pass": lambda: one_pass(fast, samples),
        "two passes of half": lambda: two_passes(fast, samples, batch // 2, sum_fast),
        "two passes of a quarter": lambda: two_passes(fast, samples, batch // 4, sum_fast),
    }
    errors = {name: error(way(), reference) for name, way in ways.items()}
    refuse_wrong(errors)
    floor, flops = products(bundle, batch, device, torch.float32)
    taken = {k: undisturbed(t) for k, t in interleaved({"floor": floor, **ways}, rounds).items()}
    return [
        {
            "way": name,
            "ms": 1e3 * took,
            "x floor": took / taken["floor"],
            "TFLOP/s of the floor's": flops / took / 1e12,
            "error": errors.get(name, 0.0),
        }
        for name, took in taken.items()
    ]


def phases(bundle: Bundle, config: TrainConfig, rounds: int) -> list[dict[str, Any]]:
    """Operations, bytes, floor and measured time of each phase of a training step."""
    device = pick_device("auto")
    rate, bandwidth = product_rate(device, torch.float32), copy_rate(device)
    one = config.micro_batch is None
    samples = config.global_batch if one else int(config.micro_batch or 0)
    cost = DryRun(bundle, config).cost(samples, one_pass=one)
    m = config.global_batch / samples
    work = {
        "first pass: generator, G": cost.first * m,
        "second pass: G where it is one, cotangents, generator": cost.second * m - cost.saved + cost.residual,
        "optimizer": cost.update,
    }
    step = our_step(bundle, config)
    numbers = iter(range(1, rounds + 3))
    interleaved({"step": lambda: step(next(numbers))}, 0, warm_up=2)
    step.phases.take()
    whole = undisturbed(interleaved({"step": lambda: step(next(numbers))}, rounds, warm_up=0)["step"])
    spent = {name: value / rounds for name, value in step.phases.take().items()}
    measured = {
        "first pass: generator, G": 0.0 if one else spent["kkt_sum"],
        "second pass: G where it is one, cotangents, generator": spent["cotangents"]
        + spent["all_reduce"]
        + (spent["kkt_sum"] if one else 0.0),
        "optimizer": spent["optimizer"],
    }

    def row(name: str, one: OpCost, took: float) -> dict[str, Any]:
        floor = one.flops / rate + one.moved_bytes / bandwidth
        return {
            "phase": name,
            "GFLOP": one.flops / 1e9,
            "MB moved": one.moved_bytes / 1e6,
            "calls": one.calls,
            "floor ms": 1e3 * floor,
            "products ms": 1e3 * one.flops / rate,
            "measured ms": 1e3 * took,
            "x floor": took / floor if floor else 0.0,
        }

    rows = [row(name, part, measured[name]) for name, part in work.items() if part.calls]
    total = sum(work.values(), OpCost())
    return [*rows, row("step", total, whole)]


@flush_denormals()  # as a run does
def main() -> None:
    """Print both tables and write ``results/floor.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a narrow net and few rounds: see that it works")
    parser.add_argument("--batch", type=int, default=1024)
    arguments = parser.parse_args()
    rounds, width = (3, 50) if arguments.quick else (30, 1000)
    bundle, batch = classifier(width=width), arguments.batch
    kkt = gradients(bundle, batch, rounds)
    show(f"one KKT gradient, 784-{width}-{width}-10, batch {batch}", kkt)
    config = standing(batch)
    steps = {}
    for name, size in (("one pass", None), ("two passes", batch // 2)):
        steps[name] = phases(bundle, replace(config, micro_batch=size), rounds)
        show(f"a training step, {name}, batch {batch}", steps[name])
    found = {row["way"]: row["x floor"] for row in kkt}
    settings = {"quick": arguments.quick, "width": width, "batch": batch, "rounds": rounds}
    print(f"written: {write_result('floor', settings, kkt=kkt, steps=steps)}")
    for name, limit in MUST.items():
        print(f"{name}: {found[name]:.2f} x floor (target: {limit})")


if __name__ == "__main__":
    main()
