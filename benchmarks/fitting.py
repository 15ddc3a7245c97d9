"""``python -m benchmarks.fitting --root DIR [--quick]``: MNIST-500 to margin 300 against a plain loop, and its certificate.

The plain loop is the same rescaled gradient flow in float64, without anything else. Both run to the margin, one after the other;
seconds are of the process's own CPU time besides wall time, since neighbours disturb runs of minutes. The certificate runs in a
process of its own, for its memory.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import show, write_result
from hpc_c2g.classifiers.bundle import Bundle, build_model, load_bundle, save_bundle
from hpc_c2g.classifiers.certificate import certify
from hpc_c2g.classifiers.fitting import InitConfig, MarginFitConfig, fit_margin, initialise, smoothed_margin
from hpc_c2g.classifiers.normalisation import Normalisation
from hpc_c2g.data.config import DataConfig
from hpc_c2g.data.load import load_split
from hpc_c2g.distributed.local import on_local_ranks
from hpc_c2g.distributed.world import World
from hpc_c2g.kkt.margins import pairwise_margins, smallest_margins
from hpc_c2g.training.objective import verified_rates

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


def certificate(world: World, folder: str, x: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """The certificate, its seconds and the GiB that it added to the process."""
    bundle = load_bundle(Path(folder))
    rates = verified_rates(bundle)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to the resident set
    before, began = _peak(), time.perf_counter()
    found = certify(bundle, x, labels, rates)
    return found.relative_residual, time.perf_counter() - began, (_peak() - before) / 2**30


def _peak() -> float:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024.0 * int(fields["VmHWM"].split()[0])


def main() -> None:
    """Print the table, write ``results/fitting.json``, and fail where a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", help="where mnist/ is; without it, noise of its shape")
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
    start = build_model(architecture)
    initialise(start, InitConfig(first=0.003), 0)

    def ours(rate: float) -> Callable[[nn.Module], int]:
        config = MarginFitConfig(target_margin=target, rate=rate, dtype="float32")
        return lambda model: fit_margin(model, x, labels, config)

    ways: dict[str, Callable[[nn.Module], int]] = {
        "plain loop, float64, rate 0.05": lambda model: plain_loop(model, x, labels, target, 0.05),
        "ours, float32, rate 0.05": ours(0.05),
        "ours, float32, rate 0.1": ours(0.1),
    }
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        for name, fit in ways.items():
            torch.set_flush_denormal(name.startswith("ours"))  # as c2g classifier does
            model = copy.deepcopy(start)
            wall, cpu = time.perf_counter(), time.process_time()
            steps = fit(model)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            bundle = Bundle(
                model.double().eval(),
                architecture,
                [str(c) for c in range(10)],
                (1, 28, 28),
                Normalisation.constant((1, 28, 28)),
            )
            save_bundle(bundle, Path(folder) / name)
            value, took, gib = on_local_ranks(
                1, certificate, str(Path(folder) / name), x, labels, device="cpu", seconds=1800
            )[0]
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
