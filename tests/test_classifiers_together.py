"""Laws of one generator from several classifiers: what the user starts, reads back, samples and judges; and what fits."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.logs import warnings_logged
from helpers.trainers import three_bundles
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hpc_c2g.classifiers.bundle import Bundle, build_model, load_bundle, save_bundle
from hpc_c2g.classifiers.normalization import Normalization
from hpc_c2g.data.config import DataConfig
from hpc_c2g.distributed.mesh import Mesh
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import UserError
from hpc_c2g.evaluation.config import EvaluateConfig
from hpc_c2g.evaluation.evaluate import evaluate
from hpc_c2g.fitting.config import ClassifierConfig, MarginFitConfig
from hpc_c2g.fitting.make import make_classifier
from hpc_c2g.generators.config import DRAWINGS, FreeImagesConfig
from hpc_c2g.generators.latents import fresh_latents
from hpc_c2g.monitoring.config import LogConfig
from hpc_c2g.training import trainer
from hpc_c2g.training.config.objective import AlphaConfig
from hpc_c2g.training.config.train import CheckpointConfig, TrainConfig
from hpc_c2g.training.cost.capacity import available_bytes, check_classifiers, largest_that_fits
from hpc_c2g.training.loop import train
from hpc_c2g.training.results import load_run
from hpc_c2g.training.step.sharding import batch_shares, shard

ALONE = World.single_process(torch.device("cpu"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    parent = tmp_path_factory.mktemp("bundles")
    for k, bundle in enumerate(three_bundles()):
        save_bundle(bundle, parent / str(k))
    return [str(parent / str(k)) for k in range(3)]


def config(folders: str | list[str], run_dir: Path, **changes: object) -> TrainConfig:
    return TrainConfig(
        **{
            "classifier": folders,
            "run_dir": str(run_dir),
            "steps": 6,
            "global_batch": 36,
            "device": "cpu",
            "alpha": AlphaConfig(pilot_steps=3),
            "log": LogConfig(every=2, images_every=3, progress=False),
            "checkpoint": CheckpointConfig(every=3),
            **changes,
        }
    )


def test_a_run_of_three_tells_each_one_s_curves_and_is_read_back(folders: list[str], tmp_path: Path) -> None:
    train(config(folders, tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("loss", "stationarity", "rho"):
            each = [line[f"classifier{k}/{name}"] for k in range(3)]
            assert line[name] == pytest.approx(sum(each) / 3)
            assert len(set(each)) == 3
        assert all(f"classifier{k}/margins/q50" in line for k in range(3))
    assert len({lines[-1][f"classifier{k}/alpha"] for k in range(3)}) == 3
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"samples", *(f"classifier{k}/samples" for k in range(3))}
    run = load_run(tmp_path / "run")
    assert run.generator.classes == list("abcdefgh")  # the first two share class b
    assert [member.classes for member in run.generator.members] == [list("abc"), list("bd"), list("efgh")]
    assert len(run.alphas) == 3
    for drawing in DRAWINGS:
        images, labels = run.generator.sample(40, 0, drawing)
        assert images.shape == (40, 1, 4, 4)
        assert labels.tolist() == [i % 8 for i in range(40)]
    only = run.generator.only(1)
    assert only.classes == ["b", "d"]
    assert only.sample(5, 0)[1].tolist() == [0, 1, 0, 1, 0]
    picture, columns = run.generator.picture(0, rows=2)
    assert (columns, len(picture)) == (9, 18)


def test_a_stopped_run_of_three_goes_on_bitwise_and_other_classifiers_are_refused(
    folders: list[str], tmp_path: Path
) -> None:
    train(config(folders, tmp_path / "whole"))
    train(config(folders, tmp_path / "cut"))
    last = max((tmp_path / "cut" / "checkpoints").iterdir())
    for file in last.iterdir():
        file.write_bytes(file.read_bytes()[:7])
    with warnings_logged("damaged"):
        assert train(config(folders, tmp_path / "cut")).steps_made == 3
    whole, again = (load_run(tmp_path / name) for name in ("whole", "cut"))
    assert whole.alphas == again.alphas
    for mine, other in zip(whole.generator.module.parameters(), again.generator.module.parameters(), strict=True):
        assert torch.equal(mine, other)
    with pytest.raises(UserError, match="holds a run of another classifier"):
        train(config(folders[:2], tmp_path / "cut"))


@pytest.mark.parametrize(
    "changes",
    [{}, {"deterministic": True, "deterministic_shards": 2}, {"generator": FreeImagesConfig()}],
    ids=lambda c: "-".join(c),
)
def test_two_solutions_are_what_two_copies_of_the_classifier_would_get(
    folders: list[str], tmp_path: Path, changes: dict[str, object]
) -> None:
    copy = shutil.copytree(folders[0], tmp_path / "copy")
    train(config([folders[0], str(copy)], tmp_path / "copies", **changes))
    train(config(folders[0], tmp_path / "solutions", solutions=2, **changes))
    copies, solutions = (load_run(tmp_path / name) for name in ("copies", "solutions"))
    assert copies.alphas == solutions.alphas
    for mine, other in zip(copies.generator.module.parameters(), solutions.generator.module.parameters(), strict=True):
        assert torch.equal(mine, other)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("copies", "solutions")
    ]
    for copied, solved in zip(*lines, strict=True):
        for k in range(2):
            assert solved[f"solution{k}/alpha"] == copied[f"classifier{k}/alpha"]
            assert solved[f"solution{k}/margins/q50"] == copied[f"classifier{k}/margins/q50"]
        for name in ("alpha", "diversity", "margins/q50"):
            assert solved[name] == pytest.approx(sum(solved[f"solution{k}/{name}"] for k in range(2)) / 2)
    for drawing in DRAWINGS:
        for mine, other in zip(
            copies.generator.sample(30, 0, drawing), solutions.generator.sample(30, 0, drawing), strict=True
        ):
            assert torch.equal(mine, other)


def test_each_classifier_has_its_own_solutions(folders: list[str], tmp_path: Path) -> None:
    train(config(folders[:2], tmp_path / "run", solutions=2, shares=[2.0, 1.0]))
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    each = [f"classifier{k}/solution{s}/" for k in range(2) for s in range(2)]
    assert len({line[f"{prefix}stationarity"] for prefix in each}) == 4
    run = load_run(tmp_path / "run")
    assert [member.classifier for member in run.generator.members] == [0, 0, 1, 1]
    only = run.generator.only(1)
    assert only.classes == ["b", "d"]
    assert [member.index for member in only.members] == [2, 3]
    picture, columns = run.generator.picture(0, rows=4)
    assert (columns, len(picture)) == (5, 20)
    rows = picture.reshape(4, 5, 1, 4, 4)[:, :3]
    for s, member in enumerate(run.generator.only(0).members):
        latents = fresh_latents(0, 12, run.generator.dimensions, 3, member=member.index)
        drawn = run.generator.draw(latents, member)[0].reshape(4, 3, 1, 4, 4)
        assert torch.equal(rows[s::2], drawn[s::2])  # the solutions' rows in turn


def test_a_run_from_before_there_were_solutions_has_one_of_each_classifier(folders: list[str], tmp_path: Path) -> None:
    train(config(folders[:2], tmp_path / "run"))
    for file in (tmp_path / "run" / "checkpoints").glob("*/state.pt"):
        state = torch.load(file, weights_only=True)
        for member in state["trained"]["members"]:
            del member["classifier"]
        torch.save(state, file)
        meta = json.loads(file.with_name("meta.json").read_text())
        meta |= {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}
        file.with_name("meta.json").write_text(json.dumps(meta))
    settings = tmp_path / "run" / "config.yaml"
    settings.write_text(settings.read_text().replace("solutions: 1\n", ""))
    assert [member.classifier for member in load_run(tmp_path / "run").generator.members] == [0, 1]
    with pytest.raises(UserError, match="solutions=1 there, 2 now"):
        train(config(folders[:2], tmp_path / "run", solutions=2))


def test_shares_are_those_of_classifiers_whatever_the_solutions(folders: list[str]) -> None:
    wanted = config(folders[:2], Path("run"), solutions=2, shares=[2.0, 1.0])
    assert batch_shares(wanted, [3, 3, 2, 2]) == [12, 12, 6, 6]
    with pytest.raises(UserError, match=r"shares=\[1.0\] names 1 shares for 2 classifiers"):
        shard(replace(wanted, shares=[1.0]), [3, 3, 2, 2], Mesh.over(ALONE, 4), None)
    with pytest.raises(UserError, match="solutions=0"):
        replace(wanted, solutions=0)


def test_free_images_of_several_classifiers_keep_their_place(folders: list[str], tmp_path: Path) -> None:
    train(config(folders[:2], tmp_path / "run", generator=FreeImagesConfig(), shares=[2.0, 1.0]))
    module = load_run(tmp_path / "run").generator.module
    assert module.counts == [24, 12]
    assert module.image.shape == (36, 1, 4, 4)


def test_classifiers_that_cannot_share_a_generator_are_refused(folders: list[str], tmp_path: Path) -> None:
    architecture = {"target": "mlp", "input_shape": [1, 5, 5], "classes": 2, "width": 4}
    model = build_model(architecture).double()
    normalization = Normalization.constant((1, 5, 5), 0.5)
    save_bundle(Bundle(model, architecture, ["a", "b"], (1, 5, 5), normalization), tmp_path / "other")
    with pytest.raises(UserError, match=r"inputs of different shapes: \S+/0 \[1, 4, 4\], \S+/other \[1, 5, 5\]"):
        train(config([folders[0], str(tmp_path / "other")], tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    for classifier, fragment in (([], "classifier="), ([folders[0]] * 2, "name each bundle once"), (3, "classifier=3")):
        with pytest.raises(UserError, match=fragment.replace("[", r"\[")):
            config(classifier, tmp_path / "run")


def test_each_classifier_is_judged_against_its_own_data(tmp_path: Path) -> None:
    names = []
    for classes in ([0, 1, 2], [3, 4]):
        names.append(str(tmp_path / f"digits{len(names)}"))
        data = DataConfig(classes=classes, train_size=20, held_out_size=60)
        small, soon = {"_target_": "mlp", "width": 32}, MarginFitConfig(target_margin=10.0)
        make_classifier(ClassifierConfig(out=names[-1], data=data, model=small, fit=soon))
    train(config(names, tmp_path / "run", solutions=2))
    settings = EvaluateConfig(str(tmp_path / "run"), count=20, classification_steps=2, free_steps=2)
    results = evaluate(settings)
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert [one["classifier"] for one in written["classifiers"]] == names
    assert written["classifiers"] == json.loads(json.dumps(results))
    assert [one["settings"]["data"]["classes"] for one in results] == [[0, 1, 2], [3, 4]]
    assert (tmp_path / "run" / "nearest-classifier1.png").exists()
    baseline = load_run(next((tmp_path / "run" / "baselines").glob("classification_only-classifier1-*"))).config
    seen = (baseline.classifier, baseline.solutions, baseline.global_batch)
    assert seen == (names[1], 1, 7)  # two fifths of 36, halved
    with pytest.raises(UserError, match="each is evaluated on the data that its record names"):
        evaluate(replace(settings, data=DataConfig()))


def test_the_largest_micro_batch_fits_and_is_kept_by_a_run(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = [load_bundle(folder) for folder in folders]
    settings = config(folders, tmp_path / "run", micro_batch="auto", global_batch=512)
    mesh = Mesh.over(ALONE, 3)
    sizes = [largest_that_fits(bundles, settings, mesh, free) for free in (1e6, 1.6e6, 1e9)]
    assert sizes[0] < sizes[1] < sizes[2] == 512
    with pytest.raises(UserError, match=r"micro_batch=auto: not one sample fits into -?0\.00 GiB of rank 0"):
        largest_that_fits(bundles, settings, mesh, 1000)

    monkeypatch.setattr(trainer, "available_bytes", lambda world: 1e6)
    train(settings)
    last = max((tmp_path / "run" / "checkpoints").iterdir())
    state = torch.load(last / "state.pt", weights_only=True)
    assert state["layout"] == {"world_size": 1, "asked": "auto", "groups": "None", "micro_batch": sizes[0]}
    # on as many ranks the run goes on with the micro-batch that it found, whatever is free now
    shutil.rmtree(last)
    monkeypatch.setattr(trainer, "largest_that_fits", lambda *_: pytest.fail("the run has found its micro-batch"))
    assert train(settings).steps_made == 3


def test_more_classifiers_than_the_ranks_can_hold_are_refused(folders: list[str]) -> None:
    bundles = [load_bundle(folder) for folder in folders]
    with pytest.raises(UserError, match=r"3 classifiers x solutions per process need 0\.00 GiB"):
        check_classifiers(bundles, Mesh.over(ALONE, 3), 1000)
    check_classifiers(bundles, Mesh.over(ALONE, 3), 1e6)


def test_available_memory_is_that_of_the_machine_or_its_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = available_bytes(ALONE)
    assert 2**26 < whole < 2**50
    monkeypatch.setattr("hpc_c2g.training.cost.capacity.CGROUP", tmp_path)
    monkeypatch.setattr("hpc_c2g.training.cost.capacity.OWN_GROUP", tmp_path / "own")
    (tmp_path / "own").write_text("0::/slurm/job7/step0\n")
    job = tmp_path / "slurm" / "job7"  # the limit is the job's, not the step's own
    (job / "step0").mkdir(parents=True)
    for name, text in {"max": "1000000", "current": "400000", "stat": "anon 9\ninactive_file 50000"}.items():
        (job / f"memory.{name}").write_text(f"{text}\n")
    assert available_bytes(ALONE) == 650_000
    (job / "memory.max").write_text("max\n")
    assert available_bytes(ALONE) > 2**26
