"""``c2g certify``: how close is a classifier to a KKT point of the maximum-margin problem, given its training data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hpc_c2g.classifiers.bundle import load_bundle
from hpc_c2g.classifiers.certificate import certify as solve
from hpc_c2g.classifiers.certificate import verdict
from hpc_c2g.classifiers.rates import find_rates
from hpc_c2g.data.config import DataConfig
from hpc_c2g.data.load import load_split
from hpc_c2g.data.record import fitted_data
from hpc_c2g.files import write_atomically
from hpc_c2g.kkt.stationarity import LEFT_SIDES
from launch.classifier import DATA
from launch.cli import run_verb


@dataclass
class CertifyConfig:
    """What to certify.

    Attributes:
        classifier: folder of the bundle; certificate.json is written into it.
        data: its own training data; None takes what its record names.
    """

    classifier: str = "???"
    data: DataConfig | None = None


def certify(config: CertifyConfig) -> None:
    """Solve for every form of the left side, print the table and the verdict."""
    bundle = load_bundle(config.classifier)
    train = load_split(fitted_data(config.classifier, config.data)).train
    rates = find_rates(bundle.model).parameters
    x = bundle.normalisation.normalise(train.samples.double())
    forms = (
        LEFT_SIDES if len(set(rates.values())) > 1 else LEFT_SIDES[:1]
    )  # all forms agree where the rates are uniform
    certificates = [solve(bundle, x, train.labels, rates, form) for form in forms]
    best = min(certificates, key=lambda c: c.relative_residual)
    out = Table(title="relative residual of stationarity, best multipliers on the training data (uses real data)")
    for column in ("tensor", "rate", *forms):
        out.add_column(column, justify="left" if column == "tensor" else "right")
    out.add_row("total", "", *(f"{c.relative_residual:.3f}" for c in certificates), style="bold")
    for name, rate in rates.items():
        out.add_row(name, f"{rate:.3f}", *(f"{c.per_tensor[name]:.3f}" for c in certificates))
    Console(width=110).print(out)
    print(
        f"{best.support_samples} of {best.samples} samples carry multipliers; {best.equations} equations for"
        f" {best.unknowns} unknowns; smallest margin {best.min_margin:.1f}, train accuracy {best.accuracy:.3f}"
    )
    print(f"verdict ({best.form}): {verdict(best)}")
    content = [{k: v for k, v in asdict(c).items() if k != "multipliers"} for c in certificates]
    write_atomically(Path(config.classifier) / "certificate.json", json.dumps(content, indent=2).encode())


def main() -> None:
    """Entry point."""
    run_verb("certify", CertifyConfig, certify, DATA)


if __name__ == "__main__":
    main()
