"""The frozen side of training: the classifier, its rates, and the loss of samples (design: docs/method.md)."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.classifiers.rates import find_rates, verify_rates
from hpc_c2g.errors import UserError
from hpc_c2g.kkt import alpha_control, loss_terms, options, stationarity
from hpc_c2g.kkt.backends import Autograd, ClosedForm, KKTBackend
from hpc_c2g.kkt.closed_form import Layer, MLPClosedForm, closed_form_layers
from hpc_c2g.kkt.coupled import CoupledSum, MicroBatch, PartialStats
from hpc_c2g.kkt.gates import GatedClassifier
from hpc_c2g.kkt.loss_terms import BATCH_STATISTICS, IMAGE, INPUT_MOMENTS, LossInputs, LossTerm
from hpc_c2g.kkt.normalization import (
    BatchStatistics,
    Moments,
    Reduction,
    couples,
    no_reduction,
    refuse_functional_batch_norm,
)
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.step.schedules import GATE_END

RATE_TOLERANCE = 1e-6
WEIGHTING = "scale_free"
"""Weights of the tensors' residuals; see ``residual_weights``."""


def verified_rates(bundle: Bundle) -> dict[str, float]:
    """Return lambda_k of the classifier, derived from its graph and checked on random inputs.

    Raises:
        UserError: It is not quasi-homogeneous, or its outputs do not match its graph.
    """
    rates = find_rates(bundle.model)
    error = verify_rates(bundle.model, rates, bundle.input_shape)
    if not error < RATE_TOLERANCE:
        raise UserError(
            f"the rates found for the classifier fail on random inputs (relative error {error:.1e})",
            "its forward does something that its graph does not show, such as an in-place change; rewrite it",
        )
    return rates.parameters


def weights_of(term: LossTerm, config: TrainConfig) -> list[float]:
    """Return the value of each of a term's weights."""
    return [operator.attrgetter(weight.setting)(config) for weight in term.weight]


def active_terms(config: TrainConfig, bundle: Bundle) -> list[LossTerm]:
    """Return the terms of ``LOSS_TERMS`` that apply to a classifier and have a weight."""
    there = {INPUT_MOMENTS}
    if len(bundle.input_shape) == 3:
        there.add(IMAGE)
    if couples(bundle.model, config.stationarity.statistics):
        there.add(BATCH_STATISTICS)
    return [
        term for term in loss_terms.LOSS_TERMS if term.needs <= there and (term.always or any(weights_of(term, config)))
    ]


def check_uncoupled(config: TrainConfig) -> None:
    """Refuse the weight of a term that needs batch statistics if no classifier of a run has them.

    Raises:
        UserError: Such a weight is set.
    """
    for term in loss_terms.LOSS_TERMS:
        for weight, value in zip(term.weight, weights_of(term, config), strict=True):
            if BATCH_STATISTICS in term.needs and value:
                raise UserError(
                    f"{weight.setting}={value} finds no batch statistics"
                    f" (stationarity.statistics={config.stationarity.statistics})",
                    f"give {weight.setting}=0, or a classifier with BatchNorm and stationarity.statistics=auto",
                )


def kkt_backend_name(bundle: Bundle, config: TrainConfig) -> str:
    """Return the KKT backend of a run, in words."""
    if config.kkt_backend == "autograd":
        return "autograd (as configured)"
    fast = _links(GatedClassifier(bundle.model), bundle, config) is not None
    return f"closed form, products in {config.matmul_precision}" if fast else "autograd"


def _links(phi: GatedClassifier, bundle: Bundle, config: TrainConfig) -> tuple[Layer, ...] | None:
    """Return the layers of the closed form; None if there is none or autograd is requested."""
    wanted = config.kkt_backend == "auto" and not couples(bundle.model, config.stationarity.statistics)
    links = closed_form_layers(phi) if wanted else None
    # a weight that the bundle has under another name, which forward does not use
    return links if links and all(n in bundle.parameters for k in links for n in (k.weight, k.bias) if n) else None


def _classifier_settings(config: TrainConfig) -> dict[str, object]:
    """Return the settings that the frozen classifier of an ``Objective`` depends on, by name."""
    return {
        "seed": config.seed,
        "kkt_backend": config.kkt_backend,
        "matmul_precision": config.matmul_precision,
        "stationarity.statistics": config.stationarity.statistics,
    }


@dataclass(frozen=True)
class Residual:
    """Global residual: L_stat per tensor, and the direction v that turns it into cotangents."""

    terms: dict[str, Tensor]
    direction: dict[str, Tensor]


class Objective:
    """Frozen side of training, without data, engine and processes.

    Args:
        bundle: Bundle of the classifier.
        config: Settings of the run.
        batch: Samples B_k in its KKT sum.
        device: Device of the KKT sums.
        dtype: Data type of the KKT sums, float32 or float64.

    Attributes:
        squares: Squared norms ||theta_k||^2.
        chain: Closed form; None if the classifier has none, or with ``kkt_backend: autograd``.
        coupled: True if the classifier depends on the statistics of the whole batch: its KKT sum takes ``BatchStatistics``.

    Raises:
        UserError: The classifier has no rates (not quasi-homogeneous), no margin on probes, a BatchNorm that cannot take its batch's, or no
            closed form although ``matmul_precision`` needs one.
    """

    def __init__(
        self, bundle: Bundle, config: TrainConfig, batch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.batch, self.fixed = config, batch, _classifier_settings(config)
        self.classes = len(bundle.classes)
        self.rates = verified_rates(bundle)
        self.left_side = stationarity.left_side(self.rates, options.AUTO)
        self.phi = GatedClassifier(bundle.model).to(device, dtype)
        refuse_functional_batch_norm(self.phi.graph.graph, config.stationarity.statistics)
        self.coupled = couples(bundle.model, config.stationarity.statistics)
        self.theta = {k: t.to(device, dtype) for k, t in bundle.parameters.items()}
        self.lower, self.upper = (bound.to(device, dtype) for bound in bundle.normalization.box())
        self.squares = stationarity.squared_norms({k: t.double() for k, t in bundle.parameters.items()})
        self.chain = self._chain(_links(self.phi, bundle, config))
        # the probes' own statistics: behind a BatchNorm the scale is then that of any batch
        own = BatchStatistics() if self.coupled else None
        self.gate_scales = self.phi.pre_activation_scales(self.theta, self._probes(1024), own)
        self.bundle, self.terms = bundle, active_terms(config, bundle)

    def _chain(self, links: tuple[Layer, ...] | None) -> MLPClosedForm | None:
        """Return the closed form, or raise if ``matmul_precision`` needs one and there is none."""
        if links is None and self.config.matmul_precision != "float32":
            raise UserError(
                f"matmul_precision={self.config.matmul_precision} needs the closed form, for a flatten(1) and a chain of"
                " nn.Linear and (leaky) ReLU",
                "give matmul_precision=float32"
                if self.config.kkt_backend == "auto"
                else "give kkt_backend=auto, or matmul_precision=float32",
            )
        return MLPClosedForm(links, self.theta, self.config.matmul_precision) if links else None

    def under(self, config: TrainConfig, batch: int) -> Objective:
        """Return the objective of the same classifier with another batch, and other weights and schedules of the terms.

        Raises:
            ValueError: A setting differs that the classifier's rates, gates or backend depend on.
        """
        changed = [name for name, value in _classifier_settings(config).items() if value != self.fixed[name]]
        if changed:
            raise ValueError(f"the objective was built with another {', '.join(changed)}: build a new one")
        other = copy.copy(self)
        other.config, other.batch, other.terms = config, batch, active_terms(config, self.bundle)
        return other

    def _probes(self, count: int) -> Tensor:
        """Return inputs ~ N(box center, (half range / 4)^2), ``[count, *S]``."""
        generator = torch.Generator().manual_seed(self.config.seed)
        noise = torch.randn(count, *self.lower.shape, generator=generator, dtype=torch.float64).to(self.lower)
        return (self.lower + self.upper) / 2 + (self.upper - self.lower) / 8 * noise

    def within_box(self, x: Tensor) -> Tensor:
        """Map samples from the box to 0..1, the range of raw images; without a graph."""
        return (x.detach() - self.lower) / (self.upper - self.lower)

    def widths(self, gamma: float) -> dict[str, float]:
        """Return the gate widths gamma s."""
        return {gate: gamma * s for gate, s in self.gate_scales.items()}

    def at_gates(self, gamma: float, statistics: BatchStatistics | None = None) -> stationarity.Classifier:
        """Return Phi(x; theta) with gates of width gamma s, under the statistics of the batch, or frozen ones."""
        widths = self.widths(gamma)

        def phi(theta: Mapping[str, Tensor], x: Tensor) -> Tensor:
            return self.phi(theta, widths, x, statistics)

        return phi

    def initial_alpha(self) -> float:
        """Return a0 on the high side, from probes of the classifier; with frozen statistics, as probes are no batch of its data."""
        widths = self.widths(GATE_END)

        def classify(x: Tensor) -> Tensor:
            return self.phi(self.theta, widths, x)

        seed = self.config.seed
        probe = alpha_control.probe_margin(classify, self.lower, self.upper, seed)
        ascended = alpha_control.ascended_margin(classify, self.lower, self.upper, self.classes, seed)
        return alpha_control.initial_alpha(probe, ascended, self.config.alpha.safety_factor)

    def multiplier_scale(self, alpha: float) -> float:
        """Return S = <Lambda theta(a), c theta(a)>."""
        return stationarity.multiplier_scale(self.squares, self.rates, self.left_side, alpha)

    def kkt_backend(
        self,
        gamma: float,
        micro_batches: Callable[[], Iterator[MicroBatch]] | None = None,
        reduce: Reduction = no_reduction,
    ) -> KKTBackend:
        """Return the backend that computes the KKT sums of one batch, with gates of width gamma s.

        Args:
            gamma: Relative gate width.
            micro_batches: Yields the micro-batches of a batch that batch statistics couple; None if it is held at once. Unused
                    if samples are not coupled.
            reduce: Sums batch statistics over ranks; with ``micro_batches`` this call is then collective.
        """
        if self.chain is not None:
            return ClosedForm(self.chain, self.widths(gamma))
        if not self.coupled:
            return Autograd(self.at_gates(gamma), self.theta)
        if micro_batches is None:
            statistics = BatchStatistics(reduce)
            return Autograd(self.at_gates(gamma, statistics), self.theta, statistics)
        widths = self.widths(gamma)

        def phi(theta: Mapping[str, Tensor], x: Tensor, given: PartialStats) -> Tensor:
            return self.phi(theta, widths, x, given)

        return CoupledSum(phi, self.theta, micro_batches, reduce)

    def weights(self, alpha: float, own_scale: float = 1.0) -> dict[str, float]:
        """Return L_stat's weight of each tensor's residual; ``own_scale`` as in ``residual_weights``."""
        return stationarity.residual_weights(self.squares, self.rates, self.left_side, alpha, WEIGHTING, own_scale)

    def residual(self, G: Mapping[str, Tensor], alpha: float, own_scale: float = 1.0) -> Residual:
        """Return L_stat's terms and direction for the *global* G; ``own_scale`` as in ``residual_weights``."""
        weights, weight = self.weights(alpha, own_scale), self.config.stationarity.weight
        return Residual(
            *stationarity.terms_and_direction(self.theta, G, weights, self.rates, self.left_side, alpha, weight)
        )

    def sample_losses(
        self,
        margins: Tensor,
        multipliers: Tensor,
        x: Tensor,
        labels: Tensor,
        alpha: float,
        layer_moments: Sequence[Moments] = (),
        input_moments: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the weighted losses of one micro-batch by the name of their term; arguments as the attributes of ``LossInputs``."""
        scale = self.multiplier_scale(alpha)
        box = (self.lower, self.upper)
        s = LossInputs(margins, multipliers, x, labels, alpha, scale, self.batch, *box, layer_moments, input_moments)
        return {term.name: term.function(s, *weights_of(term, self.config)) for term in self.terms}
