import base64
import io
import itertools
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from PIL import Image

from hpc_c2g.reporting.drawing import Figure
from hpc_c2g.reporting.page import Page, Picture, Recipe, Table, render

VOID = {"meta", "img", "br", "link", "input", "hr"}
HOSTILE = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)> a$b_{ {{ 7*7 }} &amp; 長い " + "y" * 300


class Tree(HTMLParser):
    """Every element with its attributes, text and ancestors; an end tag that fits no start tag fails."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "above": [e["tag"] for e in self.open]}
        assert len(attrs) == len(dict(attrs))
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, *tags):
        return [e for e in self.elements if e["tag"] in tags]


def png():
    out = io.BytesIO()
    Image.new("L", (8, 8)).save(out, "PNG")
    return out.getvalue()


def page(text="plain", rows=3):
    svg = f'<svg xmlns="http://www.w3.org/2000/svg"><!-- {text.replace("<", "").replace("-", "")} --></svg>'
    table = Table(
        text, text, [text, "value", "other"], [[text, (f"{k} ± 1", k), None] for k in range(rows)], [False, True, True]
    )
    return Page(
        title=text,
        about=text,
        generated=text,
        states={text: {"done": 3, "failed": 1}, "evaluate": {"done": 2, text: 2}},
        notes=[text],
        tables=[table, table],
        figures=[Figure("a", text, f"{text} 0.44", lambda kind: svg.encode())] * 2,
        mosaics=[Picture(text, text, png())],
        alarms=Table("Alarms", text, ["run", "what"], [["a", text]]),
        recipes=[Recipe(text, text, ["c2g classifier", f"c2g train {text}"])],
        versions={text: text},
    )


PAGES = {"plain": page(), "hostile": page(HOSTILE), "empty": Page("a study"), "one note": Page("s", notes=["n"])}


@pytest.fixture(params=PAGES, scope="module")
def tree(request):
    return Tree(render(PAGES[request.param]))


def test_the_page_is_a_document_with_one_heading_of_each_rank_in_order(tree):
    (html,) = tree.all("html")
    assert html["attrs"]["lang"] == "en"
    assert len(tree.all("h1")) == len(tree.all("main")) == len(tree.all("title")) == 1
    ranks = [int(e["tag"][1]) for e in tree.all("h1", "h2", "h3", "h4")]
    assert ranks[0] == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(ranks))


def test_ids_are_there_once_and_every_reference_finds_its_own(tree):
    ids = [e["attrs"]["id"] for e in tree.elements if "id" in e["attrs"]]
    assert len(ids) == len(set(ids))
    named = [e["attrs"][k] for e in tree.elements for k in ("aria-labeledby",) if k in e["attrs"]]
    assert set(named) | {a["attrs"]["href"][1:] for a in tree.all("a")} <= set(ids)
    first = next(e for e in tree.elements if e["above"][-1:] == ["body"])
    assert (first["tag"], first["attrs"]["href"]) == ("a", "#main")


def test_nothing_is_fetched_from_anywhere(tree):
    assert not tree.all("link", "iframe", "object", "embed", "base", "form", "svg")
    for element in tree.elements:
        for name in ("src", "href", "data", "action", "srcset", "poster", "style"):
            address = element["attrs"].get(name, "#")
            assert address.startswith(("#", "data:image/svg+xml;base64,", "data:image/png;base64,"))
        assert not [name for name in element["attrs"] if name.startswith("on")]
    (style,), (script,) = tree.all("style"), tree.all("script")
    assert not re.search(r"url\(|@import|https?:", style["text"])
    assert not re.search(r"https?:|fetch|eval|innerHTML|import", script["text"])
    policy = next(e["attrs"] for e in tree.all("meta") if "http-equiv" in e["attrs"])
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"].startswith("default-src 'none'; img-src data:;")


def test_every_picture_has_words_and_is_whole(tree):
    for image in tree.all("img"):
        assert image["attrs"]["alt"]
        kind, _, content = image["attrs"]["src"].partition(";base64,")
        raw = base64.b64decode(content, validate=True)
        if kind.endswith("png"):
            Image.open(io.BytesIO(raw)).verify()
        else:
            ElementTree.fromstring(raw)


def test_every_table_can_be_sorted_and_read_aloud(tree):
    tables = tree.all("table")
    assert len(tree.all("caption")) == len(tables)
    assert all(e["text"].strip() for e in tree.all("caption"))
    heads = [e for e in tree.all("th") if "thead" in e["above"]]
    assert all(e["attrs"]["scope"] == "col" and e["attrs"]["aria-sort"] == "none" for e in heads)
    assert [e["above"][-1] for e in tree.all("button")] == ["th"] * len(heads)
    assert all(e["attrs"]["scope"] == "row" for e in tree.all("th") if "tbody" in e["above"])
    assert all("data-key" in e["attrs"] for e in tree.all("td"))


def test_a_hostile_label_is_shown_and_does_nothing():
    plain, hostile = Tree(render(PAGES["plain"])), Tree(render(PAGES["hostile"]))
    assert [e["tag"] for e in plain.elements] == [e["tag"] for e in hostile.elements]
    assert len(hostile.all("script")) == 1
    shown = [e for e in hostile.elements if HOSTILE in e["text"]]
    assert {"h1", "caption", "th", "pre", "summary", "figcaption", "li", "dt", "dd", "title"} <= {
        e["tag"] for e in shown
    }


def test_empty_sections_are_left_out():
    assert not Tree(render(PAGES["empty"])).all("h2", "table", "img", "nav", "section")
    assert [e["text"] for e in Tree(render(PAGES["one note"])).all("h2")] == ["Notes"]
    assert not Tree(render(Page("s", alarms=Table("Alarms", "none", ["run"], [])))).all("table")


def test_states_are_counted_in_a_row_per_stage():
    rows = [e["text"].split() for e in Tree(render(PAGES["plain"])).all("tr")][:3]
    assert rows == [
        ["stage", "done", "failed", "plain", "all"],
        ["plain", "3", "1", "0", "4"],
        ["evaluate", "2", "0", "2", "4"],
    ]


@pytest.mark.parametrize(
    ("cell", "shown", "key"),
    [
        (0.123456, "0.1235", "0.123456"),
        (7, "7", "7"),
        (("0.4 ± 0.1", 0.4), "0.4 ± 0.1", "0.4"),
        (("best", None), "best", ""),
        (None, "–", ""),
        (float("nan"), "–", ""),
        (float("-inf"), "-inf", "-Infinity"),
        ("text", "text", "text"),
    ],
)
def test_a_cell_shows_its_text_and_sorts_by_its_key(cell, shown, key):
    (td,) = Tree(render(Page("s", tables=[Table("t", "c", ["a", "b"], [["r", cell]])]))).all("td")
    assert (td["text"], td["attrs"]["data-key"]) == (shown, key)


def test_a_table_with_ragged_rows_is_refused():
    with pytest.raises(ValueError, match="columns"):
        Table("t", "c", ["a", "b"], [["x"]])
    with pytest.raises(ValueError, match="columns"):
        Table("t", "c", ["a", "b"], [], [True])


def test_the_same_content_gives_the_same_text_and_half_a_surrogate_can_be_written():
    assert render(page()) == render(page())
    render(Page("\ud800")).encode()


def test_commands_keep_their_lines():
    assert Tree(render(PAGES["plain"])).all("pre")[0]["text"] == "c2g classifier\nc2g train plain"


def luminance(color):
    parts = [
        int(c, 16) / 255 for c in re.findall("..", color[1:] if len(color) == 7 else "".join(2 * c for c in color[1:]))
    ]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_all_text_stands_out_in_light_dark_and_print():
    palettes = re.findall(r":root \{(.*?)\}", render(PAGES["empty"]))
    assert len(palettes) == 3
    for palette in palettes:
        color = dict(re.findall(r"--(\w+): (#\w+)", palette))
        for ink in ("ink", "soft", "link", "warn"):
            for ground in ("paper", "shade"):
                low, high = sorted((luminance(color[ink]), luminance(color[ground])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chrome, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chrome or not driver:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


def test_in_a_browser_tables_sort_by_keyboard_and_stay_stable(browser, tmp_path):
    rows = [[f"r{k}", (f"{v} units", v), k % 2] for k, v in enumerate([10, 9, None, 100, -1, 9] * 100)]
    (tmp_path / "p.html").write_text(
        render(Page("s", tables=[Table("t", "c", ["a", "b", "c"], rows, [False, True, True])]))
    )
    browser.get(f"file://{tmp_path}/p.html")
    read = """return [...document.querySelectorAll("tbody tr")].map(r => [...r.cells].map(c => c.textContent))"""
    buttons, heads = (browser.find_elements("css selector", f"thead {what}") for what in ("button", "th"))
    for key, order in (("\ue007", "ascending"), (" ", "descending")):
        buttons[1].send_keys(key)
        assert [h.get_attribute("aria-sort") for h in heads] == ["none", order, "none"]
        known = sorted((r for r in rows if r[1][1] is not None), key=lambda r: r[1][1], reverse=order == "descending")
        expected = [*known, *(r for r in rows if r[1][1] is None)]
        assert [[a, b] for a, b, _ in browser.execute_script(read)] == [[a, b[0]] for a, b, _ in expected]
    buttons[0].send_keys("\ue007")
    assert [r[0] for r in browser.execute_script(read)] == [r[0] for r in rows]
    assert "Sorted by a, ascending" in browser.page_source


@pytest.mark.parametrize("name", PAGES)
def test_in_a_browser_a_narrow_page_scrolls_inside_and_breaks_no_policy(name, browser, tmp_path):
    (tmp_path / "p.html").write_text(render(PAGES[name]))
    screen = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(f"file://{tmp_path}/p.html")
    browser.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
    assert browser.execute_script("return [...document.images].every((i) => i.complete)")
    assert browser.get_log("browser") == []
