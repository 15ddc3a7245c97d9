"""``python -m benchmarks.peers --classifier DIR [--seconds 60] [--quick]``: the reconstruction peers' loop beside ours, in one run.

Peers (Haim et al. 2022, Buzaglo et al. 2023, Loo et al. 2024, reimplemented from their published descriptions): free images, two per
training image, one multiplier each on the margin to the runner-up class, one graph over the whole batch, eager, float64. The same
classifier and batch; first seconds and bytes per step, interleaved, then quality after equal wall time (*uses real data*). The peers
get the best of their published settings, chosen by that very coverage; ours gets its default recipe, once.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import show, write_result
from benchmarks.kkt import products
from benchmarks.memory import live_bytes
from benchmarks.subject import our_step
from benchmarks.timing import interleaved, seconds, undisturbed, wait
from hpc_c2g.classifiers.bundle import Bundle, load_bundle
from hpc_c2g.data.load import load_split
from hpc_c2g.denormals import flush_denormals
from hpc_c2g.distributed.environment import pick_device
from hpc_c2g.evaluation.metrics import judge, split_oracle
from hpc_c2g.fitting.record import fitted_data
from hpc_c2g.generators.config import FreeImagesConfig, MLPGeneratorConfig
from hpc_c2g.kkt.gates import GatedClassifier
from hpc_c2g.monitoring.config import LogConfig
from hpc_c2g.training.config.train import CheckpointConfig, TrainConfig
from hpc_c2g.training.loop import train
from hpc_c2g.training.results import load_run

SHOWN = ("oracle_accuracy", "transfer_accuracy", "proximity", "coverage", "diversity")


@dataclass(frozen=True)
class Settings:
    """Published settings: learning rates of x and of the multipliers, initial spread, least multiplier, gate steepness, optimizer."""

    rate: float
    lr_multipliers: float
    spread: float
    least: float
    steepness: float
    adam: bool = False


PUBLISHED = {
    "multiclass run": Settings(1.36e-3, 0.479, 6.2e-5, 0.203, 39.5),
    "multiclass sweep": Settings(2.4e-4, 0.951, 3.6e-4, 0.04, 326.0),
    "binary MNIST": Settings(0.0305, 1e-4, 3.5e-2, 0.447, 149.9),
    "Adam": Settings(0.02, 0.02, 0.2, 0.0, 50.0, adam=True),
}


class PeerLoop:
    """One reconstruction; each call is a step."""

    def __init__(self, bundle: Bundle, batch: int, settings: Settings, dtype: torch.dtype) -> None:
        self.device, self.settings = pick_device("auto"), settings
        self.phi = GatedClassifier(bundle.model).to(self.device, dtype)
        self.theta = {k: t.to(self.device, dtype).requires_grad_() for k, t in bundle.parameters.items()}
        self.widths = dict.fromkeys(self.phi.gates, 1 / settings.steepness)
        self.lower, self.upper = (b.to(self.device, dtype) for b in bundle.normalization.box())
        self.labels = torch.arange(batch, device=self.device) * len(bundle.classes) // batch
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, *bundle.input_shape, generator=generator) * settings.spread
        self.x = x.to(self.device, dtype).requires_grad_()
        self.multipliers = torch.rand(batch, generator=generator).to(self.device, dtype).requires_grad_()
        groups = [
            {"params": [self.x], "lr": settings.rate},
            {"params": [self.multipliers], "lr": settings.lr_multipliers},
        ]
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(groups) if settings.adam else torch.optim.SGD(groups, momentum=0.9)
        )

    def __call__(self) -> float:
        """One step; returns its loss."""
        logits = self.phi(self.theta, self.widths, self.x)
        own = logits.gather(1, self.labels[:, None])[:, 0]
        others = logits.scatter(1, self.labels[:, None], -torch.inf).amax(1)
        weights = self.multipliers / len(self.x)
        G = torch.autograd.grad(own - others, list(self.theta.values()), weights, create_graph=True)
        loss = torch.stack([(t.detach() - g).square().sum() for t, g in zip(self.theta.values(), G, strict=True)]).sum()
        loss = loss + 5 * (self.settings.least - self.multipliers).relu().square().sum()
        loss = loss + ((self.x - self.upper).relu() + (self.lower - self.x).relu()).square().sum()
        self.optimizer.zero_grad()
        self.x.grad, self.multipliers.grad = torch.autograd.grad(loss, [self.x, self.multipliers])
        self.optimizer.step()
        return float(loss.detach())


def our_config(folder: str, run_dir: str, batch: int, codes: int, steps: int) -> TrainConfig:
    """Default recipe with the given number of codes per class."""
    return TrainConfig(
        classifier=folder,
        run_dir=run_dir,
        steps=steps,
        global_batch=batch,
        generator=MLPGeneratorConfig(codes=codes),
        log=LogConfig(every=100, images_every=10**6, progress=False),
        checkpoint=CheckpointConfig(every=10**6),
    )


def costs(folder: str, bundle: Bundle, batch: int, codes: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds and MiB of a step."""
    ways: dict[str, Callable[[], object]] = {
        f"peers, {name}": PeerLoop(bundle, batch, PUBLISHED["Adam"], dtype)
        for name, dtype in (("float64", torch.float64), ("float32", torch.float32))
    }
    config = our_config(folder, "-", batch, codes, 10**6)
    free = replace(config, generator=FreeImagesConfig())
    for name, ours in (
        ("free images", free),
        ("generator", config),
        ("generator, kkt_backend=autograd", replace(config, kkt_backend="autograd")),
    ):
        step, numbers = our_step(bundle, ours), iter(range(1, 10**6))
        ways[f"ours, {name}"] = lambda step=step, numbers=numbers: step(next(numbers))  # type: ignore[misc]
    floor, _ = products(bundle, batch, pick_device("auto"), torch.float32)
    taken = {k: undisturbed(t) for k, t in interleaved({"floor": floor, **ways}, rounds).items()}
    peers = taken["peers, float32"]
    return [
        {
            "step": name,
            "ms": 1e3 * took,
            "x peers in float32": took / peers,
            "x products": took / taken["floor"],
            "MiB": live_bytes(ways[name]) / 2**20 if name in ways else 0.0,
        }
        for name, took in taken.items()
    ]


def quality(folder: str, bundle: Bundle, batch: int, per_image: int, limit: float) -> list[dict[str, Any]]:
    """Metrics (use real data) of every method after ``limit`` seconds of wall time, ours from its start with its pilot."""
    ours, codes = batch // 2 * per_image, per_image * -(-batch // (2 * len(bundle.classes)))
    split = load_split(fitted_data(folder, None))
    oracle = split_oracle(split, 0)

    def row(name: str, steps: int, took: float, samples: Tensor, labels: Tensor) -> dict[str, Any]:
        found = judge(samples, labels, split, 0, oracle)
        return {"method": name, "steps": steps, "seconds": took, **{k: found[k] for k in SHOWN}}

    rows = []
    for name, settings in PUBLISHED.items():
        began, steps, loss = time.perf_counter(), 0, 0.0
        peer = PeerLoop(bundle, batch, settings, torch.float64)
        while time.perf_counter() - began < limit and loss == loss:
            loss, steps = peer(), steps + 1
            wait()
        took = time.perf_counter() - began
        x = bundle.normalization.denormalize(peer.x.detach().cpu())
        if bool(x.isfinite().all()):
            rows.append(row(f"peers, {name}", steps, took, x, peer.labels.cpu()))
        else:
            print(f"peers, {name}: not finite after {steps} steps")
    with TemporaryDirectory() as scratch:
        train(our_config(folder, f"{scratch}/first", ours, codes, 1))  # imports
    for share in (1.0, 0.5):
        with TemporaryDirectory() as scratch:
            start = seconds(functools.partial(train, our_config(folder, f"{scratch}/start", ours, codes, 1)))
            step, numbers = our_step(bundle, our_config(folder, "-", ours, codes, 10**6)), itertools.count(1)
            each = statistics.mean(interleaved({"step": lambda: step(next(numbers))}, 20)["step"])  # noqa: B023
            steps = max(1, int((share * limit - start) / each))
            config = our_config(folder, f"{scratch}/run", ours, codes, steps)
            took = seconds(functools.partial(train, config))
            generator = load_run(Path(config.run_dir)).generator
            rows.append(row(f"ours, {share:g} of the time", steps, took, *generator.sample(batch, 0, "supported")))
    return rows


@flush_denormals()  # as a run does
def main() -> None:
    """Print both tables and write ``results/peers.json``; fail where ours covers no more after equal time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classifier", required=True, help="folder of a bundle whose data are at hand")
    parser.add_argument("--seconds", type=float, default=60.0, help="wall time of every method")
    parser.add_argument("--codes", type=int, default=2, choices=(1, 2), help="of our generator per training image")
    parser.add_argument("--quick", action="store_true", help="few rounds, one second: see that it works")
    parser.add_argument("--name", default="peers", help="of the result file")
    arguments = parser.parse_args()
    bundle = load_bundle(Path(arguments.classifier))
    train_size, classes = len(load_split(fitted_data(arguments.classifier, None)).train), len(bundle.classes)
    batch, codes = 2 * train_size, 2 * -(-train_size // classes)
    limit, rounds = (1.0, 3) if arguments.quick else (arguments.seconds, 15)
    rows = costs(arguments.classifier, bundle, batch, codes, rounds)
    show(f"a step, {train_size} training images, batch {batch}", rows)
    found = quality(arguments.classifier, bundle, batch, arguments.codes, limit)
    show(f"after {limit:g} s (uses real data)", found)
    best = max((r["coverage"] for r in found if r["method"].startswith("peers")), default=0.0)
    ours = next(r["coverage"] for r in found if r["method"].startswith("ours"))
    settings = {
        "quick": arguments.quick,
        "batch": batch,
        "seconds": limit,
        "train_size": train_size,
        "codes": arguments.codes,
    }
    print(f"written: {write_result(arguments.name, settings, steps=rows, quality=found)}")
    print(f"coverage after equal time: ours {ours:.3f}, the peers' best {best:.3f}")
    if ours <= best and not arguments.quick:
        sys.exit("ours covers no more than the peers after equal time")


if __name__ == "__main__":
    main()
