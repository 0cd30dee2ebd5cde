"""The words of the rendered world, read from `vocabulary.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

RGB = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Category:
    """A kind of object: its group, the values that each family of attributes can take, and where it stands."""

    name: str
    group: str
    families: dict[str, tuple[str, ...]]
    state_family: str | None
    has_text: bool
    place: str


@dataclass(frozen=True, slots=True)
class SizeClass:
    """Range of longer object side / shorter image side, and how often it is drawn."""

    name: str
    low: float
    high: float
    weight: float


@cache
def raw_vocabulary() -> dict[str, Any]:
    """The data file as plain values."""
    return yaml.safe_load(Path(__file__).with_name("vocabulary.yaml").read_text(encoding="utf-8"))


@cache
def categories() -> dict[str, Category]:
    """Every category by name, in the order of the data file."""
    raw = raw_vocabulary()
    values = {name: tuple(family["values"]) for name, family in raw["families"].items()}
    out = {}
    for group, members in raw["categories"].items():
        for name, item in members.items():
            families = {"colour": values["colour"], "pattern": values["pattern"], "finish": tuple(item["finish"])}
            families["size"] = values["size"]
            if "state" in item:
                families[item["state"]] = values[item["state"]]
            if "pose" in item:
                families["pose"] = tuple(item["pose"])
            if item.get("faces"):
                families["facing"] = values["facing"]
            # A family with one value says nothing: there is no negative to tell it from.
            families = {family: options for family, options in families.items() if len(options) > 1}
            out[name] = Category(name, group, families, item.get("state"), bool(item.get("text")), item["place"])
    return out


@cache
def sizes() -> tuple[SizeClass, ...]:
    listed = raw_vocabulary()["sizes"].items()
    return tuple(SizeClass(name, item["range"][0], item["range"][1], item["weight"]) for name, item in listed)


@cache
def colours() -> dict[str, RGB]:
    """Colour name -> sRGB anchor."""
    return {name: (rgb[0], rgb[1], rgb[2]) for name, rgb in raw_vocabulary()["colours"].items()}


def category_names() -> list[str]:
    """The categories, in the order of the data file."""
    return list(categories())


def colour_names() -> list[str]:
    """The colours, in the order of the data file."""
    return list(colours())


def attribute_vocabulary() -> list[str]:
    """Every attribute word once, family by family."""
    return list(dict.fromkeys(v for family in raw_vocabulary()["families"].values() for v in family["values"]))


def relation_predicates() -> list[str]:
    """The phrases that relate one object to another."""
    return list(raw_vocabulary()["relations"])


def relation_tag(predicate: str) -> str:
    """The tag of a predicate: "to the left of" -> "left"."""
    return raw_vocabulary()["relations"][predicate]


def unsaid_values() -> frozenset[str]:
    """Attribute values that go without saying ("plain", "matte", "medium"): neither in captions nor tags."""
    return frozenset(family["unsaid"] for family in raw_vocabulary()["families"].values() if "unsaid" in family)


def undecided_words(category: str) -> frozenset[str]:
    """Words of families that the category does not have, which are yet not false of it."""
    names = {category, categories()[category].group}
    return frozenset(word for word, listed in raw_vocabulary()["undecided"].items() if names.intersection(listed))


def tag_vocabulary() -> list[str]:
    """Words that can be tags: categories, attributes that are said, and the words of relations."""
    said = [word for word in attribute_vocabulary() if word not in unsaid_values()]
    return list(dict.fromkeys([*category_names(), *said, *raw_vocabulary()["relations"].values()]))
