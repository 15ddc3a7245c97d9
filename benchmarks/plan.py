"""Prediction against measurement: seconds per step and memory per rank, on 1, 2 and 4 processes of this machine.

    python -m benchmarks.plan [--quick]        writes benchmarks/results/plan.json

Every round first measures the machine's rates (operators one by one, calls, all-reduces: no training step) in the very processes
that then train. Operators are timed by their thread's own clock, so that other programs on the machine do not count; training is timed by
the same clock (`computation`, which waits for nobody) and by the wall's (`step`, which is only fair on a quiet machine). The verdict is
the median over rounds of prediction / measurement.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import random_classifier, write_result
from hpc_c2g.classifiers.bundle import load_bundle
from hpc_c2g.distributed.local import on_local_ranks
from hpc_c2g.distributed.world import World
from hpc_c2g.monitoring.config import LogConfig
from hpc_c2g.planning.measure import Rates, hardware_of, measure_rates
from hpc_c2g.planning.predict import memory, step_time
from hpc_c2g.training.config.objective import AlphaConfig
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.cost.dry_run import DryRun, MicroBatchCost
from hpc_c2g.training.step.step_parts import StepResult
from hpc_c2g.training.step.train_step import TrainStep
from hpc_c2g.units import GIB

NETS = {
    "64-500-10": {"size": 8, "classes": 10, "width": 500},
    "784-1000-1000-10": {"size": 28, "classes": 10, "width": 1000, "depth": 3},
}
GLOBAL_BATCH = 1024
CASES = [(1, 256), (1, 1024), (2, 256), (2, 512), (4, 128), (4, 256)]  # ranks, micro-batch: two passes, and one


def trained_seconds(config: TrainConfig, world: World) -> tuple[float, float]:
    """Mean wall and thread seconds per step of a training run, from the start of one step to the start of the next."""
    from hpc_c2g.training.loop import train

    starts: list[tuple[float, float]] = []
    original = TrainStep.__call__

    def timed(self: TrainStep, step: int, watch: bool = False, lr_scale: float = 1.0) -> StepResult:
        starts.append((time.perf_counter(), time.thread_time()))
        return original(self, step, watch, lr_scale)

    TrainStep.__call__ = timed  # type: ignore[method-assign]
    try:
        train(config, world)
    finally:
        TrainStep.__call__ = original  # type: ignore[method-assign]
    wall, thread = ((last - first) / (len(starts) - 3) for first, last in zip(starts[2], starts[-1], strict=True))
    return wall, thread


def rounds(
    world: World, config: TrainConfig, cost: MicroBatchCost, count: int
) -> list[tuple[Rates, tuple[float, float], Rates]]:
    """(rates, seconds per step, rates again) per round."""
    torch.set_num_threads(1)
    active = min(world.size, len(os.sched_getaffinity(0)))
    result = []
    before = measure_rates(world, cost, active, 1, 0.4)
    for i in range(count):
        seconds = trained_seconds(replace(config, run_dir=f"{config.run_dir}-{i}"), world)
        after = replace(measure_rates(world, cost, active, 1, 0.4), runtime=before.runtime)  # before any training
        result.append((before, seconds, after))
        before = after
    return result


def peak_bytes(world: World, config: TrainConfig) -> float:
    """Largest resident set of a process that trains; getrusage would include the parent's."""
    torch.set_num_threads(1)
    trained_seconds(config, world)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def mean_rates(one: Rates, other: Rates) -> Rates:
    """Mean of the rates measured before and after the steps."""
    pairs = zip(one.sums, other.sums, strict=True)
    return replace(
        one,
        products=(one.products + other.products) / 2,
        moves=(one.moves + other.moves) / 2,
        call=(one.call + other.call) / 2,
        sums=tuple((b, (s + t) / 2) for (b, s), (_, t) in pairs),
    )


def compare(net: str, folder: Path, ranks: int, micro: int, count: int, steps: int) -> dict[str, Any]:
    """One case: predictions, measurements and their ratios."""
    share = GLOBAL_BATCH // ranks
    config = TrainConfig(
        classifier=str(folder / net),
        run_dir=str(folder / f"{net}-{ranks}-{micro}"),
        steps=steps,
        global_batch=GLOBAL_BATCH,
        micro_batch=micro,
        device="cpu",
        alpha=AlphaConfig(init=-1.0),
        log=LogConfig(progress=False, every=10, images_every=10**6),
    )
    bundle = load_bundle(config.classifier)
    cost = DryRun(bundle, config).cost(micro, micro == share)
    per_rank = on_local_ranks(ranks, rounds, config, cost, count, seconds=600)
    peaks = on_local_ranks(ranks, peak_bytes, replace(config, run_dir=config.run_dir + "-m", steps=5), seconds=300)
    times = []
    for together in zip(*per_rank, strict=True):
        hardware = hardware_of([mean_rates(before, after) for before, _, after in together], ranks)
        wall, thread = (statistics.mean(seconds[i] for _, seconds, _ in together) for i in (0, 1))
        predicted = step_time(cost, hardware, 1, share)
        times.append(
            {
                "predicted": asdict(predicted) | {"total": predicted.total},
                "measured": wall,
                "ratio": predicted.total / wall,
                "computation_measured": thread,
                "computation_ratio": predicted.computation
                * hardware.share
                / thread,  # its own time, not its neighbors'
            }
        )
    file_bytes = float(sum(t.numel() * t.element_size() for t in bundle.model.state_dict().values()))
    bytes_predicted, bytes_measured = memory(cost, hardware, "float32", 0, ranks, file_bytes).total, max(peaks)
    return {
        "net": net,
        "ranks": ranks,
        "micro_batch": micro,
        "one_pass": cost.one_pass,
        "rounds": times,
        "seconds_predicted": statistics.median(t["predicted"]["total"] for t in times),
        "seconds_measured": statistics.median(t["measured"] for t in times),
        "computation_measured": statistics.median(t["computation_measured"] for t in times),
        "time_ratio": statistics.median(t["ratio"] for t in times),
        "computation_ratio": statistics.median(t["computation_ratio"] for t in times),
        "bytes_predicted": bytes_predicted,
        "bytes_measured": bytes_measured,
        "memory_ratio": bytes_predicted / bytes_measured,
        "profile": asdict(hardware),
    }


def table(results: list[dict[str, Any]]) -> Table:
    """One line per case."""
    columns = (
        "net",
        "ranks",
        "micro",
        "passes",
        "step",
        "measured",
        "ratio",
        "computation",
        "ratio",
        "GiB",
        "measured",
        "ratio",
    )
    out = Table(title="prediction / measurement, medians over rounds")
    for column in columns:
        out.add_column(column, justify="right")
    for r in results:
        ratios, own = ([t[k] for t in r["rounds"]] for k in ("ratio", "computation_ratio"))
        out.add_row(
            r["net"],
            str(r["ranks"]),
            str(r["micro_batch"]),
            "1" if r["one_pass"] else "2",
            f"{r['seconds_predicted'] * 1e3:.1f} ms",
            f"{r['seconds_measured'] * 1e3:.1f} ms",
            f"{r['time_ratio']:.2f} ({min(ratios):.2f}..{max(ratios):.2f})",
            f"{r['computation_measured'] * 1e3:.1f} ms",
            f"{r['computation_ratio']:.2f} ({min(own):.2f}..{max(own):.2f})",
            f"{r['bytes_predicted'] / GIB:.3f}",
            f"{r['bytes_measured'] / GIB:.3f}",
            f"{r['memory_ratio']:.2f}",
        )
    return out


def main() -> None:
    """Run all cases, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and cases")
    quick = parser.parse_args().quick
    count, steps = (2, 8) if quick else (5, 18)
    results = []
    with tempfile.TemporaryDirectory() as name:
        for net, architecture in NETS.items():
            random_classifier(Path(name) / net, **architecture)
            for ranks, micro in CASES[::2] if quick else CASES:
                results.append(compare(net, Path(name), ranks, micro, count, steps))
                ratios = {k: round(results[-1][f"{k}_ratio"], 2) for k in ("time", "computation", "memory")}
                print(f"{net} on {ranks}, micro-batch {micro}: prediction / measurement {ratios}", flush=True)
    Console(width=170).print(table(results))
    load = os.getloadavg()
    print(f"load of the machine: {load[0]:.1f}, {load[1]:.1f}, {load[2]:.1f} on {len(os.sched_getaffinity(0))} cores")
    print(f"written: {write_result('plan', {'quick': quick, 'load': load}, cases=results)}")


if __name__ == "__main__":
    main()
