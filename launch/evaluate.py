"""``c2g evaluate``: evaluation of a generator against real data, beside its baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hpc_c2g.evaluation.config import EvaluateConfig
from hpc_c2g.evaluation.metric_registry import METRICS, numbers
from hpc_c2g.logs import run_logging
from hpc_c2g.reporting.memorization import by_multiplier, rows, shares_in
from launch._compose.cli import run_verb
from launch._compose.groups import SCHEMAS


def table(result: dict[str, Any]) -> Table:
    """Return a table of the run and its baselines, one line each."""
    out = Table(
        title=f"{result['classifier']}: uses real data, computed after training", box=SIMPLE_HEAD, collapse_padding=True
    )
    out.add_column("samples", min_width=15)
    rows = {name: numbers(row) for name, row in {"generator": result, **result["baselines"]}.items()}
    shown = [metric for metric in METRICS if any(metric.name in row for row in rows.values())]
    for metric in shown:
        out.add_column(metric.title, justify="right", width=max(map(len, metric.title.split())))
    for name, row in rows.items():
        cells = [f"{row[metric.name]:.3f}" if metric.name in row else "-" for metric in shown]
        out.add_row(name.replace("_", " "), *cells, style="bold" if name == "generator" else "")
    return out


def memory(result: dict[str, Any]) -> Table | str:
    """Return a table of the recovered training samples by their multipliers, or the reason why there is none."""
    folder, nearness = result["classifier"], result["nearness"]
    shares = shares_in(Path(folder))
    if shares is None:
        return f"the recovery by multipliers needs a certificate: c2g certify classifier={folder}"
    parts = by_multiplier(nearness, shares)
    if parts is None:
        return (
            f"{folder}/certificate.json does not apply to these {len(nearness)} training samples: it is of others, they"
            " are too few, or none carries multipliers"
        )
    head, body = rows(parts)
    out = Table(*head)
    for row in body:
        out.add_row(*row)
    return out


def evidence(result: dict[str, Any]) -> str:
    """Return what the samples recover, in a sentence for the generator and one for the peers' free images."""
    from hpc_c2g.evaluation.recovery import sentence  # after the settings are checked

    text = sentence(result["recovery"])
    peers = result["baselines"].get("free_images", {}).get("recovery")
    return f"{text}; by the free images of the peers: {sentence(peers)}" if peers else text


@run_logging("warning", rank=0)  # its baselines are training runs
def evaluate(config: EvaluateConfig) -> None:
    """Evaluate, and print the table and the paths."""
    # torch takes seconds to import: after the settings are checked
    from hpc_c2g.evaluation.evaluate import evaluate as judge_run

    console = Console(stderr=True)
    for result in judge_run(config, lambda text: console.print(f"evaluate: {text}")):
        Console(width=130).print(table(result))
        recovered = memory(result)
        Console(width=130).print(recovered) if isinstance(recovered, Table) else console.print(
            recovered, soft_wrap=True
        )
        print(evidence(result))
    print(
        f"written: {config.run_dir}/evaluation.json, {config.run_dir}/recovered.csv (each training sample's rank among held-out ones),"
        f" {config.run_dir}/nearest.png (training images above, nearest samples below)"
    )


def main() -> None:
    """Run the verb."""
    run_verb("evaluate", EvaluateConfig, evaluate, SCHEMAS["evaluate"][1])


if __name__ == "__main__":
    main()
