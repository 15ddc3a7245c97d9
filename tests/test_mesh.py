"""Laws of many ranks and many classifiers, in float64: every sum is the one-process sum, whatever the mesh, the micro-batch, the wire."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.trainers import config, three_bundles, trainer
from torch import Tensor

from hpc_c2g.distributed.comm_stream import CommStream
from hpc_c2g.distributed.mesh import Mesh
from hpc_c2g.distributed.reduction import ResidualSum
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import UserError
from hpc_c2g.training.config.train import DistributedConfig, TrainConfig
from hpc_c2g.training.step import step_parts

STEPS, BATCH = 3, 24
# classifiers, ranks, micro-batch, distributed settings
CASES = {
    "1 on 2": (1, 2, None, {}),
    "1 on 2, micro-batches": (1, 2, 5, {"bucket_bytes": 105}),
    "2 on 2, a rank each": (2, 2, 4, {}),
    "2 on 2, both on each": (2, 2, None, {"groups": 1}),
    "3 on 2": (3, 2, 2, {}),
    "1 on 4": (1, 4, 2, {"bucket_bytes": 105}),
    "1 on 4, nodes first": (1, 4, None, {"hierarchical": True}),
    "2 on 4, two each": (2, 4, None, {"bucket_bytes": 105}),
    "3 on 4": (3, 4, 1, {"hierarchical": True, "bucket_bytes": 105}),
}


def measured(world: World | None, classifiers: int, micro_batch: int | None, settings: dict) -> dict:
    """What a few steps give: everything that the issue of exactness is about, per classifier that this rank works on."""
    torch.set_num_threads(1)
    bundles = three_bundles()[:classifiers]
    # free images: the generator's gradients are the cotangents themselves
    settings = dict(settings)
    bucket_bytes = settings.pop("bucket_bytes", step_parts.BUCKET_BYTES)
    run = config(micro_batch, "free", global_batch=BATCH, distributed=DistributedConfig(**settings))
    with mock.patch.object(step_parts, "BUCKET_BYTES", bucket_bytes):
        step = trainer(bundles, run, world)
    told = []
    for number in range(1, STEPS + 1):
        alphas = step.alpha
        told.append({k: v for k, v in step(number).scalars.items() if not k.startswith("wire/")})
    found = {"scalars": told, "cotangents": step.engine.gradients, "alpha": step.alpha, "G": {}, "terms": {}}
    for share in step.shares:
        k, objective = share.member, share.objective
        found["G"][k] = G = {name: t.clone() for name, t in share.G.total().items()}
        found["terms"][k] = objective.residual(G, alphas[k]).terms
    return found


def all_measured(world: World, cases: list[tuple]) -> list[dict]:
    return [measured(world, *case) for case in cases]


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """Per case, what each rank measured."""
    found: dict[str, list[dict]] = {}
    for ranks in (2, 4):
        chosen = {name: case for name, case in CASES.items() if case[1] == ranks}
        cases = [(k, micro, settings) for k, _, micro, settings in chosen.values()]
        answers = run_ranks(ranks, tmp_path_factory.mktemp("meeting"), all_measured, cases, nodes=ranks // 2)
        assert [kind for kind, _ in answers] == ["value"] * ranks, answers
        for i, name in enumerate(chosen):
            found[name] = [answer[i] for _, answer in answers]
    return found


def near(got: Tensor, expected: Tensor) -> bool:
    return float((got - expected).norm()) <= 1e-10 * float(expected.norm())


def test_sums_residual_and_cotangents_are_those_of_one_process(subtests: pytest.Subtests, on_ranks: dict) -> None:
    for name in CASES:
        with subtests.test(name):
            classifiers = CASES[name][0]
            alone = measured(None, classifiers, None, {})
            seen = set()
            for rank in on_ranks[name]:
                for got, expected in zip(rank["scalars"], alone["scalars"], strict=True):
                    assert got == pytest.approx(expected, rel=1e-10, abs=1e-14)
                assert rank["alpha"] == pytest.approx(alone["alpha"], rel=1e-12)
                assert all(near(g, e) for g, e in zip(rank["cotangents"], alone["cotangents"], strict=True))
                for k, G in rank["G"].items():
                    seen.add(k)
                    assert all(near(G[tensor], expected) for tensor, expected in alone["G"][k].items())
                    for tensor, expected in alone["terms"][k].items():
                        assert float(rank["terms"][k][tensor]) == pytest.approx(float(expected), rel=1e-10)
            assert seen == set(range(classifiers))


def refused(world: World) -> list[str]:
    said = []
    for classifiers, settings, changes in (
        (3, {"groups": 2}, {}),
        (1, {"groups": 2}, {}),
        (2, {}, {"global_batch": 3}),
        (1, {}, {"global_batch": 1}),
        (2, {}, {"shares": [1.0]}),
        (2, {}, {"shares": [1.0, 100.0]}),
        (2, {}, {"shares": [23.0, 1.0], "global_batch": 24, "micro_batch": 4}),
    ):
        run = replace(config(None, "codes", distributed=DistributedConfig(**settings)), **changes)
        try:
            trainer(three_bundles()[:classifiers], run, world)
            said.append("nothing")
        except UserError as error:
            said.append(str(error))
    return said


def test_what_the_mesh_or_the_ranks_cannot_hold_is_refused(tmp_path: Path) -> None:
    for kind, said in run_ranks(2, tmp_path, refused):
        assert kind == "value", said
        assert "distributed.groups=2 does not divide the 3 classifiers x solutions" in said[0]
        assert "distributed.groups=2 does not divide the 1 classifiers x solutions" in said[1]
        assert said[2] == "nothing"  # two samples and one, on a rank each
        assert "global_batch gives classifier 0 1 samples for 2 micro-batches (2 ranks x 1)" in said[3]
        assert "shares=[1.0] names 1 shares for 2 classifiers" in said[4]
        assert "gives classifier 0 no sample" in said[5]
        assert "gives classifier 1 1 samples for 6 micro-batches" in said[6]  # on rank 0 too, which has the other


SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 2, 2), "unused": (3,)}


def reduced(world: World) -> dict:
    """Sums of made-up tensors over two micro-batches and the ranks, by every wire, some of them arriving during a backward."""
    found: dict = {}
    for name, hierarchical, comm_dtype, dtype in (
        ("plain", False, "float32", torch.float32),
        ("nodes", True, "float32", torch.float32),
        ("low", False, "float32", torch.bfloat16),
        ("short", False, "bfloat16", torch.float32),
        ("short nodes", True, "bfloat16", torch.float32),
    ):
        like = {key: torch.zeros(shape, dtype=dtype) for key, shape in SHAPES.items()}
        mesh = Mesh.over(world, 1, None, hierarchical)
        comm_stream = CommStream(world.device)
        summation = ResidualSum(like, mesh, comm_stream, comm_dtype, bucket_bytes=50)
        totals, sent = [], []
        for _ in range(64 if comm_dtype == "bfloat16" else 3):  # what is rounded away comes back in time
            for micro_batch in (0, 1):
                arrive = summation.micro_batch(last=micro_batch == 1)
                tensors = {key: made(key, world.rank, micro_batch).to(dtype) for key in SHAPES}
                for key in ("c", "a"):
                    arrive(key, tensors[key])
                summation.add(tensors)
            totals.append({key: t.clone() for key, t in summation.total().items()})
            sent.append(summation.take_bytes())
        found[name] = {
            "totals": totals,
            "bytes": set(sent),
            "time": comm_stream.seconds(),
        }
    return found


def made(key: str, rank: int, micro_batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + 10 * micro_batch + len(key) + ord(key[0]))
    return torch.randn(SHAPES[key], generator=generator)


def test_every_wire_sums_and_counts_its_bytes(tmp_path: Path) -> None:
    answers = run_ranks(4, tmp_path, reduced, nodes=2)
    assert [kind for kind, _ in answers] == ["value"] * 4, answers
    expected = {key: sum(made(key, r, m) for r in range(4) for m in (0, 1)) for key in SHAPES}
    numbers = sum(t.numel() for t in expected.values())
    for _, found in answers:
        for name in ("plain", "nodes"):
            for total in found[name]["totals"]:
                assert all(torch.allclose(total[key], expected[key], rtol=1e-5, atol=1e-5) for key in SHAPES)
        # inputs in bfloat16, sums in float32: as good as the rounded inputs
        rounded = {key: sum(made(key, r, m).bfloat16().float() for r in range(4) for m in (0, 1)) for key in SHAPES}
        for total in found["low"]["totals"]:
            assert all(t.dtype == torch.float32 for t in total.values())
            assert all(torch.allclose(total[key], rounded[key], rtol=1e-6, atol=1e-6) for key in SHAPES)
        for name in ("short", "short nodes"):
            totals = found[name]["totals"]
            once = max(float((totals[0][key] - expected[key]).abs().max()) for key in SHAPES)
            mean = {key: torch.stack([t[key] for t in totals]).mean(0) for key in SHAPES}
            over_time = max(float((mean[key] - expected[key]).abs().max()) for key in SHAPES)
            assert 1e-4 < once < 0.2  # bfloat16 is coarse,
            assert over_time < once / 16  # but what is rounded away at one step comes back at the next
        assert found["plain"]["bytes"] == {4 * numbers}
        assert all(0 <= exposed <= busy for _, (busy, exposed) in ((n, found[n]["time"]) for n in found))
        assert min(found["short"]["bytes"]) < 0.8 * 4 * numbers  # half, and the padding of tiny buckets
    first = answers[0][1]
    for _, other in answers[1:]:  # the same bits on every rank
        for name, found in first.items():
            for got, expect in zip(other[name]["totals"], found["totals"], strict=True):
                assert all(torch.equal(got[key], expect[key]) for key in SHAPES)


def test_batch_shares_are_whole_and_do_not_depend_on_the_ranks() -> None:
    from hpc_c2g.training.step.sharding import batch_shares

    assert batch_shares(TrainConfig(global_batch=24), [3, 2, 4]) == [8, 5, 11]
    assert batch_shares(TrainConfig(global_batch=10), [1, 1, 1]) == [4, 3, 3]
    assert batch_shares(TrainConfig(global_batch=7, shares=[0.5, 3.0]), [9, 9]) == [1, 6]
    with pytest.raises(UserError, match="global_batch=2 with shares"):
        batch_shares(TrainConfig(global_batch=2), [1, 1, 1])


def test_a_share_moves_samples_to_its_classifier() -> None:
    run = replace(config(None, "codes", global_batch=BATCH), shares=[1.0, 5.0])
    step = trainer(three_bundles()[:2], run)
    assert [share.objective.batch for share in step.shares] == [4, 20]
