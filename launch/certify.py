"""``c2g certify``: distance of a classifier from a KKT point of the maximum-margin problem, given its training data."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from hpc_c2g.fitting.config import CertifyConfig
from launch._compose.cli import run_verb
from launch._compose.groups import SCHEMAS


def certify(config: CertifyConfig) -> None:
    """Solve for every form of the left side, print the table and the verdict."""
    from hpc_c2g.fitting.certificate import verdict  # torch takes seconds to import: after the settings are checked
    from hpc_c2g.fitting.certify import certify_bundle

    rates, certificates = certify_bundle(config.classifier, config.data)
    best = min(certificates, key=lambda c: c.relative_residual)
    out = Table(title="relative residual of stationarity, best multipliers on the training data (uses real data)")
    for column in ("tensor", "rate", *(c.form for c in certificates)):
        out.add_column(column, justify="left" if column == "tensor" else "right")
    out.add_row("total", "", *(f"{c.relative_residual:.3f}" for c in certificates), style="bold")
    for name, rate in rates.items():
        out.add_row(name, f"{rate:.3f}", *(f"{c.per_tensor[name]:.3f}" for c in certificates))
    Console(width=110).print(out)
    print(
        f"{best.support_samples} of {best.samples} samples carry multipliers; {best.equations} equations for"
        f" {best.unknowns} unknowns; smallest margin {best.min_margin:.1f}, train accuracy {best.accuracy:.3f}"
    )
    fifth = sorted(best.shares)[-max(1, best.samples // 5) :]
    print(
        f"the fifth of the samples with the most multipliers carries {sum(fifth):.2f} of all of them"
        " (the share of each sample: certificate.json)"
    )
    print(f"verdict ({best.form}): {verdict(best)}")


def main() -> None:
    """Run the verb."""
    run_verb("certify", CertifyConfig, certify, SCHEMAS["certify"][1])


if __name__ == "__main__":
    main()
