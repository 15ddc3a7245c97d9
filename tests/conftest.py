"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpc_c2g.classifiers.bundle import Bundle, build_model, save_bundle
from hpc_c2g.classifiers.normalization import Normalization

pytest.register_assert_rewrite("helpers")

LONGEST_FILES = (
    *("test_cli.py", "test_doctor.py", "test_study_here.py", "test_zero.py", "test_collect.py", "test_ranks.py"),
    *("test_classifiers_together.py", "test_plan.py", "test_oracle.py", "test_mesh.py", "test_coupled.py"),
    *("test_checkpoint_faults.py", "test_training.py", "test_sampling_error.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest files first: one worker runs a whole file, and the others should not wait for it at the end."""
    place = {name: i for i, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture
def bundle() -> Bundle:
    """A tiny MLP in float64 with weights large enough that probes find a margin; its box is [-0.4, 0.6]."""
    architecture = {"target": "mlp", "input_shape": [1, 4, 4], "classes": 3, "width": 12, "bias": "first"}
    model = build_model(architecture).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return Bundle(model, architecture, ["a", "b", "c"], (1, 4, 4), Normalization.constant((1, 4, 4), mean=0.4))


@pytest.fixture
def bundle_dir(bundle: Bundle, tmp_path: Path) -> Path:
    """The folder of ``bundle``, saved."""
    folder = tmp_path / "classifier"
    save_bundle(bundle, folder)
    return folder
