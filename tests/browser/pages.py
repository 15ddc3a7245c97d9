"""What a browser shows: through shadow roots, in the console, on the wire; and a static page's faults.

Nothing here needs selenium when it is imported: where there is none, the fixture ``browser`` skips the test.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from selenium.webdriver.remote.webdriver import WebDriver
    from selenium.webdriver.remote.webelement import WebElement

T = TypeVar("T")

SCRIPTS = """
function deep(css, root = document) {
  const found = [...root.querySelectorAll(css)];
  for (const e of root.querySelectorAll('*')) if (e.shadowRoot) found.push(...deep(css, e.shadowRoot));
  return found;
}
function shown(e) {
  const box = e.getBoundingClientRect();
  return box.width > 0 && box.height > 0 && e.checkVisibility({visibilityProperty: true, opacityProperty: true});
}
function text(node) {  // as the eye reads it: slots hold what is put into them, what is hidden is left out
  if (node.nodeType === Node.TEXT_NODE) {
    const parent = node.parentElement;
    return parent && getComputedStyle(parent).visibility !== 'visible' ? '' : node.textContent.replace(/\\s+/g, ' ');
  }
  if (node.nodeType === Node.ELEMENT_NODE) {
    const style = getComputedStyle(node);
    if (style.display === 'none' || ['STYLE', 'SCRIPT', 'TEMPLATE', 'NOSCRIPT'].includes(node.tagName)) return '';
    let inner = node.shadowRoot ? [node.shadowRoot] : [...node.childNodes];
    if (node.tagName === 'SLOT' && node.assignedNodes().length) inner = node.assignedNodes();
    const line = style.display === 'inline' || style.display === 'contents' ? '' : '\\n';
    return line + inner.map(text).join('') + line;
  }
  return [...node.childNodes].map(text).join('');
}
"""


def run(browser: WebDriver, script: str, *arguments: Any) -> Any:
    """What this script returns; it has ``deep``, ``shown`` and ``text``."""
    return browser.execute_script(SCRIPTS + script, *arguments)


def deep(browser: WebDriver, css: str) -> list[WebElement]:
    """The elements that match, also those within shadow roots, which ``find_elements`` does not see."""
    return run(browser, "return deep(arguments[0])", css)


def visible_text(browser: WebDriver, css: str = "body") -> str:
    """The text that is displayed in these elements, through shadow roots; a line per block, no empty ones."""
    texts = run(browser, "return deep(arguments[0]).filter(shown).map(text)", css)
    lines = (re.sub(r"\s+", " ", line).strip() for line in "\n".join(texts).splitlines())
    return "\n".join(line for line in lines if line)


def shown_images(browser: WebDriver) -> int:
    """How many images are in the page, loaded and visible (also those one has to scroll to)."""
    return run(browser, "return deep('img').filter(i => i.complete && i.naturalWidth > 0 && shown(i)).length")


def console_errors(browser: WebDriver) -> list[str]:
    """The errors in the console since it was last read.

    There are no exceptions: TensorBoard brings its fonts and its icon along, and our pages are whole in one file.
    """
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def requests(browser: WebDriver) -> list[str]:
    """The addresses that pages asked for since this was last read, whether or not anything answered."""
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def screenshot(browser: WebDriver, path: Path) -> None:
    """What is displayed, as PNG; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(str(path)), path


def wait_until(condition: Callable[[], T], seconds: float, what: str) -> T:
    """The first true answer."""
    end = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)
    return answer


def page_faults(browser: WebDriver, url: str) -> list[str]:
    """What is wrong with a static page: it must be whole in its file, and readable without eyes."""
    console_errors(browser), requests(browser)  # what earlier pages left
    browser.get(url)
    run(browser, "for (const image of document.images) image.loading = 'eager'")
    wait_until(lambda: run(browser, "return [...document.images].every(i => i.complete)"), 10, f"images of {url}")
    faults = [f"console: {error}" for error in console_errors(browser)]
    own = url.partition("#")[0]
    asked = (address for address in requests(browser) if address.partition("#")[0] != own)
    faults += [f"request: {address[:200]}" for address in asked if not address.startswith("data:")]
    faults += run(
        browser,
        """
        const faults = [], start = e => e.outerHTML.slice(0, 120);
        if (!document.documentElement.lang.trim()) faults.push('html has no lang');
        if (!document.title.trim()) faults.push('no title');
        for (const image of document.images) {
          if (!image.naturalWidth) faults.push('image does not load: ' + start(image));
          if (!(image.alt || '').trim()) faults.push('image without alt: ' + start(image));
        }
        let last = 0;
        for (const h of document.querySelectorAll('h1, h2, h3, h4, h5, h6')) {
          const level = Number(h.tagName[1]);
          if (level > last + 1) faults.push(`heading h${level} after h${last}: ` + h.textContent.trim());
          last = level;
        }
        if (!last) faults.push('no heading');
        return faults;
        """,
    )
    # Chrome's own computation of the name: aria-labeledby, aria-label, title
    for figure in run(
        browser, "return deep('svg').filter(s => !s.parentElement.closest('svg') && s.ariaHidden !== 'true')"
    ):
        if figure.get_dom_attribute("role") != "img":
            faults.append(f"svg without role=img: {figure.get_attribute('outerHTML')[:120]}")
        if not (figure.accessible_name or "").strip():
            faults.append(f"svg without a name: {figure.get_attribute('outerHTML')[:120]}")
    return faults


def assert_page_clean(browser: WebDriver, file_url: str) -> None:
    """Open the page: no error in the console, no request to anything but itself, all images shown and named, headings in order."""
    faults = page_faults(browser, file_url)
    assert not faults, "\n".join([file_url, *faults])


def sort_by(browser: WebDriver, table_css: str, column: str) -> list[str]:
    """Click this header (its button, if it has one) of a table; the column's texts from top to bottom afterwards."""
    (table,) = deep(browser, table_css)
    name = "const name = e => e.innerText.replace(/[▲▼△▽▴▾↑↓↕⇅]/g, '').trim();"
    find = name + "return [...arguments[0].tHead.querySelectorAll('th')].find(e => name(e) === arguments[1])"
    header = run(browser, find, table, column)
    assert header is not None, f"{table_css} has no column {column!r}"
    run(browser, "return arguments[0].querySelector('button, a') || arguments[0]", header).click()
    cells = "return [...arguments[0].tBodies].flatMap(b => [...b.rows]).map(r => r.cells[arguments[1].cellIndex].innerText.trim())"
    return run(browser, cells, table, header)
