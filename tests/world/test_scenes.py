"""Rendered scenes: the same for the same arguments, and everything said of them is true of the pixels."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.world import scenes as scenes_module
from foveate.world.grammar import relation_clause
from foveate.world.scenes import Instance, Scene, box_gap, relation_between, render_scene, render_scenes
from foveate.world.vocabulary import (
    attribute_vocabulary,
    categories,
    category_names,
    colour_names,
    colours,
    raw_vocabulary,
    relation_predicates,
    sizes,
    tag_vocabulary,
    unsaid_values,
)

COUNT = 60


@cache
def sample() -> tuple[Scene, ...]:
    """Scenes for the tests that read many."""
    return tuple(render_scenes(1000, COUNT, size=128))


def same(first: Scene, second: Scene) -> bool:
    """Whether two scenes agree in pixels, masks and words."""
    pixels = np.array_equal(first.image, second.image) and first.background == second.background
    words = (first.captions, first.questions) == (second.captions, second.questions)
    pairs = zip(first.instances, second.instances, strict=True)
    return pixels and words and all(_plain(a) == _plain(b) and np.array_equal(a.mask, b.mask) for a, b in pairs)


def _plain(instance: Instance) -> dict[str, Any]:
    return {name: value for name, value in vars(instance).items() if name != "mask"}


def parse(caption: str) -> dict[str, Any]:
    """Reads a canonical caption back, by the vocabulary's words alone."""
    predicates = "|".join(re.escape(each) for each in relation_predicates())
    other = rf"(?: (?P<predicate>{predicates}) an? (?P<other_colour>\w+) (?P<other>\w+))?"
    names = "|".join(category_names())
    pattern = rf"an? (?P<before>.*?)(?P<category>{names})(?: (?P<after>(?!{predicates}|that says).*?))?"
    found = re.fullmatch(pattern + r"(?: that says (?P<text>\w+))?" + other, caption)
    assert found is not None, caption
    said = found["before"] + (found["after"] or "")
    words = {
        word
        for word in attribute_vocabulary()
        if re.search(rf"\b{word}\b", f"{found['before']} {found['after'] or ''}")
    }
    rest = re.sub("|".join(sorted(words, key=len, reverse=True)), "", said) if words else said
    assert not rest.strip(), f"{rest!r} in {caption!r} is no word of the vocabulary"
    return found.groupdict() | {"words": words}


def test_same_arguments_same_scene() -> None:
    assert same(render_scene(7), render_scene(7))
    assert not np.array_equal(render_scene(7).image, render_scene(8).image)


def test_many_scenes_come_in_order_from_any_number_of_processes() -> None:
    alone = list(render_scenes(20, 9, size=64, objects=(2, 3)))
    assert [scene.seed for scene in alone] == list(range(20, 29))
    assert all(same(scene, render_scene(scene.seed, 64, (2, 3))) for scene in alone)
    together = list(render_scenes(20, 9, size=64, objects=(2, 3), processes=2))
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("size", [64, 100, 1024, (200, 96), (96, 200), (640, 360)])
def test_any_resolution(size: int | tuple[int, int]) -> None:
    width, height = (size, size) if isinstance(size, int) else size
    scene = render_scene(3, size)
    assert scene.image.shape == (height, width, 3)
    assert scene.image.dtype == np.uint8
    assert scene.instances
    for instance in scene.instances:
        assert instance.mask.shape == (height, width)
        x0, y0, x1, y1 = instance.box
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.sampled_from([64, 90, (128, 72)]))
def test_boxes_are_tight_and_masks_disjoint(seed: int, size: int | tuple[int, int]) -> None:
    scene = render_scene(seed, size)
    assert np.sum([instance.mask for instance in scene.instances], axis=0).max() <= 1
    for instance in scene.instances:
        rows, columns = np.nonzero(instance.mask)
        tight = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert instance.box == tuple(float(side) for side in tight)
        assert 0 < instance.visible_fraction <= 1


def test_visible_fraction_is_visible_pixels_of_the_whole_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    draw: Callable[..., np.ndarray] = scenes_module.draw_object
    whole: list[tuple[int, int, int]] = []

    def remember(category: str, look: Any, width: int, height: int) -> np.ndarray:
        picture = draw(category, look, width, height)
        whole.append((int((picture[..., 3] >= 128).sum()), width, height))
        return picture

    monkeypatch.setattr(scenes_module, "draw_object", remember)
    bands = {band.name: band for band in sizes()}
    hidden = 0
    for seed in range(12):
        whole.clear()
        scene = render_scene(seed, 256, (5, 8))
        assert len(whole) == len(scene.instances)
        for instance, (area, width, height) in zip(scene.instances, whole, strict=True):
            assert instance.visible_fraction == pytest.approx(instance.mask.sum() / area)
            hidden += instance.visible_fraction < 1
            longer = max(width, height)
            if "size" in instance.attributes:
                band = bands[instance.attributes["size"]]
                assert band.low * 256 - 1 <= longer <= band.high * 256 + 1
            else:
                tiny = longer <= bands["tiny"].high * 256 + 1
                assert tiny or longer >= bands["huge"].low * 256 - 1
                assert not (tiny and instance.describable)
    assert hidden > 0


def test_describable_objects_are_large_and_visible_enough() -> None:
    crowded = list(render_scenes(0, 15, size=128, objects=(30, 40)))
    assert any(item.visible_fraction < 0.6 for scene in crowded for item in scene.instances)
    for scene in (*sample(), *crowded):
        for instance in scene.instances:
            longer = max(instance.box[2] - instance.box[0], instance.box[3] - instance.box[1])
            if instance.describable:
                assert instance.visible_fraction >= 0.6
                assert longer >= max(14, 0.07 * 128)
                assert 1 <= len(set(instance.captions)) == len(instance.captions) <= 3
            else:
                assert instance.captions == ()
                assert instance.relations == ()


def test_attributes_and_negatives() -> None:
    for instance in (item for scene in sample() for item in scene.instances):
        families = categories()[instance.category].families
        assert set(families) - {"size"} <= set(instance.attributes) <= set(families)
        assert all(value in families[family] for family, value in instance.attributes.items())
        assert set(instance.positive_attributes) == set(instance.attributes.values())
        assert not set(instance.positive_attributes) & set(instance.negative_attributes)
        known = {value for family in instance.attributes for value in families[family]}
        assert known - set(instance.positive_attributes) <= set(instance.negative_attributes)
        assert (instance.text is not None) == (instance.category == "sign")


def test_canonical_captions_read_back_as_the_truth() -> None:
    related = 0
    for scene in sample():
        for instance in scene.instances:
            if not instance.describable:
                continue
            found = parse(instance.captions[0])
            assert found["category"] == instance.category
            assert found["words"] == set(instance.positive_attributes) - unsaid_values()
            assert found["text"] == (instance.text.lower() if instance.text else None)
            if not instance.relations:
                assert found["predicate"] is None
                continue
            related += 1
            relation = instance.relations[0]
            other = scene.instances[relation.object_index]
            assert found["predicate"] == relation.predicate
            assert (found["other_colour"], found["other"]) == (other.attributes["colour"], other.category)
    assert related > COUNT


def test_tags_are_the_object_and_its_relation() -> None:
    key = raw_vocabulary()["relations"]
    for scene in sample():
        for instance in scene.instances:
            expected = {instance.category} | set(instance.positive_attributes) - unsaid_values()
            for relation in instance.relations:
                other = scene.instances[relation.object_index]
                expected |= {key[relation.predicate], other.category, other.attributes["colour"]}
            assert set(instance.tags) == expected
            assert len(set(instance.tags)) == len(instance.tags)
            assert expected <= set(tag_vocabulary())


@pytest.mark.parametrize(
    ("subject", "other", "expected"),
    [
        ((0, 0, 10, 10), (20, 0, 30, 10), "to the left of"),
        ((20, 0, 30, 10), (0, 0, 10, 10), "to the right of"),
        ((0, 0, 10, 10), (0, 20, 10, 30), "above"),
        ((0, 20, 10, 30), (0, 0, 10, 10), "below"),
        ((0, 0, 10, 10), (15, 10, 25, 20), "to the left of"),  # 15 across, 10 down: just 1.5 times
        ((0, 0, 10, 10), (14, 10, 24, 20), None),  # 14 across, 10 down: not clear
        ((0, 0, 10, 10), (-10, 15, 0, 25), "above"),
        ((0, 0, 10, 10), (20, 20, 30, 30), None),
        ((0, 0, 10, 10), (-5, -5, 15, 15), None),  # the same centre
    ],
)
def test_directions(subject: tuple[float, ...], other: tuple[float, ...], expected: str | None) -> None:
    assert relation_between(subject, other) == expected  # type: ignore[arg-type]


def test_box_gap_is_the_distance_of_the_edges() -> None:
    assert box_gap((0, 0, 10, 10), (13, 14, 20, 20)) == 5.0  # 3 across and 4 down
    assert box_gap((0, 0, 10, 10), (12, 3, 20, 6)) == 2.0
    assert box_gap((0, 0, 10, 10), (5, 5, 20, 20)) == 0.0


@settings(max_examples=50, deadline=None)
@given(*[st.tuples(*[st.integers(0, 50)] * 2, *[st.integers(51, 99)] * 2)] * 2)
def test_directions_are_opposite_seen_from_the_other_side(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    opposite = {"to the left of": "to the right of", "above": "below", None: None}
    opposite |= {value: key for key, value in opposite.items()}
    assert relation_between(second, first) == opposite[relation_between(first, second)]  # type: ignore[arg-type]


def test_relations_hold_between_describable_objects() -> None:
    seen = set()
    for scene in sample():
        for index, instance in enumerate(scene.instances):
            for relation in instance.relations:
                other = scene.instances[relation.object_index]
                seen.add(relation.predicate)
                assert relation.object_index != index
                assert other.describable
                longer = max(instance.box[2] - instance.box[0], instance.box[3] - instance.box[1])
                assert box_gap(instance.box, other.box) <= longer
                if relation.predicate in ("in front of", "behind"):
                    # Back to front is the order of the list, and the one behind has lost pixels.
                    in_front = relation.predicate == "in front of"
                    assert in_front == (index > relation.object_index)
                    assert (other if in_front else instance).visible_fraction <= 0.96
                else:
                    assert relation_between(instance.box, other.box) == relation.predicate
    assert seen == set(relation_predicates())


def test_what_stands_lower_is_in_front() -> None:
    """Flat drawings do not say which of two covers the other; where they stand does, as in a photograph."""
    differences = []
    for scene in render_scenes(500, 60):
        for instance in scene.instances:
            for relation in instance.relations:
                other = scene.instances[relation.object_index]
                lower = (instance.box[3] - other.box[3]) / (other.box[3] - other.box[1])
                if relation.predicate in ("in front of", "behind"):
                    differences.append(lower if relation.predicate == "in front of" else -lower)
    assert len(differences) > 30
    assert min(differences) > 0
    assert np.median(differences) > 0.2


def test_most_described_objects_have_a_relation() -> None:
    described = [item for scene in sample() for item in scene.instances if item.describable]
    assert sum(bool(item.relations) for item in described) >= 0.75 * len(described)


def test_most_objects_stand_in_pairs() -> None:
    """What an object relates to mostly relates back to it, in the opposite words."""
    opposite = {"to the left of": "to the right of", "above": "below", "in front of": "behind"}
    opposite |= {value: key for key, value in opposite.items()}
    both = total = 0
    for scene in sample():
        for index, instance in enumerate(scene.instances):
            for relation in instance.relations:
                total += 1
                back = scene.instances[relation.object_index].relations
                if back and back[0].object_index == index:
                    both += 1
                    assert back[0].predicate == opposite[relation.predicate]
    assert both >= 0.7 * total


def test_scene_captions_name_visible_things() -> None:
    for scene in sample():
        shown = [item for item in scene.instances if item.describable]
        assert bool(scene.captions) == bool(shown)
        for caption in scene.captions:
            place, _, things = caption.partition(" with ")
            assert place == raw_vocabulary()["backgrounds"][scene.background]
            named = [tuple(thing.split()[1:]) for thing in things.split(" and ")]
            assert 1 <= len(named) <= 3
            pairs = [(item.attributes["colour"], item.category) for item in shown]
            assert all(named.count(pair) <= pairs.count(pair) for pair in named)  # type: ignore[arg-type]


def _only(scene: Scene, colour: str | None, category: str) -> Instance:
    """The one object of that name; a question must not be about one of several."""
    found = [i for i in scene.instances if i.category == category and colour in (None, i.attributes["colour"])]
    assert len(found) == 1
    return found[0]


def test_answers_follow_from_the_truth() -> None:
    predicates = "|".join(relation_predicates())
    kinds = set()
    for scene in (*sample(), *render_scenes(5000, 40, size=128)):
        for question, answer, kind in ((q.question, q.answer, q.kind) for q in scene.questions):
            kinds.add(kind)
            if kind == "colour":
                (category,) = re.fullmatch(r"what colour is the (\w+)\?", question).groups()  # type: ignore[union-attr]
                assert answer == _only(scene, None, category).attributes["colour"]
            elif kind == "count":
                (category,) = re.fullmatch(r"how many (\w+) objects are there\?", question).groups()  # type: ignore[union-attr]
                assert answer == str(sum(item.category == category for item in scene.instances))
            elif kind == "text":
                (colour,) = re.fullmatch(r"what does the (\w+) sign say\?", question).groups()  # type: ignore[union-attr]
                text = _only(scene, colour, "sign").text
                assert text is not None
                assert answer == text.lower()
            elif kind == "where":
                colour, category = re.fullmatch(r"where is the (\w+) (\w+)\?", question).groups()  # type: ignore[union-attr]
                (relation,) = _only(scene, colour, category).relations
                other = scene.instances[relation.object_index]
                assert answer == relation_clause(relation.predicate, other.attributes["colour"], other.category)
            else:
                match = re.fullmatch(rf"what is ({predicates}) the (\w+) (\w+)\?", question)
                assert match is not None
                target = _only(scene, match[2], match[3])
                pairs = [
                    (item.attributes["colour"], item.category)
                    for item in scene.instances
                    for relation in item.relations
                    if relation.predicate == match[1] and scene.instances[relation.object_index] is target
                ]
                assert pairs == [tuple(answer.split()[1:])]
    assert kinds == {"what", "colour", "count", "where", "text"}


def test_answers_have_the_right_article() -> None:
    answers = [q.answer for scene in sample() for q in scene.questions if q.kind == "what"]
    assert not [answer for answer in answers if re.search(r"\ba [aeiou]", answer)]


def test_what_questions_have_one_right_answer() -> None:
    sides = [each for each in relation_predicates() if each not in ("in front of", "behind")]
    for scene in sample():
        for asked in scene.questions:
            match = re.fullmatch(rf"what is ({'|'.join(sides)}) the (\w+) (\w+)\?", asked.question)
            if match:
                target = _only(scene, match[2], match[3])
                others = [item for item in scene.instances if item is not target]
                assert sum(relation_between(item.box, target.box) == match[1] for item in others) == 1


def test_objects_stand_out_from_the_background_in_their_colour() -> None:
    """The drawn body colour is near its own anchor: of plain matte objects, it is the most frequent named colour."""
    names = colour_names()
    anchors = np.array([colours()[name] for name in names], np.int64)
    right = total = 0
    for scene in render_scenes(300, 40, size=256):
        for item in scene.instances:
            plain = item.attributes["pattern"] == "plain" and item.attributes.get("finish", "matte") == "matte"
            if (
                item.describable
                and plain
                and item.category in ("ball", "sofa", "car", "bus", "apple", "elephant", "house")
            ):
                pixels = scene.image[item.mask].astype(np.int64)
                distances = np.abs(pixels[:, None] - anchors).sum(axis=2)
                close = distances.argmin(axis=1)[distances.min(axis=1) < 40]
                total += 1
                right += names[np.bincount(close, minlength=len(names)).argmax()] == item.attributes["colour"]
    assert total >= 8
    assert right == total


def test_more_objects_where_more_are_asked() -> None:
    few = [len(scene.instances) for scene in render_scenes(0, 12, size=96, objects=(1, 2))]
    many = [len(scene.instances) for scene in render_scenes(0, 12, size=96, objects=(6, 8))]
    assert set(few) == {1, 2}
    assert max(many) <= 8
    assert np.mean(many) > np.mean(few) + 3


def test_every_background_appears_and_none_is_flat() -> None:
    seen = {scene.background: scene for scene in sample()}
    assert set(seen) == set(raw_vocabulary()["backgrounds"])
    for scene in seen.values():
        free = ~np.any([item.mask for item in scene.instances], axis=0)
        assert scene.image[free].std() > 3


@pytest.mark.parametrize("size", [0, 31, 4097, -5, (64, 10**6)])
def test_bad_sizes_are_refused(size: int | tuple[int, int]) -> None:
    with pytest.raises(InputError, match="cannot be rendered"):
        render_scene(0, size)


@pytest.mark.parametrize("objects", [(0, 3), (5, 4), (1, 65), (-2, 2)])
def test_bad_numbers_of_objects_are_refused(objects: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="out of range"):
        render_scene(0, 64, objects)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(InputError, match="-1"):
        render_scene(-1, 64)


@pytest.mark.parametrize(
    "arguments",
    [
        {"seed": "x"},
        {"seed": 1.5},
        {"size": 256.5},
        {"size": (64,)},
        {"size": "a"},
        {"objects": 5},
        {"objects": (4.5, 8)},
    ],
    ids=str,
)
def test_wrong_types_are_refused(arguments: dict[str, Any]) -> None:
    bad: dict[str, Any] = {"seed": 0, "size": 64} | arguments
    with pytest.raises(InputError):
        render_scene(**bad)


def test_seeds_in_a_row_differ() -> None:
    assert all(not np.array_equal(a.image, b.image) for a, b in pairwise(sample()))
