"""Laws of the looking at TensorBoard: what is written is seen in every tab, and what is not there is missed."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import board
import pytest
import torch
from board import (
    TensorBoardServer,
    assert_custom_layout,
    assert_hparams,
    assert_images_displayed,
    assert_scalars_drawn,
    assert_text,
    assert_time_series_drawn,
    family,
    listening_addresses,
    lives,
)
from pages import wait_until

if TYPE_CHECKING:
    from selenium.webdriver.remote.webdriver import WebDriver
    from torch.utils.tensorboard import SummaryWriter

pytestmark = pytest.mark.browser

STEPS = 10
CURVES = ("stationarity", "loss", "margins/q05", "margins/q50", "margins/q95")
RUNS = ("0-study/mean/a", "runs/seed=0", "runs/seed=1")
LAYOUT = {
    "Study": {
        "residual and loss": ["Multiline", ["^stationarity$", "^loss$"]],
        "margins": ["Margin", ["margins/q50", "margins/q05", "margins/q95"]],
    }
}
SHORT = 1.5  # seconds after which a check that must fail may fail


def write_curves(folder: Path, shift: float) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    writer = SummaryWriter(str(folder))
    for step in range(1, STEPS + 1):
        for i, tag in enumerate(CURVES):
            writer.add_scalar(tag, (i + 1) / step + shift, step)
    return writer


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mean with layout, image and text, two runs behind links, three points of hyperparameters."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    elsewhere, logs = tmp_path_factory.mktemp("elsewhere"), tmp_path_factory.mktemp("logs")
    noise = torch.rand(3, 12, 24, generator=torch.Generator().manual_seed(0))
    with write_curves(logs / "0-study/mean/a", 0) as writer:
        writer.add_custom_scalars(LAYOUT)
        writer.add_text("table", "| key | value |\n|---|---|\n| batch | **128** |\n", 0)
        writer.add_image("samples", noise, STEPS)
    (logs / "runs").mkdir()
    for seed in (0, 1):
        with write_curves(elsewhere / f"{seed}/tensorboard", 0.1 + seed / 10) as writer:
            writer.add_image("samples", noise[:1], STEPS)
        (logs / f"runs/seed={seed}").symlink_to(elsewhere / f"{seed}/tensorboard")
    for i, prior in enumerate(("gaussian", "uniform", "sphere")):
        with SummaryWriter(str(logs / f"0-study/hparams/{i}")) as writer:
            for summary in hparams({"width": 64 + i, "prior": prior}, {"final/ssim": 0.0}):
                writer.file_writer.add_summary(summary)
            writer.add_scalar("final/ssim", 0.5 + i / 10, STEPS)
    return logs


@pytest.fixture(scope="module")
def server(logs: Path, browser: WebDriver) -> Iterator[TensorBoardServer]:
    with TensorBoardServer(board.command(logs)) as running:
        yield running


def test_the_scalars_tab_draws_every_tag_of_every_run_also_behind_links(
    browser: WebDriver, server: TensorBoardServer
) -> None:
    assert_scalars_drawn(browser, server.url, CURVES, RUNS)
    assert_scalars_drawn(browser, server.url, ["final/ssim"])


def test_a_tag_a_run_and_a_curve_that_are_not_there_are_missed(browser: WebDriver, server: TensorBoardServer) -> None:
    with pytest.raises(AssertionError, match="tag absent: no chart"):
        assert_scalars_drawn(browser, server.url, ["loss", "absent"], seconds=SHORT)
    with pytest.raises(AssertionError, match="run runs/seed=2: not listed"):
        assert_scalars_drawn(browser, server.url, ["loss"], ["runs/seed=2"], seconds=SHORT)
    with pytest.raises(AssertionError, match="tag loss: no curve for run 0-study/hparams/0 among 3"):
        assert_scalars_drawn(browser, server.url, ["loss"], ["0-study/hparams/0"], seconds=SHORT)


def test_the_time_series_tab_draws_every_tag(browser: WebDriver, server: TensorBoardServer) -> None:
    assert_time_series_drawn(browser, server.url, CURVES)
    with pytest.raises(AssertionError, match="tag absent: nothing drawn"):
        assert_time_series_drawn(browser, server.url, ["absent"], seconds=SHORT)
    with pytest.raises(AssertionError, match="tag loss: nothing drawn"):
        assert_time_series_drawn(browser, server.url, ["loss"], seconds=SHORT, select="^no such run$")


def test_the_custom_scalars_tab_has_our_charts_with_the_curves_of_all_runs(
    browser: WebDriver, server: TensorBoardServer
) -> None:
    series = assert_custom_layout(browser, server.url, {"Study": ["residual and loss", "margins"]})
    assert series["Study/residual and loss"] == sorted(f"{tag} ({run})" for tag in CURVES[:2] for run in RUNS)
    assert series["Study/margins"] == [f"margins/q50 ({run})" for run in RUNS]


@pytest.mark.parametrize(
    ("titles", "complaint"),
    [
        ({"Nothing": ["margins"]}, "category Nothing: not there"),
        ({"Study": ["margins", "absent"]}, "no chart absent"),
    ],
)
def test_a_category_and_a_chart_that_are_not_there_are_missed(
    browser: WebDriver, server: TensorBoardServer, titles: dict[str, list[str]], complaint: str
) -> None:
    with pytest.raises(AssertionError, match=complaint):
        assert_custom_layout(browser, server.url, titles, seconds=SHORT)


def test_the_images_tab_displays_every_image_and_a_wrong_count_is_told(
    browser: WebDriver, server: TensorBoardServer
) -> None:
    assert sorted(assert_images_displayed(browser, server.url, 3)) == [(run, "samples") for run in RUNS]
    with pytest.raises(AssertionError, match="3 images, not 4"):
        assert_images_displayed(browser, server.url, 4, seconds=SHORT)


def test_the_hparams_tab_has_a_row_per_point_and_a_missing_value_is_told(
    browser: WebDriver, server: TensorBoardServer
) -> None:
    table = assert_hparams(browser, server.url, ["prior", "width", "final/ssim", "sphere"], rows=3)
    shown = {tuple(row[table[0].index(name)] for name in ("prior", "width", "final/ssim")) for row in table[1:]}
    assert shown == {
        ("gaussian", "64.000", "0.50000"),
        ("uniform", "65.000", "0.60000"),
        ("sphere", "66.000", "0.70000"),
    }
    with pytest.raises(AssertionError, match="cauchy: in no cell"):
        assert_hparams(browser, server.url, ["sphere", "cauchy"], seconds=SHORT)
    with pytest.raises(AssertionError, match="3 rows, not 4"):
        assert_hparams(browser, server.url, [], rows=4, seconds=SHORT)


def test_the_text_tab_shows_markdown_as_rendered_and_a_missing_text_is_told(
    browser: WebDriver, server: TensorBoardServer
) -> None:
    there = assert_text(browser, server.url, ["key", "batch", "128"])
    assert "**" not in there
    assert "|" not in there
    with pytest.raises(AssertionError, match="'width': not displayed"):
        assert_text(browser, server.url, ["batch", "width"], seconds=SHORT)


def test_the_server_listens_on_this_machine_alone(server: TensorBoardServer) -> None:
    port = server.url.rstrip("/").rpartition(":")[2]
    assert f"127.0.0.1:{port}" in server.addresses
    assert {address.rpartition(":")[0] for address in server.addresses} == {"127.0.0.1"}
    assert len(server.addresses) == len(family(server.process.pid)) == 2  # with the data server


def test_listening_on_every_address_is_seen() -> None:
    with socket.create_server(("", 0)) as four, socket.create_server(("::1", 0), family=socket.AF_INET6) as six:
        ports = [s.getsockname()[1] for s in (four, six)]
        assert {f"0.0.0.0:{ports[0]}", f"::1:{ports[1]}"} <= listening_addresses(os.getpid())
    assert not {f"0.0.0.0:{ports[0]}", f"::1:{ports[1]}"} & listening_addresses(os.getpid())


@pytest.mark.parametrize("arguments", [(), ("--load_fast", "false")], ids=["data server", "in Python"])
def test_links_are_followed_and_nothing_is_left_running(logs: Path, arguments: tuple[str, ...]) -> None:
    with TensorBoardServer(board.command(logs, *arguments), stop=signal.SIGINT) as server:
        processes = family(server.process.pid)
        wait_until(lambda: set(server.get("data/runs")) >= {*RUNS}, 20, "runs behind links")
    assert len(processes) == (1 if arguments else 2)
    assert not any(map(lives, processes))


def test_a_command_that_ends_early_is_told_with_its_output() -> None:
    with (
        pytest.raises(AssertionError, match="ended with 3: no such study"),
        TensorBoardServer([sys.executable, "-c", "print('no such study'); raise SystemExit(3)"]),
    ):
        raise AssertionError("never here")


def test_a_server_that_ignores_its_signal_ends_all_the_same(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "STOP_SECONDS", 0.5)
    with TensorBoardServer(board.command(logs), stop=signal.SIGURG) as server:
        processes = family(server.process.pid)
    wait_until(lambda: not any(map(lives, processes)), 10, "all end")
