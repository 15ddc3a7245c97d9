"""The browser that all tests in this folder share."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from selenium.webdriver.remote.webdriver import WebDriver

PAGE_SECONDS = 30  # a page that takes longer to load hangs


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    """A headless Chromium with a profile of its own, that keeps its console and its requests and finds no host but this one."""
    if importlib.util.find_spec("selenium") is None:
        pytest.skip("no selenium: pip install -e '.[dev]'")
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if not (driver and chromium):
        pytest.skip(f"no {'chromium' if driver else 'chromedriver'}: apt-get install chromium chromium-driver")
    with chrome(tmp_path_factory.mktemp("profile")) as found:
        yield found


@contextlib.contextmanager
def chrome(profile: Path) -> Iterator[WebDriver]:
    """A headless Chromium of one's own."""
    from selenium import webdriver

    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1600,1200",
        f"--user-data-dir={profile}",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-proxy-server",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        found.set_page_load_timeout(PAGE_SECONDS)
        found.set_script_timeout(PAGE_SECONDS)
        found.get("about:blank")  # away from the page for new tabs, which asks for much
        yield found
    finally:
        found.quit()
