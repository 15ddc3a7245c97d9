"""Description of a run's curves: the TensorBoard chart of each one, and its use in a study's figures."""

from __future__ import annotations

from dataclasses import dataclass

MEMBER = r"((classifier|solution)\d+/)*"
"""Pattern of the prefix of a classifier's or a solution's curves; empty if there is only one."""
CONDITIONS, MULTIPLIERS = "Conditions", "Margins and multipliers"
SIGNATURES, GRADIENTS, SPEED = "Signatures of failure", "Gradients", "Speed"
"""Categories of the layout."""
LOSSES = "losses"
"""Chart of the loss and of its weighted terms."""


@dataclass(frozen=True)
class Curve:
    """A scalar of a run over its steps, or all scalars whose names match a pattern.

    Attributes:
        name: Regular expression of the whole name, without the prefix of a member.
        category: Category of the layout.
        chart: Title of the chart within the category; curves of one title share a chart.
        members: True if each classifier or solution of several has a curve of its own, under its prefix.
        quantiles: True if the scalar is five, ``NAME/q05`` to ``NAME/q95``, which are drawn as bands around their median.
        averaged: True if a study charts the mean over seeds; then ``name`` is a plain name.
        note: Note at the study's learning curves; empty if they are not drawn as a figure.
        logarithmic: True if that figure may have a logarithmic axis.
    """

    name: str
    category: str
    chart: str
    members: bool = True
    quantiles: bool = False
    averaged: bool = False
    note: str = ""
    logarithmic: bool = False

    @property
    def pattern(self) -> str:
        """Regular expression of every name that the curve has in a run, without the quantiles' endings."""
        return rf"^{MEMBER if self.members else ''}({self.name})$"

    @property
    def scalar(self) -> str:
        """Name of the scalar that a study averages: the median of quantiles."""
        return f"{self.name}/q50" if self.quantiles else self.name
