"""Words about objects: the whole canonical caption, what is left unsaid, articles, tags and negatives, and lists."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.world.grammar import attribute_words, captions, question, relation_clause, scene_caption, tags
from foveate.world.shapes import SHAPES
from foveate.world.vocabulary import (
    attribute_vocabulary,
    categories,
    category_names,
    colour_names,
    raw_vocabulary,
    relation_predicates,
    sizes,
    tag_vocabulary,
    undecided_words,
    unsaid_values,
)

CAR = {"colour": "red", "pattern": "striped", "finish": "shiny", "size": "small", "facing": "facing left"}


@st.composite
def described(draw: st.DrawFn) -> tuple[str, dict[str, str], str | None]:
    """A category, one value for each of its families (the size may be missing), and a word for a sign."""
    name = draw(st.sampled_from(category_names()))
    values = {family: draw(st.sampled_from(options)) for family, options in categories()[name].families.items()}
    if draw(st.booleans()):
        del values["size"]
    word = draw(st.sampled_from(raw_vocabulary()["sign_words"])) if categories()[name].has_text else None
    return name, values, word


def test_canonical_caption_says_everything_in_order() -> None:
    clause = relation_clause("to the right of", "green", "tree")
    assert clause == "to the right of a green tree"
    said = captions("car", CAR, None, clause)
    assert said == (
        "a small shiny striped red car facing left to the right of a green tree",
        "a red car with stripes to the right of a green tree",
        "a small car that is red to the right of a green tree",
    )


def test_default_values_go_unsaid() -> None:
    plain = {"colour": "blue", "pattern": "plain", "finish": "matte", "size": "medium", "facing": "facing right"}
    assert captions("bus", plain, None, "")[0] == "a blue bus facing right"
    assert unsaid_values() == {"plain", "matte", "medium"}


@pytest.mark.parametrize(
    ("category", "attributes", "text", "expected"),
    [
        ("umbrella", {"colour": "orange", "pattern": "plain", "openness": "open"}, None, "an orange open umbrella"),
        ("apple", {"colour": "green", "size": "large", "bite": "bitten"}, None, "a large green bitten apple"),
        ("dog", {"colour": "white", "finish": "furry", "pose": "lying"}, None, "a furry white dog lying"),
        ("sign", {"colour": "yellow", "size": "medium"}, "STOP", "a yellow sign that says stop"),
        ("elephant", {"colour": "orange"}, None, "an orange elephant"),
    ],
)
def test_hand_written_captions(category: str, attributes: dict[str, str], text: str | None, expected: str) -> None:
    assert captions(category, attributes, text, "")[0] == expected


@settings(max_examples=150, deadline=None)
@given(described(), st.sampled_from(relation_predicates()), st.sampled_from(colour_names()))
def test_captions_are_clean_and_say_only_what_holds(
    item: tuple[str, dict[str, str], str | None], predicate: str, other_colour: str
) -> None:
    name, attributes, text = item
    clause = relation_clause(predicate, other_colour, "umbrella")
    absent = set(attribute_vocabulary()) - set(attributes.values())
    for caption in captions(name, attributes, text, clause):
        assert re.fullmatch(r"[a-z]+( [a-z]+)*", caption)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption)
        assert caption.endswith(clause)
        subject = caption.removesuffix(clause).split(" that says ")[0]
        assert name in subject.split()
        assert attributes["colour"] in subject.split()
        assert not [word for word in absent if re.search(rf"\b{word}\b", subject)]
    canonical = captions(name, attributes, text, clause)[0]
    for value in set(attributes.values()) - unsaid_values():
        assert re.search(rf"\b{value}\b", canonical)


@settings(max_examples=100, deadline=None)
@given(described())
def test_negatives_are_the_other_values_of_its_families_and_what_it_never_has(
    item: tuple[str, dict[str, str], str | None],
) -> None:
    name, attributes, _ = item
    positive, negative = attribute_words(name, attributes)
    assert sorted(positive) == sorted(attributes.values())
    assert len(set(negative)) == len(negative)
    families = categories()[name].families
    of_its_families = {value for family in attributes for value in families[family]} - set(positive)
    of_no_family = set(attribute_vocabulary()) - {value for options in families.values() for value in options}
    assert of_its_families <= set(negative)
    assert set(negative) - of_its_families == of_no_family - unsaid_values() - undecided_words(name)


def test_what_a_thing_never_has_is_denied_and_what_is_open_is_not() -> None:
    attributes = {"colour": "red", "pattern": "plain", "finish": "matte"}  # a tiny car: no size, and no facing known
    positive, negative = attribute_words("car", attributes)
    assert positive == ("red", "plain", "matte")
    assert {"blue", "striped", "wooden", "furry", "sitting", "open"} <= set(negative)
    assert not {"small", "large", "facing left"} & set(negative)  # families of cars whose value is not known
    assert not {"lit", "empty"} & set(negative)  # not drawn, yet said of cars
    _, negative = attribute_words("cactus", {"colour": "green", "pattern": "plain", "finish": "matte"})
    assert {"closed", "lit", "bitten", "flying"} <= set(negative)
    assert not {"medium", "blooming", "standing"} & set(negative)


def test_tags_hold_the_object_and_what_it_relates_to() -> None:
    positive, _ = attribute_words("car", CAR)
    assert tags("car", positive, None) == ("car", "red", "striped", "shiny", "small", "facing left")
    related = tags("car", positive, ("in front of", "tree", "red"))
    assert related == ("car", "red", "striped", "shiny", "small", "facing left", "front", "tree")
    assert set(related) <= set(tag_vocabulary())


def test_scene_caption_and_questions() -> None:
    assert scene_caption("street", ["a orange car", "a white cat"]) == "a street with an orange car and a white cat"
    asked = question("what", "a car", predicate="behind", colour="red", category="bus")
    assert (asked.question, asked.answer, asked.kind) == ("what is behind the red bus?", "a car", "what")


def test_vocabularies_fit_the_drawings_and_one_another() -> None:
    assert set(category_names()) == set(SHAPES)
    assert len(category_names()) == 46
    assert len(colour_names()) == 11
    for words in (attribute_vocabulary(), tag_vocabulary(), relation_predicates()):
        assert len(set(words)) == len(words)
    said = set(attribute_vocabulary()) - unsaid_values()
    assert set(tag_vocabulary()) == set(category_names()) | said | {
        "left",
        "right",
        "above",
        "below",
        "front",
        "behind",
    }


def test_size_classes_leave_gaps() -> None:
    bands = sizes()
    assert [band.name for band in bands] == ["tiny", "small", "medium", "large", "huge"]
    assert all(first.high < second.low for first, second in pairwise(bands))
    assert sum(band.weight for band in bands) == pytest.approx(1.0)
