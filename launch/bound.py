"""``c2g bound``: the error of the KKT sum against the batch size, beside the bound that it is compared with."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from hpc_c2g.bound.config import CONFIDENCE, BoundConfig
from launch._compose.cli import run_verb

COLUMNS = {
    "error": "error",
    "standard_error": "+-",
    "predicted": "1/B law",
    "quantile": f"{CONFIDENCE:.0%} of errors",
    "bound": f"{CONFIDENCE:.0%} bound",
    "relative_error": "error / norm of G",
    "residual_bias": "adds to L_stat",
    "residual_bias_predicted": "by the law",
}


def table(result: dict[str, Any]) -> Table:
    """Return a table with one line per scheme and batch size."""
    out = Table(title=f"{result['classifier']}: ||G(B) - G|| in the norm of the loss (no data)")
    out.add_column("scheme")
    for name in ("B", *COLUMNS.values()):
        out.add_column(name, justify="right")
    for row, after in zip(result["rows"], [*result["rows"][1:], None], strict=True):
        last = after is None or after["scheme"] != row["scheme"]
        cells = [f"{row[key]:.1g}" if key == "standard_error" else f"{row[key]:.3g}" for key in COLUMNS]
        style = "bold" if row["own"] else ""
        out.add_row(row["scheme"], str(row["batch"]), *cells, style=style, end_section=last)
    return out


def summary(result: dict[str, Any]) -> str:
    """Return the exponents, the expected value, and the batch sizes that suit the lattice, as text."""
    lines = []
    for scheme, found in result["exponents"].items():
        if found is not None:
            lines.append(
                f"{scheme}: error ~ B^{found['measured']:.3f} +- {found['standard_error']:.3f}"
                f" (independent samples: B^{found['predicted']:.3f})"
            )
    reference = result["reference"]
    doubling = reference["batch_that_doubles_the_residual"]
    lines.append(
        f"expectation: norm of G {reference['norm']:.3g}, L_stat {reference['residual']:.3g}, known to"
        f" {reference['error']:.1g}"
        + (f"; independent batches of {doubling:.0f} double L_stat" if doubling is not None else "")
    )
    lines.append(f"a lattice of a multiple of {result['period']} samples meets every code of every class equally often")
    return "\n".join(lines)


def bound(config: BoundConfig) -> None:
    """Measure, and print a table per classifier."""
    from hpc_c2g.bound.sampling_error import (
        sampling_error,  # torch takes seconds to import: after the settings are checked
    )

    console = Console(stderr=True)
    found = sampling_error(config, lambda text: console.print(f"bound: {text}"))
    for result in found["classifiers"]:
        Console(width=130).print(table(result))
        print(summary(result))
    print(f"written: {config.run_dir}/sampling_error.json (bold: the run's own batch, scheme {found['scheme']})")


def main() -> None:
    """Run the verb."""
    run_verb("bound", BoundConfig, bound)


if __name__ == "__main__":
    main()
