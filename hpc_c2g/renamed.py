"""Settings of earlier versions: what they are called now, or why they are gone."""

from __future__ import annotations

from hpc_c2g.errors import UserError

RENAMED = {
    "optimiser": "optimizer",
    "optimizer.rate": "optimizer.lr",
    "optimizer.code_rate": "optimizer.lr_codes",
    "optimizer.multiplier_rate": "optimizer.lr_multipliers",
    "optimizer.canvas_rate": "optimizer.lr_canvases",
    "optimizer.gradient_clipping": "optimizer.max_grad_norm",
    "scale": "alpha",
    "alpha.start": "alpha.init",
    "alpha.caution": "alpha.safety_factor",
    "alpha.rate": "alpha.max_change",
    "fast": "kkt_backend",
    "precision": "matmul_precision",
    "virtual_shards": "deterministic_shards",
    "distributed.wire": "distributed.comm_dtype",
    "fit.optimiser": "fit.optimizer",
    "fit.rate": "fit.lr",
    "normalisation": "normalization",
    "cluster": "hardware",
    "profile": "hardware_file",
    "save_profile": "save_hardware",
}
"""New names by old ones. A group's new name holds for each of its fields, whose own new name is listed under the group's."""

VALUES = {
    ("kkt_backend", "off"): "autograd",
    ("alarms.policy", "go_on"): "continue",
    ("alarms.policy", "lower_rate"): "lower_lr",
}
"""New values by setting and old value."""

CONSTANT = "nobody needed another value"
REMOVED = {
    "accept_code": "the version of each stage's results decides now whether a study may resume",
    "alarms.factor": "the policy lower_lr halves the learning rates",
    **dict.fromkeys(("alpha.target", "alpha.gain", "optimizer.betas", "optimizer.final_fraction"), CONSTANT),
    **dict.fromkeys(("optimizer.warmup_fraction", "distributed.bucket_mib", "generator.gain", "gates"), CONSTANT),
    **dict.fromkeys(("stationarity.left_side", "stationarity.weighting", "stationarity.anneal_fraction"), CONSTANT),
    **dict.fromkeys(("generator.embedding", "generator.multiplier_widths", "generator.output_scale"), CONSTANT),
    **dict.fromkeys(("latents", "prior.box"), CONSTANT),
    **dict.fromkeys(("prior.repulsion", "prior.repulsion_width", "prior.repulsion_references"), "it never helped"),
}
"""Reasons by name; a group's reason holds for each of its fields."""


def refuse_old_name(key: str, value: str = "VALUE") -> None:
    """Raise the error for a setting of an earlier version.

    Args:
        key: Dotted name that no setting has.
        value: The value it was given.

    Raises:
        UserError: the setting is known by another name, or was removed.
    """
    group, dot, field = key.partition(".")
    moved = f"{RENAMED.get(group, group)}.{field}" if dot else key
    for name in (key, moved, moved.partition(".")[0]):
        if name in REMOVED:
            raise UserError(f"{key} was removed: {REMOVED[name]}", f"drop {key}")
    new = RENAMED.get(moved, moved)
    if new != key:
        raise UserError(f"{key} is now called {new}", f"write {new}={VALUES.get((new, value), value)}")


def refuse_old_value(key: str, value: str) -> None:
    """Raise the error for a value of an earlier version.

    Raises:
        UserError: the value has another name.
    """
    new = VALUES.get((key, value))
    if new is not None:
        raise UserError(f"{key}={value} is now called {new}", f"write {key}={new}")
