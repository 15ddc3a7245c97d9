"""Laws of the documentation: links and anchors resolve, every page is reachable, every command in a fenced block parses."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import VERBS
from launch._compose.arguments import split_flags
from launch._compose.cli import composed, register, typed
from launch._compose.grid import expand, grid_of, plan

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
INDEX = ROOT / "docs" / "README.md"
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "slurm").rglob("README.md"),
    ]
)
LINK = re.compile(r"\[[^\]\[]*\]\(([^()\s]+)\)")
SHELL = ("bash", "sh", "shell", "console")


def where(page: Path, line: int) -> str:
    return f"{page.relative_to(ROOT)}:{line}"


def blocks(page: Path) -> Iterator[tuple[str, int, list[str]]]:
    """Language, number of the first line, and lines of each fenced block."""
    language, first, lines = None, 0, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif language is None:
            language, first, lines = line[3:].strip(), number + 1, []
        else:
            yield language, first, lines
            language = None
    assert language is None, f"{where(page, first)}: a fenced block does not end"


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines outside of fenced blocks."""
    fenced = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line


def links(page: Path) -> Iterator[tuple[int, str]]:
    for number, line in prose(page):
        for target in LINK.findall(re.sub(r"`[^`]*`", "", line)):
            yield number, target


def anchors(page: Path) -> set[str]:
    """Names that GitHub gives to the headings of a page."""
    headings = (line.lstrip("#").strip() for _, line in prose(page) if re.match(r"#+ ", line))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    for number, target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists():
            yield f"{where(page, number)}: {target}: no such file"
        elif anchor and anchor not in anchors(file):
            yield f"{where(page, number)}: {target}: no such heading"


def test_every_relative_link_and_anchor_resolves() -> None:
    assert [problem for page in PAGES for problem in broken_links(page)] == []


def test_a_broken_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# A *fine* title\n[a](#a-fine-title) [b](#none)\n```bash\n[c](no.md)\n```\n[d](no.md)\n")
    assert list(broken_links(page)) == [
        "page.md:2: #none: no such heading",
        "page.md:6: no.md: no such file",
    ]


def test_every_page_of_docs_is_reachable_from_the_index() -> None:
    found, new = set(), {INDEX}
    while new:
        page = new.pop()
        found.add(page)
        targets = {(page.parent / target.partition("#")[0]).resolve() for _, target in links(page)}
        new |= {t for t in targets if t.suffix == ".md" and t.is_relative_to(INDEX.parent)} - found
    assert sorted(set((ROOT / "docs").rglob("*.md")) - found) == []


def test_readme_is_short_and_links_to_the_rest() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert [number for number, line in enumerate(lines, 1) if len(line) > 120] == []
    assert len({target for _, target in links(README)}) >= 15


def test_python_blocks_compile() -> None:
    for page in PAGES:
        for language, first, lines in blocks(page):
            if language == "python":
                ast.parse("\n".join(lines), where(page, first))


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Place and words of each command in the shell blocks of a page, continued lines joined."""
    for language, first, lines in blocks(page):
        if language not in SHELL:
            continue
        text = ""
        for number, line in enumerate(lines, first):
            text += line
            if text.endswith("\\"):
                text = text[:-1]
                continue
            words, text = shlex.split(text, comments=True), ""
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # environment variables
                words.pop(0)
            if words:
                yield where(page, number), words


def verb_and_words(words: list[str]) -> tuple[str, list[str]] | None:
    """Verb and arguments of ``c2g``, ``python -m launch`` and ``torchrun``; None for other programs."""
    if words[0] == "c2g":
        return words[1], words[2:]
    module = next((i for i, word in enumerate(words) if i and words[i - 1] == "-m" and word.startswith("launch")), None)
    if module is None:
        return None
    if words[module] == "launch":
        return words[module + 1], words[module + 2 :]
    return words[module].removeprefix("launch."), words[module + 1 :]


def parse_verb(verb: str, words: list[str]) -> None:
    """Compose the verb's settings as its own ``main`` would, and check them; a sweep's grid is expanded into tasks.

    Raises:
        SystemExit: The verb refuses a word.
        Exception: The verb does not exist, or its settings do not compose.
    """
    if verb not in VERBS:
        raise LookupError(f"there is no verb {verb!r}")
    module = importlib.import_module(f"launch.{verb}")

    def check(name: str, schema: type, main: Any, groups: Any = None, overrides: list[str] | None = None) -> None:
        register(name, schema, groups or {})
        given, flags = split_flags(sys.argv[1:] if overrides is None else overrides)
        config = composed(name, given)
        if "--help" in flags:  # needs no mandatory field
            return
        config = typed(config, schema)
        if isinstance(main, functools.partial) and main.keywords.get("grid") is not None and not config.extend:
            plan(config.study, expand(grid_of(config.study, main.keywords["grid"])))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["c2g", *words])
        patch.setattr(module, "run_verb", check)
        module.main()


def problem_of(words: list[str]) -> str:
    """The reason why a command does not parse; empty if it does, or if it is a program that is not ours."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return ", ".join(w for w in words[1:] if "=" not in w and w not in targets)
    found = verb_and_words(words)
    if found is None:
        return ""
    try:
        parse_verb(*found)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__} {error}".splitlines()[0]
    return ""


def test_every_command_in_a_fenced_block_parses(capsys: pytest.CaptureFixture[str]) -> None:
    found = [(place, words) for page in PAGES for place, words in commands(page)]
    assert sum(verb_and_words(words) is not None for _, words in found) >= 30
    problems = [
        f"{place}: {shlex.join(words)}: {problem} {capsys.readouterr().err.strip()}"
        for place, words in found
        if (problem := problem_of(words))
    ]
    assert problems == []


@pytest.mark.parametrize(
    "command",
    [
        "c2g trian steps=3",
        "c2g train classifier=c run_dir=r step=3",
        "python -m launch.sample out=x.png",
        "make demonstration",
    ],
)
def test_a_wrong_command_is_found(command: str) -> None:
    assert problem_of(command.split())


def test_every_verb_named_in_the_text_exists() -> None:
    named = {
        (verb, where(page, number))
        for page in PAGES
        for number, line in prose(page)
        for verb in re.findall(r"`c2g ([a-z]\w*)", line)
    }
    assert sorted(place for verb, place in named if verb not in VERBS) == []


def test_every_source_file_named_in_the_text_exists() -> None:
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]
    named = {
        (path, where(page, number))
        for page in pages
        for number, line in enumerate(page.read_text().splitlines(), 1)
        for path in re.findall(r"(?<![\w/.])((?:\w+/)+\w+\.py)\b", line)
    }
    roots = (ROOT, ROOT / "hpc_c2g")
    assert sorted(f"{place}: {path}" for path, place in named if not any((r / path).exists() for r in roots)) == []
