"""Dataclass and configuration groups of every stage of a study. Imports no torch; `c2g train` does not import it (no access to data)."""

from __future__ import annotations

from hpc_c2g.bound.config import BoundConfig
from hpc_c2g.data.config import DataConfig
from hpc_c2g.evaluation.config import EvaluateConfig
from hpc_c2g.fitting.config import FITS, CertifyConfig, ClassifierConfig
from hpc_c2g.generators.config import GENERATORS
from hpc_c2g.training.config.train import TrainConfig

Groups = dict[str, dict[str, type]]
"""Per configuration group, the dataclass of each choice."""

DATA: Groups = {"data": {"data": DataConfig}}

SCHEMAS: dict[str, tuple[type, Groups]] = {
    "classifier": (ClassifierConfig, {**DATA, "fit": {**FITS}}),
    "certify": (CertifyConfig, DATA),
    "train": (TrainConfig, {"generator": {**GENERATORS}}),
    "evaluate": (EvaluateConfig, DATA),
    "bound": (BoundConfig, {}),
}
"""Per stage, the dataclass of its settings and its groups."""
