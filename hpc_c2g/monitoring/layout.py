"""TensorBoard's custom layout of a run: charts by question, each curve found by the pattern of its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MEMBER = r"((classifier|solution)\d+/)*"
"""What the names of a classifier's or a solution's curves begin with; nothing where there is but one."""
OWN = rf"^{MEMBER}"
Layout = dict[str, dict[str, list[Any]]]


def layout(prefixes: Sequence[str]) -> Layout:
    """Categories of charts.

    Args:
        prefixes: of each member's curves: ``[""]`` for one, ``["classifier0/", ...]`` or ``["solution0/", ...]`` for several.
    """
    return {
        "Conditions": {
            "relative residual": ["Multiline", [r"^stationarity$"]],
            "relative residual per classifier and solution": [
                "Multiline",
                [r"^((classifier|solution)\d+/)+stationarity$"],
            ],
            "relative residual per tensor": ["Multiline", [OWN + "stationarity/"]],
            "losses": ["Multiline", [OWN + "(loss|duality|feasibility|slackness|box|total_variation|repulsion)$"]],
            "rho: sum mu e^a m / sum mu, 1 at a KKT point": ["Multiline", [OWN + "rho$"]],
            "alpha": ["Multiline", [OWN + "alpha$"]],
        },
        "Margins and multipliers": {
            **{
                f"{prefix}{name}: median in {low} to {high} %": [
                    "Margin",
                    [f"{prefix}{key}/q50", f"{prefix}{key}/q{low:02d}", f"{prefix}{key}/q{high}"],
                ]
                for prefix in prefixes
                for name, key in (("scaled margins", "margins"), ("relative multipliers", "multipliers"))
                for low, high in ((5, 95), (25, 75))
            },
            "share of multipliers near zero": ["Multiline", [OWN + "multipliers/share_of_zeros$"]],
            "sum of multipliers / S, 1 at a KKT point": ["Multiline", [OWN + "multiplier_sum$"]],
            "least class's part of the multipliers": ["Multiline", [OWN + "class_mass$"]],
        },
        "Samples": {
            "diversity": ["Multiline", [OWN + "diversity$"]],
            "share that satisfies nothing": ["Multiline", [OWN + "unsupported$"]],
            "roughness and saturation": ["Multiline", [OWN + "(roughness|saturation)$"]],
        },
        "Signatures of failure": {"level, 1 fires": ["Multiline", ["^signature/"]]},
        "Gradients": {"norms": ["Multiline", [OWN + "gradient/"]]},
        "Speed": {
            "samples per second": ["Multiline", ["^samples_per_second$"]],
            "share of time": ["Multiline", ["^time/(?!slowest)"]],
            "slowest rank": ["Multiline", ["^time/slowest"]],
            "residual all-reduce": ["Multiline", ["^wire/(seconds|hidden)$"]],
            "peak memory, GiB": ["Multiline", ["^memory/"]],
        },
    }
