"""TensorBoard: a server of one's own, and what its tabs display.

Every ``assert_...`` opens its tab afresh, tries again while the server still reads, tells what is missing when its
seconds are over, and ends with a console without errors.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pages import console_errors, run, visible_text, wait_until

if TYPE_CHECKING:
    from selenium.webdriver.remote.webdriver import WebDriver
    from selenium.webdriver.remote.webelement import WebElement

SECONDS = 30.0
STOP_SECONDS = 10.0  # after which a server is killed
COLORED = 250  # pixels: more than the marks of values that are not finite, less than a curve has
RELOAD = 12.0  # a page shows the runs that were known when it was loaded


def command(logdir: Path, *arguments: str) -> list[str]:
    """The command line of a plain TensorBoard on a free port of this machine alone."""
    where = ("--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0")
    return [sys.executable, "-m", "tensorboard.main", *where, *arguments]


def family(pid: int) -> list[int]:
    """A process and all that come of it."""
    found = [pid]
    for parent in found:  # grows as we go
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, children.read_text().split())
    return found


def lives(pid: int) -> bool:
    """Whether the process has not ended; one that nobody has buried yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def listening_addresses(pid: int) -> set[str]:
    """``address:port`` of every TCP socket on which the process or one of its children listens."""
    sockets = set()
    for process in family(pid):
        with contextlib.suppress(OSError):
            for handle in Path(f"/proc/{process}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if found := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(handle)):
                        sockets.add(found[1])
    addresses = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *_, inode = line.split()[:10]
                if state == "0A" and inode in sockets:
                    host, port = local.split(":")
                    words = struct.unpack(f">{len(host) // 8}I", bytes.fromhex(host))  # words in the order of the host
                    packed = struct.pack(f"={len(words)}I", *words)
                    addresses.add(f"{ipaddress.ip_address(packed)}:{int(port, 16)}")
    return addresses


class TensorBoardServer:
    """Within, the command line runs and answers at ``url``; after, it and all that it started have ended.

    Args:
        command: it prints its address, as TensorBoard does; with ``--port 0`` it finds a free port itself.
        seconds: within which it must answer and have found a run.
        stop: the signal that ends it; TensorBoard's own is SIGINT or SIGTERM.
        cwd: where it runs, if not here.
    """

    def __init__(
        self, command: Sequence[str], seconds: float = 60, stop: int = signal.SIGTERM, cwd: Path | None = None
    ) -> None:
        self.command, self.seconds, self._stop, self._cwd = list(command), seconds, stop, cwd
        self.url = ""

    def __enter__(self) -> TensorBoardServer:
        self._output = tempfile.TemporaryFile()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=self._cwd,
            start_new_session=True,
        )
        try:
            self.url = wait_until(self._answering, self.seconds, f"{self.command} answers")
            wait_until(lambda: self.get("data/runs"), self.seconds, f"{self.command} finds runs")
        except BaseException:
            self.__exit__(None, None, None)
            print(self.printed)  # which pytest shows
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ours = family(self.process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, self._stop)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        with contextlib.suppress(AssertionError):  # the data server ends when it sees that TensorBoard has
            wait_until(lambda: not any(map(lives, ours)), STOP_SECONDS, "all end")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(STOP_SECONDS)
        self.printed = self._read()
        self._output.close()

    def _read(self) -> str:
        return os.pread(self._output.fileno(), 1 << 20, 0).decode(errors="replace")

    def _answering(self) -> str | None:
        """The first of the addresses it printed at which a TensorBoard answers."""
        assert self.process.poll() is None, f"ended with {self.process.returncode}: {self._read()}"
        for url in re.findall(r"http://[\w.\[\]:-]+:\d+(?:/[\w/.-]*)?", self._read()):
            with contextlib.suppress(OSError, ValueError):
                self.get("data/environment", url)
                return url.rstrip("/") + "/"
        return None

    def get(self, path: str, url: str | None = None) -> Any:
        """What the server answers, as of json."""
        return _get(url or self.url, path)

    @property
    def addresses(self) -> set[str]:
        """Where it listens, its data server included."""
        return listening_addresses(self.process.pid)


def _get(url: str, path: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url.rstrip("/") + "/" + path, timeout=10) as answer:
        return json.load(answer)


def open_tab(browser: WebDriver, url: str, tab: str, tags: Sequence[str] = (), select: str = "") -> None:
    """Load the page anew at this tab.

    Args:
        browser: that opens it.
        url: the board's.
        tab: its name in the address.
        tags: what is put into the field that filters tags.
        select: what is put into the field that filters runs. Without it TensorBoard selects all runs, but none at all
            (in the tabs other than time series and hparams) if there are more than forty.
    """
    filters = {"tagFilter": f"^(?:{'|'.join(map(re.escape, tags))})$" if tags else ""}
    filters["runFilter" if tab == "timeseries" else "regexInput"] = select
    asked = "&".join(f"{name}={quote(value, safe='')}" for name, value in filters.items() if value)
    browser.get("about:blank")  # a mere new #tab would not load anything
    browser.get(f"{url}?{asked}#{tab}" if tab == "timeseries" else f"{url}#{tab}{asked and '&'}{asked}")


def _expand(browser: WebDriver) -> None:
    """Open all categories, of which TensorBoard opens the first two, and show all their cards, not only the first twelve."""
    run(
        browser,
        """
        for (const view of deep('tf-category-paginated-view')) {
          if (view._limit < 1000) view.set('_limit', 1000);
          const inside = view.shadowRoot.querySelector('iron-collapse');
          if (inside && !inside.opened) view.shadowRoot.querySelector('button.heading').click();
        }
        """,
    )


def _see(
    browser: WebDriver,
    url: str,
    tab: str,
    missing: Callable[[], list[str]],
    seconds: float,
    tags: Sequence[str] = (),
    select: str = "",
) -> None:
    """Look at the tab until nothing is missing."""
    console_errors(browser)  # what earlier pages left
    end = time.monotonic() + seconds
    while True:
        open_tab(browser, url, tab, tags, select)
        again = min(time.monotonic() + RELOAD, end)
        while True:
            _expand(browser)
            if not (lacking := missing()):
                assert not (errors := console_errors(browser)), "\n".join([f"console at #{tab}:", *errors])
                return
            if time.monotonic() > again:
                break
            time.sleep(0.1)
        assert time.monotonic() < end, "\n".join([f"#{tab} still lacks after {seconds:g} s:", *lacking])


RUNS = """
const colors = Object.fromEntries(deep('tf-multi-checkbox').flatMap(box =>
  [...box.shadowRoot.querySelectorAll('.name-row')].filter(shown).map(row => [
    row.querySelector('.item-label-container').textContent.trim(),
    getComputedStyle(row.querySelector('.isolator')).color])));
"""
CHARTS = """
function title(card) {
  return card.shadowRoot.querySelector('tf-card-heading').shadowRoot.querySelector('.heading-label.name').textContent.trim();
}
function drawn(card) {  // the color of every curve that is on the screen: it has a length, or the marker of a lone point
  const chart = deep('vz-line-chart2', card.shadowRoot)[0];
  if (!chart || !shown(chart)) return [];
  const at = new Set(deep('path.symbol', chart.shadowRoot).map(s => s.getAttribute('transform')));
  return deep('.line-plot:not(.ghost):not(.area-plot) path.line', chart.shadowRoot).filter(line => {
    const d = line.getAttribute('d') || '';
    return d.startsWith('M') && (line.getTotalLength() > 0 || at.has(`translate(${d.slice(1).replace('Z', '')})`));
  }).map(line => getComputedStyle(line).stroke);
}
"""


def assert_scalars_drawn(
    browser: WebDriver,
    url: str,
    tags: Sequence[str],
    runs: Sequence[str] = (),
    seconds: float = SECONDS,
    select: str = "",
) -> None:
    """The scalars tab lists every run, and draws for every tag a curve in the color of each run that has it.

    Args:
        browser: that looks.
        url: the board's.
        tags: whole names.
        runs: must have every one of these tags; if none are given, at least one run must.
        seconds: within which it is there.
        select: see ``open_tab``; of the other runs no curve is wanted.
    """

    def missing() -> list[str]:
        known: dict[str, list[str]] = {tag: [] for tag in tags}
        for name, has in _get(url, "data/plugin/scalars/tags").items():
            for tag in has.keys() & known.keys():
                if re.search(select, name):
                    known[tag].append(name)
        colors: dict[str, str] = run(browser, RUNS + "return colors")
        cards = run(
            browser, CHARTS + "return deep('tf-scalar-card').filter(shown).map(card => [card.tag, drawn(card)])"
        )
        curves: dict[str, list[str]] = dict(cards)
        lacking = [f"run {name}: not listed" for name in runs if name not in colors]
        for tag in tags:
            if tag not in curves:
                lacking.append(f"tag {tag}: no chart; there are {sorted(curves)}")
                continue
            expected = {*runs, *known[tag]}
            if not expected:
                lacking.append(f"tag {tag}: no run has it")
            left = Counter(curves[tag])
            for name in sorted(expected):
                color = colors.get(name, "no color")
                if left[color] == 0:
                    lacking.append(f"tag {tag}: no curve for run {name} among {len(curves[tag])}")
                left[color] -= 1
        return lacking

    _see(browser, url, "scalars", missing, seconds, tags, select)


def assert_time_series_drawn(
    browser: WebDriver, url: str, tags: Sequence[str], seconds: float = SECONDS, select: str = ""
) -> None:
    """The time series tab, which TensorBoard opens first, has a card per tag with a curve in color on its canvas."""

    def missing() -> list[str]:
        for card in run(browser, "return deep('card-view').filter(shown)"):
            run(browser, "arguments[0].scrollIntoView({block: 'center'})", card)  # out of sight it has no contents
            with contextlib.suppress(AssertionError):
                title, chart = wait_until(lambda card=card: _title_and_chart(browser, card), 0.5, "contents")
                if title not in seen and _colored(chart.screenshot_as_png) > COLORED:
                    seen.add(title)
        return [f"tag {tag}: nothing drawn" for tag in page if tag not in seen]

    for first in range(0, len(tags), 12):  # a page has twelve cards
        page, seen = tags[first : first + 12], set[str]()
        _see(browser, url, "timeseries", missing, seconds, page, select)


def _title_and_chart(browser: WebDriver, card: WebElement) -> tuple[str, WebElement] | None:
    return run(
        browser,
        """
        const [title, chart] = ['scalar-card .tag', 'line-chart .series-view'].map(css => arguments[0].querySelector(css));
        return title && chart && shown(chart) ? [title.textContent.trim(), chart] : null;
        """,
        card,
    )


def _colored(png: bytes) -> int:
    """How many pixels of a screenshot are not gray; the dullest color of a run is #425066."""
    import io

    import numpy as np
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return int((pixels.max(axis=2) - pixels.min(axis=2) > 25).sum())


def assert_custom_layout(
    browser: WebDriver, url: str, titles: Mapping[str, Sequence[str]], seconds: float = SECONDS, select: str = ""
) -> dict[str, list[str]]:
    """The custom scalars tab has these charts in these categories, each with a curve.

    Args:
        browser: that looks.
        url: the board's.
        titles: per category the titles of its charts.
        seconds: within which it is there.
        select: see ``open_tab``.

    Returns:
        What each of these charts draws, ``tag (run)``, by ``category/title``.
    """
    series: dict[str, list[str]] = {}

    def missing() -> list[str]:
        found = run(
            browser,
            CHARTS
            + """
            return deep('tf-category-paginated-view').filter(shown).map(view => [
              view.shadowRoot.querySelector('.category-name').textContent.trim(),
              [...view.querySelectorAll('tf-custom-scalar-multi-line-chart-card, tf-custom-scalar-margin-chart-card')]
                .map(card => [title(card), drawn(card).length,
                  [...card.shadowRoot.querySelectorAll('.match-list-entry')].map(e => e.lastChild.textContent.trim())])])
            """,
        )
        there = dict(found)
        lacking = []
        for category, wanted in titles.items():
            if category not in there:
                lacking.append(f"category {category}: not there; there are {sorted(there)}")
                continue
            charts = {title: (curves, matches) for title, curves, matches in there[category]}
            for title in wanted:
                curves, matches = charts.get(title, (None, []))
                if curves is None:
                    lacking.append(f"category {category}: no chart {title}; there are {list(charts)}")
                elif curves == 0 or curves < len(matches):
                    lacking.append(f"chart {title}: {curves} curves drawn of {len(matches)}")
                series[f"{category}/{title}"] = sorted(matches)
        return lacking

    _see(browser, url, "custom_scalars", missing, seconds, select=select)
    return series


def assert_images_displayed(
    browser: WebDriver, url: str, count: int, seconds: float = SECONDS, select: str = ""
) -> list[tuple[str, str]]:
    """The images tab displays exactly so many, each loaded and visible; ``(run, tag)`` of each."""
    cards: list[Any] = []

    def missing() -> list[str]:
        cards[:] = run(
            browser,
            """
            return deep('tf-image-loader').filter(shown).map(card => {
              const image = card.shadowRoot.querySelector('#main-image-container img');
              return [card.run, card.tag, Boolean(image && image.complete && image.naturalWidth > 0 && shown(image))];
            })
            """,
        )
        lacking = [f"image {tag} of {name}: not displayed" for name, tag, there in cards if not there]
        return lacking + ([f"{len(cards)} images, not {count}"] if len(cards) != count else [])

    _see(browser, url, "images", missing, seconds, select=select)
    return [(name, tag) for name, tag, _ in cards]


def hparams_table(browser: WebDriver) -> list[list[str]]:
    """The table on the hparams tab as displayed, its head first; scrolls, for rows out of sight are not in the page."""
    return run(
        browser,
        """
        const grid = deep('tf-hparams-table-view vaadin-grid, vaadin-grid#sessionGroupsTable').filter(shown)[0];
        if (!grid) return [];
        const cells = row => [...row.children].filter(c => !c.hidden).sort((a, b) => a.style.order - b.style.order)
          .map(c => c.querySelector('slot').assignedElements().map(e => e.textContent.trim()).join(' '));
        const rows = new Map();
        for (let i = 0; i <= (grid.size || 0); i += 5) {
          if (i) grid.scrollToIndex(i);
          for (const row of grid.shadowRoot.querySelectorAll('#items tr'))
            if (!row.hidden) rows.set(row.index ?? rows.size, cells(row));
        }
        if (grid.size) grid.scrollToIndex(0);
        const head = cells(grid.shadowRoot.querySelector('#header tr'));
        return [head, ...[...rows.entries()].sort((a, b) => a[0] - b[0]).map(entry => entry[1])];
        """,
    )


def assert_hparams(
    browser: WebDriver, url: str, texts: Sequence[str], rows: int | None = None, seconds: float = SECONDS
) -> list[list[str]]:
    """The hparams tab's table has each text in a cell of its own, head included, and so many rows; the table.

    TensorBoard writes 64 as 64.000 and 0.5 as 0.50000; a name is matched whole.
    """
    table: list[list[str]] = []

    def missing() -> list[str]:
        table[:] = hparams_table(browser)
        cells = {cell for row in table for cell in row}
        lacking = [f"{text}: in no cell; there are {sorted(cells)}" for text in texts if text not in cells]
        if rows is not None and len(table) - 1 != rows:
            lacking.append(f"{len(table) - 1} rows, not {rows}")
        return lacking

    _see(browser, url, "hparams", missing, seconds)
    return table


def assert_text(browser: WebDriver, url: str, texts: Sequence[str], seconds: float = SECONDS, select: str = "") -> str:
    """The text tab displays each of these, as rendered; all that it displays."""
    there = ""

    def missing() -> list[str]:
        nonlocal there
        there = visible_text(browser, "tf-text-loader")
        return [f"{text!r}: not displayed" for text in texts if text not in there]

    _see(browser, url, "text", missing, seconds, select=select)
    return there
