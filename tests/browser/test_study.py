"""A study as people see it: `c2g board` in a real browser, and the report that `c2g report` writes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from board import (
    TensorBoardServer,
    assert_custom_layout,
    assert_hparams,
    assert_images_displayed,
    assert_scalars_drawn,
    assert_text,
)
from helpers.studies import ROOT, c2g, sweep
from pages import assert_page_clean, sort_by

if TYPE_CHECKING:
    from selenium.webdriver.remote.webdriver import WebDriver

pytestmark = pytest.mark.browser
MEAN, RUN = "0-study/mean/global_batch=8", "runs/global_batch=8 seed=0"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two batches x two seeds on two digits, judged."""
    folder = tmp_path_factory.mktemp("browser") / "study"
    sweep(
        folder,
        *("study.stages=[classifier,train,evaluate]", "global_batch=8,12", "seed=0,1", "steps=40", "log.every=1"),
        *("evaluate.baselines=false", "evaluate.count=20", "cluster=debug"),
    )
    c2g("report", folder)
    return folder


@pytest.fixture(scope="module")
def server(study: Path) -> Iterator[TensorBoardServer]:
    with TensorBoardServer([sys.executable, "-m", "launch", "board", str(study), "port=0"], cwd=ROOT) as server:
        yield server


def test_it_listens_on_this_machine_alone(server: TensorBoardServer) -> None:
    assert {address.rpartition(":")[0] for address in server.addresses} == {"127.0.0.1"}


def test_curves_of_means_and_of_runs_are_drawn(browser: WebDriver, server: TensorBoardServer) -> None:
    assert_scalars_drawn(browser, server.url, ["stationarity", "margins/q50"], [MEAN, RUN], select="mean|seed=0$")


def test_metrics_against_the_swept_variable_are_drawn(browser: WebDriver, server: TensorBoardServer) -> None:
    assert_scalars_drawn(browser, server.url, ["final/coverage (uses real data)"], ["0-study/against global_batch"])


def test_the_layout_shows_means_with_bands_and_runs_by_question(browser: WebDriver, server: TensorBoardServer) -> None:
    band = "Mean over seeds, 95 % interval"
    means = assert_custom_layout(
        browser, server.url, {band: ["stationarity", "alpha", "diversity"]}, select="^0-study/mean"
    )
    assert [curve for curve in means[f"{band}/stationarity"] if MEAN in curve]
    wanted = {
        "Conditions": ["relative residual", "relative residual per tensor", "losses"],
        "Margins and multipliers": ["scaled margins: median in 5 to 95 %"],
        "Speed": ["share of time"],
        "Signatures of failure": ["level, 1 fires"],
    }
    drawn = assert_custom_layout(browser, server.url, wanted, select=f"^{RUN}$")
    assert drawn["Conditions/relative residual"] == [f"stationarity ({RUN})"]


def test_figures_samples_and_pictures_of_real_images_are_displayed(
    browser: WebDriver, server: TensorBoardServer
) -> None:
    shown = assert_images_displayed(browser, server.url, 12)
    assert ("0-study/pictures", "figures/quality-global_batch") in shown
    assert ("0-study/pictures", "samples/global_batch=8") in shown
    assert (RUN, "samples") in shown
    nearest = "uses_real_data/training images, below them the nearest samples"
    assert (f"{RUN} evaluation (uses real data)", nearest) in shown


def test_every_run_is_a_row_of_the_hparams_table_with_its_metrics(
    browser: WebDriver, server: TensorBoardServer
) -> None:
    metrics = ["stationarity", "coverage (uses real data)", "recovered (uses real data)"]
    assert_hparams(browser, server.url, ["global_batch", "seed", *metrics, "8.0000", "12.000"], rows=4)


def test_settings_versions_and_alternative_texts_are_displayed(browser: WebDriver, server: TensorBoardServer) -> None:
    assert_text(browser, server.url, ["global_batch", "revision", "processes", "OMP_NUM_THREADS"], select=f"^{RUN}$")
    assert_text(
        browser, server.url, ["uses real data", "best run", "Curves over training steps"], select="^0-study/pictures$"
    )


def test_the_report_is_clean_and_its_tables_can_be_sorted(browser: WebDriver, study: Path) -> None:
    assert_page_clean(browser, (study / "report.html").as_uri())
    tables = browser.find_elements("css selector", "table")
    assert len(tables) >= 3
    runs = next(i for i, t in enumerate(tables) if "every run" in t.text.lower() or "Every run" in t.text)
    browser.execute_script("arguments[0].id = 'under-test'", tables[runs])
    values = [float(text) for text in sort_by(browser, "#under-test", "stationarity")]
    assert values == sorted(values)
    assert len(values) == 4
