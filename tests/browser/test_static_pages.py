"""Laws of the looking at static pages: a clean page passes, and each fault alone is told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pages import assert_page_clean, console_errors, deep, page_faults, shown_images, sort_by, visible_text, wait_until

if TYPE_CHECKING:
    from selenium.webdriver.remote.webdriver import WebDriver

pytestmark = pytest.mark.browser

DOT = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
CLEAN = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>report</title></head><body>
<h1>Report</h1><h2>Curves</h2>
<svg role="img" aria-label="residual over steps" width="40" height="20"><path d="M0,0L40,20"/></svg>
<svg role="img" width="40" height="20"><title>margins</title><path d="M0,0L40,20"/></svg>
<svg aria-hidden="true" width="9" height="9"></svg>
<h3>Samples</h3><div style="height: 5000px"></div><img src="{DOT}" alt="samples of seed 0" loading="lazy" width="9" height="9">
<h2>Table</h2>
<table id="points"><thead><tr><th>name</th><th><button>residual <span>▲</span></button></th></tr></thead><tbody>
<tr><td>a</td><td>0.3</td></tr><tr><td>b</td><td>0.1</td></tr><tr><td>c</td><td>0.2</td></tr></tbody></table>
<script>
document.querySelector("#points button").addEventListener("click", event => {{
  const body = document.querySelector("#points tbody");
  body.append(...[...body.rows].sort((r, s) => r.cells[1].textContent - s.cells[1].textContent));
}});
</script>
</body></html>"""


def page(folder: Path, html: str) -> str:
    path = folder / "index.html"
    path.write_text(html)
    return path.as_uri()


def test_a_whole_readable_page_is_clean(browser: WebDriver, tmp_path: Path) -> None:
    url = page(tmp_path, CLEAN)
    assert_page_clean(browser, url)
    assert_page_clean(browser, url + "#points")
    assert shown_images(browser) == 1


@pytest.mark.parametrize(
    ("right", "wrong", "complaints"),
    [
        (' lang="en"', "", ["html has no lang"]),
        ("<title>report</title>", "", ["no title"]),
        ("<h2>Curves</h2>", "", ["heading h3 after h1: Samples"]),
        ("<h1>Report</h1>", "", ["heading h2 after h0: Curves"]),
        ('alt="samples of seed 0"', "", ["image without alt"]),
        ('alt="samples of seed 0"', 'alt=" "', ["image without alt"]),
        (DOT, "data:image/gif;base64,R0lG", ["image does not load"]),
        (DOT, "absent.png", ["console: .*absent.png", "request: .*absent.png", "image does not load"]),
        ('role="img" aria-label', "aria-label", ["svg without role=img"]),
        ('aria-label="residual over steps"', "", ["svg without a name"]),
        ("<title>margins</title>", "", ["svg without a name"]),
        ("<script>", "<script>nothing.there;", ["console: .*nothing is not defined"]),
        ("<script>", "<script>console.error('oh');", ["console: .*oh"]),
        ("</head>", '<link rel="stylesheet" href="http://example.org/a.css"></head>', ["console", "request: .*a.css"]),
        ("<h1>", "<style>h1 { background: url(https://example.org/b.png) }</style><h1>", ["console", "request: .*b.p"]),
        ("<script>", "<script>fetch('http://example.org/c').catch(() => 0);", ["console", "request: .*org/c"]),
    ],
)
def test_each_fault_alone_is_told(
    browser: WebDriver, tmp_path: Path, right: str, wrong: str, complaints: list[str]
) -> None:
    assert right in CLEAN
    faults = page_faults(browser, page(tmp_path, CLEAN.replace(right, wrong, 1)))
    assert len(faults) == len(complaints), faults
    assert all(re.match(complaint, fault) for complaint, fault in zip(complaints, faults, strict=True)), faults
    with pytest.raises(AssertionError, match=re.escape(faults[0])):
        assert_page_clean(browser, page(tmp_path, CLEAN.replace(right, wrong, 1)))


def test_the_faults_of_one_page_are_not_told_of_the_next(browser: WebDriver, tmp_path: Path) -> None:
    browser.get(page(tmp_path, CLEAN.replace(DOT, "absent.png").replace("<script>", "<script>nothing.there;")))
    assert_page_clean(browser, page(tmp_path, CLEAN))
    assert console_errors(browser) == []


def test_sorting_returns_the_column_as_sorted(browser: WebDriver, tmp_path: Path) -> None:
    browser.get(page(tmp_path, CLEAN))
    assert sort_by(browser, "#points", "name") == ["a", "b", "c"]  # a head that does nothing
    assert sort_by(browser, "#points", "residual") == ["0.1", "0.2", "0.3"]
    assert sort_by(browser, "#points", "name") == ["b", "c", "a"]
    with pytest.raises(AssertionError, match="no column 'loss'"):
        sort_by(browser, "#points", "loss")


def test_shadow_roots_are_seen_through_and_what_is_hidden_is_not_text(browser: WebDriver, tmp_path: Path) -> None:
    inside = '<b class="deep">inside</b> <slot></slot> <i style="display: none">never</i> <style>i {}</style>'
    url = page(
        tmp_path,
        f"""<div id="host"><span>in the slot</span></div><p style="visibility: hidden">nor this</p>
        <img src="{DOT}" width="9" height="9" style="display: none"><img src="absent.png" width="9" height="9">
        <script>
        const root = document.querySelector("#host").attachShadow({{mode: "open"}});
        root.innerHTML = `{inside}<img src="{DOT}" width="9" height="9">`;
        </script>""",
    )
    browser.get(url)
    assert browser.find_elements("css selector", ".deep") == []
    (found,) = deep(browser, ".deep")
    assert found.text == "inside"
    assert visible_text(browser) == "inside in the slot"
    assert visible_text(browser, ".deep") == "inside"
    assert shown_images(browser) == 1


def test_waiting_returns_the_first_true_answer_and_tells_what_did_not_come() -> None:
    answers = iter([0, "", 7])
    assert wait_until(lambda: next(answers), 5, "seven") == 7
    with pytest.raises(AssertionError, match=r"not within 0\.2 s: rain"):
        wait_until(lambda: None, 0.2, "rain")
