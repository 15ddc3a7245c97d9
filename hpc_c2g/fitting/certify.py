"""Certificates of a bundle for every form of the left side, from its training data: *uses real data*."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from hpc_c2g.classifiers.bundle import CERTIFICATE, load_bundle
from hpc_c2g.classifiers.rates import find_rates
from hpc_c2g.data.config import DataConfig
from hpc_c2g.data.load import load_split
from hpc_c2g.files import write_atomically
from hpc_c2g.fitting.certificate import Certificate, certify
from hpc_c2g.fitting.record import fitted_data
from hpc_c2g.kkt.options import LEFT_SIDES


def certify_bundle(folder: str, data: DataConfig | None = None) -> tuple[dict[str, float], list[Certificate]]:
    """Certify every form and write ``certificate.json`` into the bundle's folder.

    Args:
        folder: Folder of the bundle.
        data: Training data of the classifier; None takes those of its fit record.

    Returns:
        The rates, and a certificate per form; a single one if the rates are uniform, since all forms then agree.

    Raises:
        UserError: no bundle, no data, or data that do not fit the classifier.
    """
    bundle = load_bundle(folder)
    train = load_split(fitted_data(folder, data)).train
    rates = find_rates(bundle.model).parameters
    x = bundle.normalization.normalize(train.samples.double())
    forms = LEFT_SIDES if len(set(rates.values())) > 1 else LEFT_SIDES[:1]
    certificates = [certify(bundle, x, train.labels, rates, form) for form in forms]
    content = [{k: v for k, v in asdict(c).items() if k != "multipliers"} | {"shares": c.shares} for c in certificates]
    write_atomically(Path(folder) / CERTIFICATE, json.dumps(content, indent=2).encode())
    return rates, certificates
