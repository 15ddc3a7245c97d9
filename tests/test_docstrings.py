"""Laws of the language: docstrings are whole phrases, and private idiom stays out of names, comments and strings."""

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = sorted(file for package in ("hpc_c2g", "launch") for file in (ROOT / package).rglob("*.py"))
FRAGMENTS = ("Of ", "What ", "Whether ")
"""A docstring that begins so is no phrase of its own."""
IDIOM = re.compile(r"(?<![a-z])(tell|tells|told|mend|mends|mended)(?![a-z])", re.IGNORECASE)
MOST = 9
WORDED = {tokenize.NAME, tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}


def fragments(source: str) -> list[int]:
    """Lines whose docstring, or string below an assignment, begins like a fragment."""
    found = []
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value.startswith(FRAGMENTS):
                found.append(statement.lineno)
    return found


def idioms(source: str) -> list[int]:
    """Lines of each use of a word of ``IDIOM`` in a name, a comment or a string."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.start[0] for token in tokens if token.type in WORDED for _ in IDIOM.finditer(token.string)]


def test_fragments_are_found_in_every_kind_of_docstring() -> None:
    source = '"""What it does."""\nX = 1\n"""Of X."""\nclass A:\n    """Whether A."""\n    def f(self):\n        """Of f."""\n'
    assert sorted(fragments(source)) == [1, 3, 5, 7]
    assert fragments('"""A module."""\ndef f():\n    """Return what it is."""\n    x = "Of x"\n') == []


def test_idiom_is_found_in_names_comments_and_strings() -> None:
    source = "told = 1  # tells\nx = f'{told} mends'\ndef _told(): pass\nintel = 'amend, retold, mending'\n"
    assert idioms(source) == [1, 1, 2, 2, 3]


def test_docstrings_are_whole_phrases() -> None:
    offenders = [f"{file.relative_to(ROOT)}:{line}" for file in SOURCES for line in fragments(file.read_text())]
    assert offenders == []


def test_private_idiom_is_rare() -> None:
    offenders = [f"{file.relative_to(ROOT)}:{line}" for file in SOURCES for line in idioms(file.read_text())]
    assert len(offenders) <= MOST, offenders
