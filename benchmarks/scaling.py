"""``python -m benchmarks.scaling [--quick]``: strong and weak scaling over processes of this machine, the plan's prediction beside.

More processes than cores share them: then the ideal is the cores' number, not the processes'.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.common import random_classifier, show, write_result
from benchmarks.plan import NETS, mean_rates, rounds
from hpc_c2g.classifiers.bundle import load_bundle
from hpc_c2g.distributed.local import on_local_ranks
from hpc_c2g.monitoring.config import LogConfig
from hpc_c2g.planning.measure import hardware_of
from hpc_c2g.planning.predict import step_time
from hpc_c2g.training.config.objective import AlphaConfig
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.cost.dry_run import DryRun


def main() -> None:
    """Print the table and write ``results/scaling.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small net, two processes and few rounds")
    quick = parser.parse_args().quick
    net = "64-500-10" if quick else "784-1000-1000-10"
    per_rank, count, steps = (64, 1, 6) if quick else (512, 3, 14)
    cores = len(os.sched_getaffinity(0))
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        random_classifier(Path(name) / net, **NETS[net])
        for kind in ("strong", "weak"):
            first: tuple[float, float] | None = None
            for ranks in (1, 2) if quick else (1, 2, 4):
                share = per_rank if kind == "weak" else 2 * per_rank // ranks
                micro = share // 2  # two passes everywhere: the same work per sample
                config = TrainConfig(
                    classifier=str(Path(name) / net),
                    run_dir=str(Path(name) / f"{kind}-{ranks}"),
                    steps=steps,
                    global_batch=share * ranks,
                    micro_batch=micro,
                    device="cpu",
                    alpha=AlphaConfig(init=-1.0),
                    log=LogConfig(progress=False, images_every=10**6),
                )
                cost = DryRun(load_bundle(config.classifier), config).cost(micro)
                answers = on_local_ranks(ranks, rounds, replace(config), cost, count, seconds=900)
                pairs = []
                for together in zip(*answers, strict=True):
                    profile = hardware_of([mean_rates(before, after) for before, _, after in together], ranks)
                    measured = statistics.mean(seconds[0] for _, seconds, _ in together)
                    pairs.append((measured, step_time(cost, profile, 1, share).total))
                measured, predicted = (statistics.median(values) for values in zip(*pairs, strict=True))
                first = first or (measured, predicted)
                ideal = min(ranks, cores) if kind == "strong" else min(ranks, cores) / ranks
                rows.append(
                    {
                        "kind": kind,
                        "processes": ranks,
                        "batch": share * ranks,
                        "step ms": 1e3 * measured,
                        "planned ms": 1e3 * predicted,
                        "planned / step": predicted / measured,
                        "efficiency": first[0] / measured / ideal,
                        "planned efficiency": first[1] / predicted / ideal,
                    }
                )
                print(f"{kind} on {ranks}: {1e3 * measured:.0f} ms, planned {1e3 * predicted:.0f} ms", flush=True)
    show(f"{net} on {cores} cores", rows)
    settings = {"quick": quick, "net": net, "rounds": count, "load": os.getloadavg()}
    print(f"written: {write_result('scaling', settings, rows=rows)}")


if __name__ == "__main__":
    main()
