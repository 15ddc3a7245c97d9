"""The cluster that all tests in this folder share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.slurm_cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The one in C2G_SLURM_DIR if that answers, else one of its own; SLURM_CONF and PATH lead to it."""
    if reason := why_not():
        pytest.skip(reason)
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("one cluster for all: no pytest-xdist (make test-slurm)")
    found = Cluster(Path(os.environ.get("C2G_SLURM_DIR", "/nonexistent")))
    ours = None if found.answers else Cluster.start(Path(tempfile.mkdtemp(prefix="c2g-slurm-", dir="/tmp")))
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (ours or found).environment.items():
                patch.setenv(name, value)
            yield ours or found
    finally:
        if ours:
            ours.stop()


@pytest.fixture(autouse=True)
def _as_found(cluster: Cluster) -> Iterator[None]:
    """Leave no job and no lost node to the next test."""
    yield
    cluster.cancel_all()
    cluster.resume_nodes()
    cluster.idle(60)
