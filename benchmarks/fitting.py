"""``python -m benchmarks.fitting --root DIR [--quick]``: MNIST-500 to margin 300 against a plain loop, and its certificate.

The plain loop is the same rescaled gradient flow in float64, without anything else. Both run to the margin, one after the other;
seconds are of the process's own CPU time besides wall time, since neighbors disturb runs of minutes. Each fit and each certificate
runs in a process of its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import show, write_result
from benchmarks.memory import peak_bytes
from hpc_c2g.classifiers.bundle import Bundle, build_model, load_bundle, save_bundle
from hpc_c2g.classifiers.normalization import Normalization
from hpc_c2g.data.config import DataConfig
from hpc_c2g.data.load import load_split
from hpc_c2g.distributed.local import on_local_ranks
from hpc_c2g.distributed.world import World
from hpc_c2g.fitting.certificate import certify
from hpc_c2g.fitting.config import InitConfig, MarginFitConfig
from hpc_c2g.fitting.fit import fit_margin, initialize, smoothed_margin
from hpc_c2g.kkt.margins import pairwise_margins, smallest_margins
from hpc_c2g.training.step.objective import verified_rates


@dataclass(frozen=True)
class Way:
    """Plain loop in float64, or ours in float32; drop of the exponent per step."""

    plain: bool
    rate: float


WAYS = {
    "plain loop, float64, rate 0.05": Way(True, 0.05),
    "ours, float32, rate 0.05": Way(False, 0.05),
    "ours, float32, rate 0.1": Way(False, 0.1),
}
MUST_FIT, MUST_SECONDS, MUST_GIB = 0.6, 60.0, 4.0


def plain_loop(model: nn.Module, x: Tensor, labels: Tensor, target: float, rate: float) -> int:
    """Full-batch gradient descent on the smoothed margin, step rate / ||grad||^2, halved where it overshoots; returns the steps."""
    model.double().train().requires_grad_(True)
    own, previous, step = rate, float("inf"), 0
    while True:
        logits = model(x)
        loss = smoothed_margin(logits, labels)
        if float(smallest_margins(pairwise_margins(logits.detach(), labels), labels).min()) >= target:
            return step
        own = own / 2 if loss.item() > previous else min(own * 1.05, rate)
        previous, step = loss.item(), step + 1
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            square = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
            for parameter in model.parameters():
                parameter.sub_(parameter.grad, alpha=own / square)  # type: ignore[arg-type]


def fitted(
    world: World, folder: str, architecture: dict[str, Any], x: Tensor, labels: Tensor, target: float, way: Way
) -> tuple[int, float, float]:
    """Fit from the same start and save the bundle; steps, CPU and wall seconds."""
    torch.set_flush_denormal(not way.plain)  # of a new process, so that it reaches every thread
    model = build_model(architecture)
    initialize(model, InitConfig(first=0.003), 0)
    wall, cpu = time.perf_counter(), time.process_time()
    if way.plain:
        steps = plain_loop(model, x, labels, target, way.rate)
    else:
        steps = fit_margin(model, x, labels, MarginFitConfig(target_margin=target, lr=way.rate, dtype="float32"))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    names, shape = [str(c) for c in range(10)], (1, 28, 28)
    save_bundle(Bundle(model.double().eval(), architecture, names, shape, Normalization.constant(shape)), Path(folder))
    return steps, cpu, wall


def certificate(world: World, folder: str, x: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """The certificate, its seconds and the GiB that it added to the process."""
    bundle = load_bundle(Path(folder))
    rates = verified_rates(bundle)
    before, began = peak_bytes(world.device, reset=True), time.perf_counter()
    found = certify(bundle, x, labels, rates)
    took, most = time.perf_counter() - began, peak_bytes(world.device, reset=False)
    return found.relative_residual, took, (most - before) / 2**30


def main() -> None:
    """Print the table, write ``results/fitting.json``, and fail where a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", help="where MNIST/raw/ is; without it, noise of its shape")
    parser.add_argument(
        "--quick", action="store_true", help="a narrow net, few samples and a small margin: see that it works"
    )
    arguments = parser.parse_args()
    quick = arguments.quick
    n, width, target = (40, 50, 20.0) if quick else (500, 1000, 300.0)
    if arguments.root:
        split = load_split(DataConfig(name="mnist", root=arguments.root, train_size=n))
        raw, labels = split.train.samples.double(), split.train.labels
    else:
        raw, labels = torch.rand(n, 1, 28, 28, dtype=torch.float64), torch.arange(n) % 10
    x = raw - raw.mean(0)
    architecture = {"target": "mlp", "input_shape": [1, 28, 28], "classes": 10, "width": width, "depth": 2}
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        for number, (name, way) in enumerate(WAYS.items()):
            bundle = f"{folder}/{number}"
            steps, cpu, wall = on_local_ranks(1, fitted, bundle, architecture, x, labels, target, way, seconds=7200)[0]
            value, took, gib = on_local_ranks(1, certificate, bundle, x, labels, seconds=1800)[0]
            rows.append(
                {
                    "fit": name,
                    "steps": steps,
                    "CPU s": cpu,
                    "wall s": wall,
                    "x plain loop": cpu / (rows[0]["CPU s"] if rows else cpu),
                    "certificate": value,
                    "its s": took,
                    "its GiB": gib,
                }
            )
            print(f"{name}: {steps} steps, {cpu:.0f} s", flush=True)
    show(f"{n} samples, 784-{width}-10 to margin {target:g}, and its certificate (uses real data)", rows)
    settings = {
        "quick": quick,
        "width": width,
        "samples": n,
        "target": target,
        "data": "mnist" if arguments.root else "noise",
    }
    print(f"written: {write_result('fitting', settings, rows=rows)}")
    worst = max(row["x plain loop"] for row in rows[1:])
    slowest, largest = max(row["its s"] for row in rows), max(row["its GiB"] for row in rows)
    if not quick and (worst > MUST_FIT or slowest > MUST_SECONDS or largest > MUST_GIB):
        sys.exit(f"over a limit: fit {worst:.2f} x, certificate {slowest:.0f} s and {largest:.1f} GiB")


if __name__ == "__main__":
    main()
