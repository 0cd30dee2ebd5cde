from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.metrics.vqa import (
    anls,
    circular_accuracy,
    edit_distance,
    exact_match,
    extract_letters,
    normalise_answer,
    normalised_match,
    vqa_accuracy,
)


def test_edit_distance_by_hand() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3
    assert edit_distance("flaw", "lawn") == 2


@given(st.text("abc", max_size=8), st.text("abc", max_size=8), st.text("abc", max_size=8))
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


def test_anls_by_hand() -> None:
    # Distances of cleaned texts over the length of the raw ones: one letter of "the  box" (8 characters).
    assert anls("the fox", ["the  box"]) == pytest.approx(1 - 1 / 8)
    assert anls("ab", ["abcd", "abc"]) == pytest.approx(1 - 1 / 3)
    assert anls("a", ["abc"]) == 0  # a similarity of 1/3 is below one half
    assert anls("ab", ["abcd"]) == 0.5
    assert anls("", [""]) == 1


def test_soft_accuracy_by_hand() -> None:
    three = ["yes"] * 3 + ["no"] * 7
    # "yes": of the three who say so two others do (2/3), of the seven all three (1).
    assert vqa_accuracy("Yes.", three) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy("maybe", three) == 0
    assert vqa_accuracy("no", three) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Two dogs", "2 dogs"),
        ("c/b", "c b"),
        ("c / b", "c b"),
        ("an a/b", "b"),
        ("3.5 metres.", "3.5 metres"),
        ("1,000", "1000"),
        ("cant", "can't"),
        ("it's", "it 's"),
        ("none\nleft", "0 left"),
        ("(red)", "red"),
        ("x-y", "x y"),
        ("well -known", "well known"),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


def test_matches_by_hand() -> None:
    assert exact_match(" Dog.", ["cat", "dog"])
    assert not exact_match("a dog", ["dog"])
    assert normalised_match("A dog!", ["cat", "dog"])
    assert normalised_match("two", ["2"])
    assert not normalised_match("dogs", ["dog"])
    with pytest.raises(InputError, match="no reference answer"):
        exact_match("dog", [])


def test_letters() -> None:
    assert [extract_letters(text) for text in ("Both", "AB", "E", "the answer is C", "")] == ["B", "AB", "", "C", ""]
    robust = {"Both": "", "The answer is E.": "E", "(B) a dog": "B", "A dog or B": "A", "option: c": "C", "": ""}
    assert {text: extract_letters(text, rule="robust") for text in robust} == robust
    assert extract_letters("I think B", rule="robust", options="ABCD") == "B"
    assert extract_letters("Option I, or E", rule="robust", options="ABCD") == ""
    with pytest.raises(InputError, match="no rule 'lax'"):
        extract_letters("A", rule="lax")


def test_circular_rows_must_all_be_right() -> None:
    indices = [7, 1_000_007, 2_000_007, 8, 1_000_008, 9]
    result = circular_accuracy(indices, [True, True, True, True, False, True], ["a", "-", "-", "b", "-", "b"])
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.per_category == {"a": 1.0, "b": 0.5}
    assert result.count == 3
    with pytest.raises(InputError, match="question 5 has rows, but none with an index below"):
        circular_accuracy([1_000_005], [True])


def test_bad_input() -> None:
    with pytest.raises(InputError, match="no reference answer"):
        anls("a", [])
    with pytest.raises(InputError):
        vqa_accuracy("a", "abc")
    with pytest.raises(InputError):
        vqa_accuracy(3, ["a"])  # pyright: ignore[reportArgumentType]
