"""Laws of a step's times: every second is charged once, shares are of all ranks, and the rank that works longest is named."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from hpc_c2g.distributed.world import World
from hpc_c2g.training.step.phases import PHASES, Phases, shares

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def pass_(seconds: float) -> None:
        now[0] += seconds

    return pass_


def test_time_is_charged_to_the_phase_that_was_entered_last(clock):
    phases = Phases(CPU)
    clock(50)  # before the first phase
    for phase, seconds in (("kkt_sum", 3.0), ("all_reduce", 0.5), ("kkt_sum", 1.0), ("checkpoint", 2.0)):
        phases.enter(phase)
        clock(seconds)
    phases.stop()
    clock(9.0)  # between two steps
    phases.enter("log")
    clock(7.0)  # not over yet
    assert phases.take() == dict.fromkeys(PHASES, 0.0) | {"kkt_sum": 4.0, "all_reduce": 0.5, "checkpoint": 2.0}
    phases.stop()
    assert phases.take() == dict.fromkeys(PHASES, 0.0) | {"log": 7.0}
    phases.stop()
    assert phases.take() == dict.fromkeys(PHASES, 0.0)


def of_ranks(*seconds: dict[str, float]) -> dict[str, float]:
    """What rank 0 tells where every rank's phases took ``seconds``."""
    rows = torch.tensor([[s.get(phase, 0.0) for phase in PHASES] for s in seconds], dtype=torch.float64)
    world = World.single_process(CPU)
    several = dataclasses.replace(world, launch=dataclasses.replace(world.launch, world_size=len(seconds)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "gather", lambda self, own: rows)
        return shares({phase: float(v) for phase, v in zip(PHASES, rows[0], strict=True)}, several)


def test_shares_are_of_the_time_of_all_ranks_and_sum_to_one():
    told = of_ranks({"kkt_sum": 3.0, "all_reduce": 1.0}, {"kkt_sum": 1.0, "all_reduce": 3.0})
    assert told["time/kkt_sum"] == told["time/all_reduce"] == 0.5
    assert sum(told[f"time/{phase}"] for phase in PHASES) == pytest.approx(1)


def test_the_slowest_rank_is_the_one_that_works_longest_not_the_one_that_waits():
    told = of_ranks({"kkt_sum": 1.0, "all_reduce": 3.0}, {"cotangents": 2.0, "optimizer": 1.0, "all_reduce": 1.0})
    assert told["time/slowest_rank"] == 1
    assert told["time/slowest_over_mean"] == pytest.approx(1.5)


def test_a_rank_alone_is_not_the_slowest():
    told = shares(dict.fromkeys(PHASES, 0.0), World.single_process(CPU))
    assert not [name for name in told if "slowest" in name]
    assert all(value == 0 for value in told.values())
