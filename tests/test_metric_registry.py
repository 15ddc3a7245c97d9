"""Laws of the metrics' registry: each metric is computed, tabulated, drawn and published by its entry alone."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch

from hpc_c2g.data.dataset import Dataset, Split
from hpc_c2g.evaluation import metric_registry, metrics
from hpc_c2g.evaluation.metric_registry import COLUMNS, METRICS, USES_REAL_DATA, Metric, numbers
from hpc_c2g.evaluation.metrics import judge

OF_IMAGES = {"ssim_sample_to_train", "ssim_train_to_sample"}
OF_ROWS = {"marginal_distance", "correlation_distance"}


def random_set(count: int, shape: tuple[int, ...], seed: int) -> Dataset:
    samples = torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))
    return Dataset(samples, torch.arange(count) % 3, ["a", "b", "c"], (0.0, 1.0))


def evaluation(shape: tuple[int, ...]) -> dict:
    generated, split = random_set(12, shape, 2), Split(random_set(9, shape, 0), random_set(240, shape, 1))
    return judge(generated.samples, generated.labels, split)


@pytest.fixture
def added(monkeypatch) -> Metric:
    """A metric that the registry has besides its own; modules that derive from it are imported anew."""
    metric = Metric("mean_value", "mean value", "low", USES_REAL_DATA, lambda c: float(c.generated.samples.mean()))
    monkeypatch.setattr(metric_registry, "METRICS", (*METRICS, metric))
    monkeypatch.setattr(metric_registry, "COLUMNS", (*COLUMNS, *metric.columns))
    monkeypatch.setattr(metrics, "METRICS", metric_registry.METRICS)
    derived = ("hpc_c2g.reporting", "launch.evaluate", "launch.publish", "launch.report", "launch.collect")
    for name in [name for name in sys.modules if name.startswith(derived)]:
        monkeypatch.delitem(sys.modules, name)
    return metric


def fresh(name: str):
    return importlib.import_module(name)


@pytest.mark.parametrize(("shape", "absent"), [((1, 8, 8), OF_ROWS), ((5,), OF_IMAGES)])
def test_every_registered_metric_that_applies_is_computed(shape, absent):
    result = evaluation(shape)
    assert list(result) == [metric.name for metric in METRICS]
    assert {name for name, value in result.items() if value is None} == absent
    assert set(numbers(result)) == {c for m in METRICS if m.name not in absent for c in m.columns}


def test_every_number_of_an_evaluation_is_a_column():
    result = evaluation((1, 8, 8))
    leaves = [v for value in result.values() for v in (value.values() if isinstance(value, dict) else [value])]
    assert sorted(numbers(result).values()) == sorted(v for v in leaves if v is not None)
    assert set(numbers(result)) <= set(COLUMNS)


def test_columns_are_distinct_and_every_metric_has_a_direction():
    assert len(set(COLUMNS)) == len(COLUMNS)
    assert all(metric.aim and metric.title and metric.source == USES_REAL_DATA for metric in METRICS)


def test_a_metric_is_added_by_one_entry_and_is_everywhere(added, tmp_path):
    result = evaluation((1, 4, 4))
    assert result[added.name] == pytest.approx(0.5, abs=0.1)
    results, tables, board = (fresh(f"hpc_c2g.reporting.{name}") for name in ("results", "tables", "board"))
    rows = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        own = result | {added.name: result[added.name] * (1 + seed)}
        (tmp_path / str(seed) / "evaluation.json").write_text(json.dumps(own))
        rows.append({"id": str(seed), "seed": seed, **results.evaluation_of(tmp_path / str(seed))})
    found = results.Results(rows, results.groups(rows), [], [])
    assert found.groups[0][added.name] == pytest.approx(1.5 * result[added.name])
    tables.write_tables(tmp_path, "s", found)
    for file in ("results.md", "results.csv", "results.json"):
        assert added.name in (tmp_path / file).read_text()
    assert added.name in board.COLUMNS
    written = board.Board(tmp_path)
    written.part("hparams/0", 0, board.write_hyperparameters({}, found.rows[0]))
    (events,) = (tmp_path / "board" / "0-study" / "hparams" / "0").iterdir()
    assert f"{added.name} (uses real data)".encode() in events.read_bytes()
    figures = fresh("hpc_c2g.reporting.figures").figures([{"n": 1, added.name: 0.5}, {"n": 2, added.name: 0.6}], [], {})
    assert any(added.title in figure.alt.lower() for figure in figures)
    publication = fresh("hpc_c2g.reporting.publication")
    group = publication.content(tmp_path, "s", "", found, {"0": "0", "1": "1"})["groups"]["all runs"]
    assert added.name in publication.table(group)[0]
    shown = fresh("launch.evaluate").table({"classifier": "c", "baselines": {}, **result})
    assert added.title in [column.header for column in shown.columns]
