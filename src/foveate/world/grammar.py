"""From what an object is to what is said about it: captions, tags, questions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from foveate.world.vocabulary import (
    attribute_vocabulary,
    categories,
    raw_vocabulary,
    relation_tag,
    undecided_words,
    unsaid_values,
)


@dataclass(frozen=True, slots=True)
class SceneQuestion:
    """A question about a scene; `kind` is "what", "colour", "count", "where" or "text".

    `about` is the place among the scene's instances of the object that has to be seen for the answer: the one asked
    for, of those that are counted the smallest.
    """

    question: str
    answer: str
    kind: str
    about: int = field(default=0, compare=False)


def attribute_words(category: str, attributes: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Words that hold, and words that are known not to hold: other values of the same families, and the values of
    families that the category does not have (no cactus is "closed").

    Unknown, so in neither: a family without a value in `attributes` (the size of a tiny object), what goes without
    saying where nothing else can be (the "matte" of a man), and the words that the data file leaves undecided.
    """
    families = categories()[category].families
    positive, negative, unknown = [], [], {*unsaid_values(), *undecided_words(category)}
    for family, options in families.items():
        if family in attributes:
            positive.append(attributes[family])
            negative += [value for value in options if value != attributes[family]]
        else:
            unknown.update(options)
    unknown.update(positive, negative)
    negative += [word for word in attribute_vocabulary() if word not in unknown]
    return tuple(positive), tuple(negative)


def relation_clause(predicate: str, colour: str, category: str) -> str:
    """ "to the left of a green tree"."""
    clause = raw_vocabulary()["relation_clause"].format(predicate=predicate, colour=colour, category=category)
    return with_articles(clause)


def captions(category: str, attributes: Mapping[str, str], text: str | None, relation: str) -> tuple[str, ...]:
    """The canonical caption, which says everything, then paraphrases that say less. All are true.

    Args:
        category: its name.
        attributes: family -> value.
        text: the word on a sign.
        relation: a clause of `relation_clause`, or "".
    """
    raw = raw_vocabulary()
    said = {family: "" if value in unsaid_values() else value for family, value in attributes.items()}
    state_family = categories()[category].state_family
    noun = raw["patterns_as_nouns"].get(attributes.get("pattern", ""))
    slots = {
        "category": category,
        "colour": said["colour"],
        "pattern": said.get("pattern", ""),
        "finish": said.get("finish", ""),
        "size": said.get("size", ""),
        "state": said.get(state_family or "", ""),
        "pose": said.get("pose", ""),
        "facing": said.get("facing", ""),
        "says": raw["text_clause"].format(text=text.lower()) if text else "",
        "with_pattern": raw["pattern_clause"].format(noun=noun) if noun else "",
        "relation": relation,
    }
    written = (with_articles(_squeeze(template.format(**slots))) for template in raw["captions"])
    return tuple(dict.fromkeys(written))


def tags(category: str, positive: Sequence[str], relation: tuple[str, str, str] | None) -> tuple[str, ...]:
    """Category, attributes that are said, and of the relation its word, the other's category and its colour."""
    words = [category, *(word for word in positive if word not in unsaid_values())]
    if relation is not None:
        predicate, other_category, other_colour = relation
        words += [relation_tag(predicate), other_category, other_colour]
    return tuple(dict.fromkeys(words))


def scene_caption(background: str, things: Sequence[str]) -> str:
    """ "a street with a red car and a white cat"."""
    raw = raw_vocabulary()
    return with_articles(
        _squeeze(raw["scene"].format(background=raw["backgrounds"][background], objects=" and ".join(things)))
    )


def question(kind: str, answer: str, *, about: int = 0, **slots: str) -> SceneQuestion:
    """A question of one of the kinds in the data file."""
    return SceneQuestion(raw_vocabulary()["questions"][kind].format(**slots), answer, kind, about)


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def with_articles(text: str) -> str:
    """ "a orange bus" -> "an orange bus"."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)
