"""Laws of the command line's short forms: flags and words become Hydra's field=value, and values arrive as they were typed."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from hpc_c2g.errors import UserError
from launch._compose.arguments import as_overrides, quoted, split_grid


@dataclass
class Settings:
    study_dir: str = "???"
    only: str = ""
    dry_run: bool = False
    watch: float = 0.0
    cluster: str = ""
    run: list[str] = field(default_factory=list)


def test_flags_and_words_become_fields():
    argv = ["DIR", "--dry-run", "--only", "failed", "--watch=3", "--cfg", "job", "a1", "b2", "x.y=1"]
    assert as_overrides(argv, Settings, ["study_dir", "run"]) == [
        *("dry_run=true", "only=failed", "watch=3", "x.y=1", "study_dir=DIR", "run=[a1,b2]", "--cfg", "job"),
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--color"], "--color is unknown"),
        (["-x"], "-x is unknown"),
        (["--only"], "--only has no value"),
        (["a", "b"], "'b' is one word too many"),
    ],
)
def test_a_word_that_means_nothing_is_told(argv, message):
    with pytest.raises(UserError, match=message):
        as_overrides(argv, Settings, ["study_dir"])


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=30))
def test_a_value_arrives_as_it_was_typed(text):
    (override,) = OverridesParser.create().parse_overrides([f"field={quoted(text)}"])
    if quoted(text) == text:  # a plain word or number: Hydra types it, as on any command line
        assert override.input_line == f"field={text}"
    else:
        assert override.value() == text


def test_what_is_no_field_of_the_verb_is_the_grid_s():
    own, grid = split_grid(
        ["study_dir=s", "cluster=x", "profile.a=1", "seed=0,1", "dry_run=true", "+a.b=2", "--cfg", "job"], Settings
    )
    assert own == ["study_dir=s", "cluster.name=x", "+cluster.profile.a=1", "dry_run=true", "--cfg", "job"]
    assert grid == ["seed=0,1", "+a.b=2"]
