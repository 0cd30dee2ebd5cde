"""Caption and phrase cleaning against the golden cases and the rules of the specification."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.data.text import clean_caption, clean_phrase

CASES = json.loads((Path(__file__).parents[1] / "golden/dynrefer/text.json").read_text(encoding="utf-8"))[
    "caption_clean"
]


@pytest.mark.parametrize("case", CASES)
def test_clean_caption_golden(case: dict[str, str]) -> None:
    assert clean_caption(case["in"]) == case["out"]


@given(st.text())
def test_clean_caption_is_idempotent_and_short(text: str) -> None:
    once = clean_caption(text)
    assert len(once.split(" ")) <= 50
    assert not set(once) & set('.!"()*#:;~')
    assert clean_caption(once) == once


@pytest.mark.parametrize(
    ("phrase", "cleaned"),
    [
        ("The CLOCK is Green.", "the clock is green"),
        ("½ a café", "half a cafe"),
        ("façade™ of a crème brûlée…", "facade of a creme brulee"),
        ("20° — half-open man's hat", "20 degree  halfopen mans hat"),
        ("50¢", "50cent"),
    ],
)
def test_clean_phrase(phrase: str, cleaned: str) -> None:
    assert clean_phrase(phrase) == cleaned
