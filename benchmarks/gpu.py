"""``python -m benchmarks.gpu --all [--quick]``: all GPU speed targets, measured in one run of a few minutes.

Each way of the KKT gradient is compared with float64 on the same samples before it is timed; a wrong one ends the run. Without a GPU
``--quick`` runs the same code on the CPU, to see that it works; what it times then means nothing.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.common import show, write_result
from benchmarks.kkt import Gradient, Samples, error, objective_of, one_pass, products, refuse_wrong, sum_of, two_passes
from benchmarks.peers import PUBLISHED, PeerLoop
from benchmarks.subject import classifier, our_step, standing
from benchmarks.timing import copy_rate, interleaved, product_rate, seconds, undisturbed
from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.denormals import flush_denormals
from hpc_c2g.distributed.environment import pick_device

MUST = {
    "step per sample / peers' eager float32": 0.2,
    "small step / autograd": 0.25,
    "share of the bfloat16 rate": 0.35,
}
WAYS: dict[str, dict[str, str]] = {
    "autograd": {"kkt_backend": "autograd"},
    "float32": {},
    "bfloat16": {"matmul_precision": "bfloat16"},
}


def check(bundle: Bundle, batch: int) -> dict[str, float]:
    """Relative error of every way against float64.

    Raises:
        SystemExit: one is not the gradient.
    """
    device = pick_device("auto")
    exact = objective_of(bundle, batch, device, torch.float64, kkt_backend="autograd")
    reference = one_pass(exact, Samples.random(bundle, batch, device, torch.float64))
    samples = Samples.random(bundle, batch, device, torch.float32)
    errors = {}
    for name, settings in WAYS.items():
        objective = objective_of(bundle, batch, device, torch.float32, **settings)
        errors[f"{name}, one pass"] = error(one_pass(objective, samples), reference)
        errors[f"{name}, two passes"] = error(two_passes(objective, samples, batch // 4, sum_of(objective)), reference)
    refuse_wrong(errors)
    return errors


def gradients(bundle: Bundle, batch: int, micro_batch: int, rounds: int) -> list[dict[str, Any]]:
    """Time of one KKT gradient, and its share of the rates that large products reach."""
    device = pick_device("auto")
    samples = Samples.random(bundle, batch, device, torch.float32)
    rates = {dtype: product_rate(device, dtype, rounds) for dtype in (torch.float32, torch.bfloat16)}
    ways: dict[str, Callable[[], Gradient]] = {}
    for name, settings in WAYS.items():
        objective = objective_of(bundle, batch, device, torch.float32, **settings)
        if name != "autograd":
            ways[f"{name}, one pass"] = functools.partial(one_pass, objective, samples)
        ways[f"{name}, two passes of {micro_batch}"] = functools.partial(
            two_passes, objective, samples, micro_batch, sum_of(objective)
        )
    flops = products(bundle, 1, device, torch.float32)[1] * batch
    taken = interleaved(ways, rounds)
    return [
        {
            "way": name,
            "ms": 1e3 * undisturbed(took),
            "TFLOP/s of the method's": flops / undisturbed(took) / 1e12,
            "share of float32 rate": flops / undisturbed(took) / rates[torch.float32],
            "share of bfloat16 rate": flops / undisturbed(took) / rates[torch.bfloat16],
        }
        for name, took in taken.items()
    ]


def largest_of_peers(bundle: Bundle, limit: int) -> tuple[int, float]:
    """The largest batch that the peers' loop in float32 can hold, and its seconds per sample."""
    batch, found = 1024, (0, float("inf"))
    while batch <= limit:
        try:
            loop = PeerLoop(bundle, batch, PUBLISHED["Adam"], torch.float32)
            loop()
            found = batch, min(seconds(loop) for _ in range(3)) / batch
            del loop
        except torch.cuda.OutOfMemoryError:
            break
        batch *= 2
    return found


def steps(bundle: Bundle, batches: dict[int, int | None], rounds: int) -> list[dict[str, Any]]:
    """Time of whole training steps per batch size and micro-batch."""
    rows = []
    for batch, micro_batch in batches.items():
        ways: dict[str, Callable[[], object]] = {}
        for name, settings in WAYS.items():
            config = replace(standing(batch), micro_batch=micro_batch, **settings)  # type: ignore[arg-type]
            ways[name] = functools.partial(
                lambda step, numbers: step(next(numbers)), our_step(bundle, config), itertools.count(1)
            )
        taken = {name: undisturbed(took) for name, took in interleaved(ways, rounds).items()}
        rows += [
            {
                "batch": batch,
                "step": k,
                "ms": 1e3 * t,
                "us per sample": 1e6 * t / batch,
                "x autograd": t / taken["autograd"],
            }
            for k, t in taken.items()
        ]
    return rows


@flush_denormals()  # as a run does
def main() -> None:
    """Print the tables, write ``results/gpu.json``, and name the missed targets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every row (there is no other choice)")
    parser.add_argument("--quick", action="store_true", help="a narrow net, small batches, few rounds")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.quick:
        sys.exit("no GPU here: give --quick to see that the code works")
    width, large, part, small, rounds = (50, 2048, 512, 256, 2) if arguments.quick else (1000, 65_536, 16_384, 1024, 20)
    device, bundle = pick_device("auto"), classifier(width=width)
    errors = check(bundle, small)
    ceilings = {
        f"{dtype} products, TFLOP/s": product_rate(device, dtype, rounds) / 1e12
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    } | {"copies, GB/s": copy_rate(device, rounds) / 1e9}
    show("ceilings", [ceilings])
    kkt = gradients(bundle, large, part, rounds)
    show(f"one KKT gradient, 784-{width}-{width}-10, batch {large}", kkt)
    whole = steps(bundle, {small: None, large: part}, rounds)
    show("training steps", whole)
    batch, peer = largest_of_peers(bundle, large if arguments.quick else 2**20)
    best = min((row for row in whole if row["batch"] == large), key=lambda row: float(row["ms"]))
    found = {
        "step per sample / peers' eager float32": best["us per sample"] / (1e6 * peer),
        "small step / autograd": min(r["x autograd"] for r in whole if r["batch"] == small),
        "share of the bfloat16 rate": max(row["share of bfloat16 rate"] for row in kkt),
    }
    settings = {
        "quick": arguments.quick,
        "width": width,
        "batch": large,
        "micro_batch": part,
        "small": small,
        "rounds": rounds,
    }
    file = write_result(
        "gpu",
        settings,
        errors=errors,
        ceilings=ceilings,
        kkt=kkt,
        steps=whole,
        peers={"largest batch": batch, "us per sample": 1e6 * peer},
        asked=found,
    )
    print(f"written: {file}")
    for name, value in found.items():
        reached = value >= MUST[name] if name.startswith("share") else value <= MUST[name]
        print(f"{name}: {value:.3f} (target: {MUST[name]}){'' if reached else ', not reached'}")


if __name__ == "__main__":
    main()
