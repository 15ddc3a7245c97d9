"""``python tests/browser/screenshots.py STUDY OUT``: the pictures of docs/monitoring.md, from a study of digits."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from board import TensorBoardServer, assert_custom_layout, assert_images_displayed, open_tab
from conftest import chrome
from pages import screenshot, wait_until

BAND = "Mean over seeds, 95 % interval"


def main(study: Path, out: Path) -> None:
    """Look, and keep what is seen."""
    with tempfile.TemporaryDirectory() as profile, chrome(Path(profile)) as browser:
        command = [sys.executable, "-m", "launch", "board", study.name, "port=0"]  # a name, which TensorBoard shows
        with TensorBoardServer(command, cwd=study.parent) as server:
            assert_custom_layout(browser, server.url, {BAND: ["stationarity"]}, select="^0-study/mean")
            screenshot(browser, out / "board-means.png")
            open_tab(browser, server.url, "images", select="^0-study/pictures")
            wait_until(
                lambda: assert_images_displayed(browser, server.url, 7, select="^0-study/pictures"), 30, "images"
            )
            screenshot(browser, out / "board-pictures.png")
        browser.set_window_size(1200, 3000)
        browser.get((study / "report.html").absolute().as_uri())
        screenshot(browser, out / "report.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
