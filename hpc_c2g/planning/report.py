"""Tables of a plan, and its formulas with numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from hpc_c2g.planning.collectives import algorithm
from hpc_c2g.planning.plan import Plan
from hpc_c2g.planning.predict import ScalingRow
from hpc_c2g.units import GIB

UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def seconds(value: float) -> str:
    """Format seconds with three digits and a unit."""
    scale, unit = next(((s, u) for s, u in UNITS if value >= s), UNITS[-1])
    return f"{value / scale:.3g} {unit}"


def gib(nbytes: float) -> str:
    """Format bytes as GiB with three decimals, without the unit."""
    return f"{nbytes / GIB:.3f}"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def memory_table(plan: Plan) -> Table:
    """Memory of a rank by purpose."""
    m = plan.memory
    table = _table(
        f"memory per rank: micro_batch={plan.micro_batch} of share {plan.share}, ZeRO stage {plan.zero_stage}",
        ("part", "GiB"),
    )
    for name, value in {
        "runtime (libraries, context)": m.runtime,
        "classifier theta and graph": m.classifier,
        "generator weights": m.weights,
        "generator gradients": m.gradients,
        "Adam moments, masters": m.moments,
        "working: G, residual, direction, buckets, micro-batch": m.working,
    }.items():
        table.add_row(name, gib(value))
    table.add_row("total", gib(m.total), style="bold")
    table.add_row("available (margin taken off)", gib(plan.available))
    return table


def step_table(plan: Plan) -> Table:
    """Time of a step by phase."""
    t = plan.step
    ranks = plan.nodes * plan.hardware.ranks_per_node
    table = _table(f"one step on {plan.nodes} node(s), {ranks} rank(s)", ("part", "time", "share"))
    for name, value in {
        "pass 1: KKT sum": t.first,
        "pass 2: cotangents, generator backward" if t.first else "one pass: KKT sum, cotangents, generator": t.second,
        "kept from pass 1 to pass 2": -t.saved,
        "residual, direction, buffers": t.residual,
        "Adam, gradient buffers": t.update,
        "all-reduce of G and scalars": t.residual_sum,
        "generator's gradient": t.generator_sum,
        "hidden behind the backward": -t.hidden,
    }.items():
        if value:
            table.add_row(name, f"{'-' * (value < 0)}{seconds(abs(value))}", f"{value / t.total:.1%}")
    table.add_row("step", seconds(t.total), f"communication {t.exposed / t.total:.1%}", style="bold")
    return table


def scaling_table(plan: Plan, kind: str) -> Table:
    """Strong or weak scaling over numbers of nodes; ``kind`` is ``strong`` or ``weak``."""
    rows: list[ScalingRow] = getattr(plan, kind)
    title = {
        "strong": "strong scaling: the same batch on more nodes",
        "weak": "weak scaling: the batch grows with the nodes, and the statistical error of its G falls as 1/sqrt(B)",
    }[kind]
    columns = ["nodes", "ranks", "global batch", "micro", "step", "samples/s", "communication", "efficiency"]
    table = _table(title, [*columns, "error of G"] if kind == "weak" else columns)
    for row in rows:
        t = row.step
        cells = [
            str(row.nodes),
            str(row.ranks),
            str(row.global_batch),
            str(row.micro_batch),
            seconds(t.total),
            f"{row.global_batch / t.total:.3g}",
            f"{t.exposed / t.total:.1%}",
            f"{row.efficiency:.1%}",
        ]
        table.add_row(*cells, *([f"x {row.error:.3f}"] if kind == "weak" else []))
    return table


def formulas(plan: Plan) -> str:
    """Formulas of the prediction with this plan's numbers."""
    p, c, t, n = plan.hardware, plan.cost, plan.step, plan.nodes
    m = plan.share / c.samples
    ranks, Q, G = n * p.ranks_per_node, c.generator_parameters, max(c.sums)
    passes = c.second if c.one_pass else c.first + c.second
    w = {"float32": 4, "bfloat16": 2}[plan.dtype]
    lines = [
        f"P = {c.classifier_parameters} classifier parameters, Q = {Q} generator parameters, n = {n} x {p.ranks_per_node}"
        f" = {ranks} ranks, m = {plan.share}/{c.samples} = {m:g} micro-batches, {'one pass' if c.one_pass else 'two passes'}",
        f"micro-batch: {passes.flops / 1e9:.4g} GFLOP of products, {passes.moved_bytes / 1e6:.4g} MB moved by the other"
        f" operators, {passes.calls:.0f} operator calls",
        "work: "
        + ("max(device, host)" if p.asynchronous else "device + host")
        + f", device = max(F / {p.matrix_tflops:.4g} TFLOP/s, b_F / W) + b / W, W = {p.memory_gb_per_s:.4g} GB/s,"
        f" host = calls x {p.operation_us:.3g} us" + (f", all / {p.share:g} (cores per rank)" if p.share < 1 else ""),
        f"step = m (first + second) - kept + residual + update + exposed sums = {seconds(t.first + t.second)} -"
        f" {seconds(t.saved)} + {seconds(t.residual)} + {seconds(t.update)} + {seconds(t.exposed)} = {seconds(t.total)}",
    ]
    if ranks > 1:
        lines.append(
            f"all-reduce of b bytes: ring 2 (g-1)/g b/B + 2 (g-1) l within a node (g = {p.ranks_per_node}, B ="
            f" {p.intra_gb_per_s:.4g} GB/s, l = {p.intra_us:.3g} us), between N nodes min(ring, tree 2 b/B + 2 ceil(log2 N) l)"
            f" (B = {p.inter_gb_per_s:.4g} GB/s, l = {p.inter_us:.3g} us)"
        )
        between = f", {algorithm(G, n, p)} between nodes" if n > 1 else ""
        lines.append(
            f"G: b = 4 P and scalars = {G} B{between}: {seconds(t.residual_sum)}; generator: b = {w} Q ="
            f" {w * Q} B: {seconds(t.generator_sum)} (ZeRO stage {plan.zero_stage})"
        )
    B = plan.share * ranks
    lines.append(
        f"statistics: L_stat sees the batch mean; the relative error of its G falls as 1/sqrt(B) (B = {B}: twice the batch,"
        f" {1 / math.sqrt(2):.2f} of the error). Splitting a batch further costs no accuracy, a smaller batch does"
    )
    return "\n".join(lines)
