"""``python -m benchmarks.throughput [--quick]``: our step against the joint graph at equal batch, interleaved in one run."""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics

import torch

from benchmarks.common import show, write_result
from benchmarks.kkt import products
from benchmarks.subject import Step, classifier, joint_step, our_step, standing
from benchmarks.timing import interleaved, undisturbed
from hpc_c2g.denormals import flush_denormals
from hpc_c2g.distributed.environment import pick_device
from hpc_c2g.training.config.train import TrainConfig

BATCH = 1024


@flush_denormals()  # as a run does
def main() -> None:
    """Print the table and write ``results/throughput.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a narrow net and few rounds: see that it works")
    quick = parser.parse_args().quick
    rounds, width = (3, 50) if quick else (30, 1000)
    bundle = classifier(width=width)
    config = standing(BATCH)
    ways: dict[str, Step] = {"joint graph": joint_step(bundle, config), "one pass": our_step(bundle, config)}
    for micro_batch in (512, 256):
        two = TrainConfig(**{**vars(config), "micro_batch": micro_batch})
        ways[f"two passes of {micro_batch}"] = our_step(bundle, two)
    numbers = {name: itertools.count(1) for name in ways}
    floor, _ = products(bundle, BATCH, pick_device("auto"), torch.float32)
    calls = {name: functools.partial(lambda step, n: step(next(n)), step, numbers[name]) for name, step in ways.items()}
    seconds = interleaved({"floor": floor, **calls}, rounds)
    least = undisturbed(seconds.pop("floor"))
    joint = undisturbed(seconds["joint graph"])
    rows = [
        {
            "step": name,
            "ms": 1e3 * undisturbed(took),
            "median ms": 1e3 * statistics.median(took),
            "samples/s": BATCH / undisturbed(took),
            "x products of the KKT gradient": undisturbed(took) / least,
            "x joint graph": joint / undisturbed(took),
            "x of medians": statistics.median(seconds["joint graph"]) / statistics.median(took),
        }
        for name, took in seconds.items()
    ]
    show(f"784-{width}-{width}-10, batch {BATCH}, {rounds} rounds", rows)
    settings = {"quick": quick, "width": width, "batch": BATCH, "rounds": rounds}
    print(f"written: {write_result('throughput', settings, rows=rows)}")


if __name__ == "__main__":
    main()
