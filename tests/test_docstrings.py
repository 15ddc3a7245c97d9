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
ENTRY = re.compile(
    r"\w+: (of|in|on|at|by|to|from|with|as|that|which|who|whose|what|when|where|how|its|their|it|they|Of|What|[Ww]hether)\b"
)
"""An entry of ``Args:`` or ``Attributes:`` whose description begins with a preposition, a pronoun or a question word."""
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


def fragment_entries(source: str) -> list[str]:
    """Entries under ``Args:`` and ``Attributes:`` in the docstrings of classes and functions that match ``ENTRY``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        text = ast.get_docstring(node) if isinstance(node, ast.ClassDef | ast.FunctionDef) else None
        for section in re.findall(r"^(?:Args|Attributes):\n((?: {4}.*\n?|\n)*)", text or "", re.MULTILINE):
            found += [line.strip() for line in section.splitlines() if ENTRY.match(line.removeprefix("    "))]
    return found


def idioms(source: str) -> list[int]:
    """Lines of each use of a word of ``IDIOM`` in a name, a comment or a string."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.start[0] for token in tokens if token.type in WORDED for _ in IDIOM.finditer(token.string)]


def test_fragments_are_found_in_every_kind_of_docstring() -> None:
    source = '"""What it does."""\nX = 1\n"""Of X."""\nclass A:\n    """Whether A."""\n    def f(self):\n        """Of f."""\n'
    assert sorted(fragments(source)) == [1, 3, 5, 7]
    assert fragments('"""A module."""\ndef f():\n    """Return what it is."""\n    x = "Of x"\n') == []


def test_fragments_are_found_among_the_entries_of_arguments() -> None:
    source = '''
def f():
    """F.

    Args:
        a: of b.
        b: At least
            c: of c.

    Raises:
        E: in x.
    """
class A:
    """A.

    Note: in text.

    Attributes:
        d: Whether e.
        e: int32, of f.
    """
'''
    assert fragment_entries(source) == ["a: of b.", "d: Whether e."]


def test_idiom_is_found_in_names_comments_and_strings() -> None:
    source = "told = 1  # tells\nx = f'{told} mends'\ndef _told(): pass\nintel = 'amend, retold, mending'\n"
    assert idioms(source) == [1, 1, 2, 2, 3]


def test_docstrings_are_whole_phrases() -> None:
    offenders = [f"{file.relative_to(ROOT)}:{line}" for file in SOURCES for line in fragments(file.read_text())]
    assert offenders == []


def test_entries_of_arguments_are_noun_phrases() -> None:
    offenders = [
        f"{file.relative_to(ROOT)}: {entry}" for file in SOURCES for entry in fragment_entries(file.read_text())
    ]
    assert offenders == []


def test_private_idiom_is_rare() -> None:
    offenders = [f"{file.relative_to(ROOT)}:{line}" for file in SOURCES for line in idioms(file.read_text())]
    assert len(offenders) <= MOST, offenders
