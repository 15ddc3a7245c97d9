"""Laws of a study's pictures: several processes draw what one does, and a process that is killed costs none."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from hpc_c2g.reporting import pictures as drawing
from hpc_c2g.reporting.averages import Average
from hpc_c2g.reporting.pictures import FigureSource, pictures


@pytest.mark.parametrize("killed", [False, True])
def test_several_processes_draw_what_one_does(monkeypatch, killed):
    steps, mean = np.arange(1, 4), np.array([3.0, 2.0, 1.0])
    averages = {f"n={k}": {"rho": Average(steps, mean + k, mean, mean + 2 * k, steps)} for k in range(18)}
    source = FigureSource([], [], averages, None)
    alone = [(one.name, one.alt, one.png) for one in source.figures()]
    assert len(alone) == 3
    monkeypatch.setattr(drawing, "FEW", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    used = []

    class Pool(drawing.ProcessPoolExecutor):
        def map(self, *args, **fields):
            found = super().map(*args, **fields)
            used.extend(self._processes.values())
            for process in list(self._processes.values()) if killed else []:
                os.kill(process.pid, signal.SIGKILL)
            return found

    monkeypatch.setattr(drawing, "ProcessPoolExecutor", Pool)
    assert [(one.title, one.alt, one.png) for one in pictures(source)] == alone
    assert len(used) == 1
