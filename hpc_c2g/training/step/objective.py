"""What the generator is trained against: the frozen classifier, its rates, and the loss of samples (design: docs/method.md)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.classifiers.rates import find_rates, verify_rates
from hpc_c2g.errors import UserError
from hpc_c2g.kkt import alpha_control, directional, duality, priors, stationarity
from hpc_c2g.kkt.closed_form import Layer, MLPClosedForm, closed_form_layers
from hpc_c2g.kkt.coupled import CoupledSum, MicroBatch, PartialStats
from hpc_c2g.kkt.gates import GatedClassifier
from hpc_c2g.kkt.normalization import BatchStatistics, Reduction, couples, refuse_functional_batch_norm
from hpc_c2g.training.config.train import TrainConfig

RATE_TOLERANCE = 1e-6


def verified_rates(bundle: Bundle) -> dict[str, float]:
    """lambda_k of the classifier, read off its graph and checked on random inputs.

    Raises:
        UserError: it is not quasi-homogeneous, or it does not compute what its graph says.
    """
    rates = find_rates(bundle.model)
    error = verify_rates(bundle.model, rates, bundle.input_shape)
    if not error < RATE_TOLERANCE:
        raise UserError(
            f"the rates found for the classifier fail on random inputs (relative error {error:.1e})",
            "its forward does something that its graph does not show, such as an in-place change; rewrite it",
        )
    return rates.parameters


def loss_terms(config: TrainConfig, is_image: bool) -> list[str]:
    """Names of what ``Objective.sample_losses`` returns, in its order."""
    optional = {
        "slackness": config.duality.slackness,
        "total_variation": config.prior.total_variation and is_image,
        "statistics": config.prior.statistics,
        "standard": config.prior.mean + config.prior.deviation,
        "repulsion": config.prior.repulsion,
    }
    return ["feasibility", "box", *(name for name, there in optional.items() if there)]


def kkt_backend_name(bundle: Bundle, config: TrainConfig) -> str:
    """How a run computes them, in words."""
    if config.kkt_backend == "autograd":
        return "autograd (as asked for)"
    fast = _links(GatedClassifier(bundle.model), bundle, config) is not None
    return f"closed form, products in {config.matmul_precision}" if fast else "autograd"


def _links(phi: GatedClassifier, bundle: Bundle, config: TrainConfig) -> tuple[Layer, ...] | None:
    """Of the closed form, where there is one and it is wanted."""
    wanted = config.kkt_backend == "auto" and not couples(bundle.model, config.stationarity.statistics)
    links = closed_form_layers(phi) if wanted else None
    # a weight that the bundle knows by another name, which forward does not use
    return links if links and all(n in bundle.parameters for k in links for n in (k.weight, k.bias) if n) else None


@dataclass(frozen=True)
class Residual:
    """The global residual: L_stat per tensor, and the direction v that turns it into cotangents."""

    terms: dict[str, Tensor]
    direction: dict[str, Tensor]


class Objective:
    """The frozen side of training. Knows no data, no engine and no process.

    Args:
        bundle: the classifier.
        config: of the run.
        batch: B_k, samples in its KKT sum.
        device: where the KKT sums are computed.
        dtype: of the KKT sums, float32 or float64.

    Attributes:
        squares: ||theta_k||^2.
        chain: the closed form; None where the classifier has none, or with ``kkt_backend: autograd``.
        coupled: the statistics of the whole batch are part of the classifier's function: its KKT sum takes ``BatchStatistics``.

    Raises:
        UserError: the classifier has no rates (not quasi-homogeneous), no margin on probes, a BatchNorm that cannot take its batch's, or no
            fast path where ``precision`` needs one.
    """

    def __init__(
        self, bundle: Bundle, config: TrainConfig, batch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.batch = config, batch
        self.classes = len(bundle.classes)
        self.rates = verified_rates(bundle)
        self.left_side = stationarity.left_side(self.rates, config.stationarity.left_side)
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
        self.is_image = len(bundle.input_shape) == 3

    def _chain(self, links: tuple[Layer, ...] | None) -> MLPClosedForm | None:
        """The closed form, or the refusal of a precision that needs it."""
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
        """The same classifier under other settings (batch, weights of the terms)."""
        other = copy.copy(self)
        other.config, other.batch = config, batch
        return other

    def _probes(self, count: int) -> Tensor:
        """Inputs ~ N(box center, (half range / 4)^2), ``[count, *S]``."""
        generator = torch.Generator().manual_seed(self.config.seed)
        noise = torch.randn(count, *self.lower.shape, generator=generator, dtype=torch.float64).to(self.lower)
        return (self.lower + self.upper) / 2 + (self.upper - self.lower) / 8 * noise

    def within_box(self, x: Tensor) -> Tensor:
        """Samples in 0..1 from the box's lower to its upper end, which is raw images' own range; without a graph."""
        return (x.detach() - self.lower) / (self.upper - self.lower)

    def widths(self, gamma: float) -> dict[str, float]:
        """Gate widths gamma s."""
        return {gate: gamma * s for gate, s in self.gate_scales.items()}

    def at_gates(self, gamma: float, statistics: BatchStatistics | None = None) -> stationarity.Classifier:
        """Phi(x; theta) with gates of width gamma s; with the statistics of the batch, or frozen ones."""
        widths = self.widths(gamma)

        def phi(theta: Mapping[str, Tensor], x: Tensor) -> Tensor:
            return self.phi(theta, widths, x, statistics)

        return phi

    def initial_alpha(self) -> float:
        """a0 on the high side, from probes of the classifier; under frozen statistics, as probes are no batch of its data."""
        widths = self.widths(self.config.gates.end)

        def classify(x: Tensor) -> Tensor:
            return self.phi(self.theta, widths, x)

        seed = self.config.seed
        probe = alpha_control.probe_margin(classify, self.lower, self.upper, seed)
        ascended = alpha_control.ascended_margin(classify, self.lower, self.upper, self.classes, seed)
        return alpha_control.initial_alpha(probe, ascended, self.config.alpha.safety_factor)

    def multiplier_scale(self, alpha: float) -> float:
        """S = <Lambda theta(a), c theta(a)>."""
        return stationarity.multiplier_scale(self.squares, self.rates, self.left_side, alpha)

    def kkt_sum(
        self,
        gamma: float,
        x: Tensor,
        labels: Tensor,
        multipliers: Tensor,
        keep_graph: bool,
        on_ready: Callable[[str, Tensor], None] | None = None,
        statistics: BatchStatistics | CoupledSum | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Margins and G of one micro-batch; see ``stationarity.kkt_sum``, and ``CoupledSum`` for one of several that are coupled."""
        if isinstance(statistics, CoupledSum):
            return statistics.kkt_sum(x, labels, multipliers)
        if self.chain is not None:
            return self.chain.kkt_sum(self.widths(gamma), x, labels, multipliers, keep_graph, on_ready)
        phi = self.at_gates(gamma, statistics)
        return stationarity.kkt_sum(phi, self.theta, x, labels, multipliers, keep_graph, on_ready)

    def coupled_sum(
        self, gamma: float, micro_batches: Callable[[], Iterator[MicroBatch]], reduce: Reduction
    ) -> CoupledSum:
        """The KKT sum over micro-batches that batch statistics couple; collective."""
        widths = self.widths(gamma)

        def phi(theta: Mapping[str, Tensor], x: Tensor, given: PartialStats) -> Tensor:
            return self.phi(theta, widths, x, given)

        return CoupledSum(phi, self.theta, micro_batches, reduce)

    def directional_sum(
        self,
        gamma: float,
        residual: Residual,
        x: Tensor,
        labels: Tensor,
        multipliers: Tensor,
        statistics: CoupledSum | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Margins and <v, G> of one micro-batch; see ``directional.directional_sum``, and ``CoupledSum`` for a coupled one."""
        if statistics is not None:
            return statistics.directional_sum(x, labels, multipliers)
        if self.chain is not None:
            return self.chain.directional_sum(self.widths(gamma), residual.direction, x, labels, multipliers)
        return directional.directional_sum(self.at_gates(gamma), self.theta, residual.direction, x, labels, multipliers)

    def weights(self, alpha: float, own_scale: float = 1.0) -> dict[str, float]:
        """L_stat's weight of each tensor's residual, by the run's ``stationarity.weighting``."""
        weighting = self.config.stationarity.weighting
        return stationarity.residual_weights(self.squares, self.rates, self.left_side, alpha, weighting, own_scale)

    def residual(self, G: Mapping[str, Tensor], alpha: float, own_scale: float = 1.0) -> Residual:
        """L_stat's terms and direction from the *global* G; ``own_scale`` as ``residual_weights`` takes it."""
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
        reference: tuple[Tensor, Tensor] | None,
        statistics: BatchStatistics | CoupledSum | None = None,
        moments: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Weighted terms that are plain sums over samples: duality and priors, divided by the batch.

        Args:
            margins: ``[b, C]``.
            multipliers: ``[b, C]``.
            x: ``[b, *S]``.
            labels: ``[b]``.
            alpha: the scale.
            reference: samples and labels that repel, None without repulsion.
            statistics: of the KKT sum that gave the margins, None where they are frozen.
            moments: E x and E x^2 over the whole batch ``[2, *S]``, None where no prior asks for them.
        """
        config, batch = self.config, self.batch
        terms = {  # in the order of ``loss_terms``
            "feasibility": config.duality.feasibility * duality.feasibility(margins, labels, alpha, batch),
            "box": config.prior.box * priors.box_excess(x, self.lower, self.upper, batch),
        }
        if config.duality.slackness:
            S = self.multiplier_scale(alpha)
            terms["slackness"] = config.duality.slackness * duality.slackness(margins, multipliers, alpha, S)
        if config.prior.total_variation and self.is_image:
            terms["total_variation"] = config.prior.total_variation * priors.total_variation(x, batch)
        if config.prior.statistics and statistics is not None:  # known to every rank, each counts its part
            distance = priors.statistics_distance(statistics.moments)
            terms["statistics"] = config.prior.statistics * distance * (len(x) / batch)
        if moments is not None:
            own = torch.stack([x.sum(0), x.square().sum(0)]) / batch
            distance_of = functools.partial(
                priors.standard_distance, mean_weight=config.prior.mean, deviation_weight=config.prior.deviation
            )
            terms["standard"] = priors.share_of(distance_of, moments, own, len(x) / batch)
        if reference is not None:
            terms["repulsion"] = config.prior.repulsion * priors.repulsion(
                x, labels, *reference, config.prior.repulsion_width, batch
            )
        return terms
