"""Rendered scenes: objects on a background, with everything that is true of them.

Deterministic: the same arguments give the same pixels and words.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from foveate.errors import InputError
from foveate.world.backgrounds import BACKGROUNDS, render_background
from foveate.world.grammar import (
    SceneQuestion,
    attribute_words,
    captions,
    question,
    relation_clause,
    scene_caption,
    tags,
    with_articles,
)
from foveate.world.shapes import SHAPES, Look, draw_object
from foveate.world.vocabulary import (
    SizeClass,
    attribute_vocabulary,
    categories,
    category_names,
    colours,
    raw_vocabulary,
    sizes,
    tag_vocabulary,
)

__all__ = [
    "Instance",
    "Scene",
    "SceneQuestion",
    "SceneRelation",
    "attribute_vocabulary",
    "category_names",
    "render_scene",
    "render_scenes",
    "tag_vocabulary",
]

MIN_SIDE, MAX_SIDE = 32, 4096
_VISIBLE, _DESCRIBABLE_SHARE, _DESCRIBABLE_PIXELS = 0.6, 0.07, 14
_OCCLUDES, _TOUCHES = 0.04, 0.005
_MAX_COVER = 0.45
"""Largest share of an object's box that a later object's box may cover."""


@dataclass(frozen=True, slots=True)
class SceneRelation:
    """`predicate` holds between the instance it belongs to and the instance `object_index` of the scene."""

    predicate: str
    object_index: int


@dataclass
class Instance:
    """One object of a scene.

    Attributes:
        box: xyxy pixels, half-open, tight around the visible mask.
        mask: (H, W) bool, visible pixels.
        visible_fraction: visible pixels / pixels of the whole object.
        attributes: family -> value, of the families that apply.
        positive_attributes, negative_attributes: words that hold, and the other values of the same families.
        text: the word on a sign.
        describable: large and visible enough to be talked about.
        captions: the canonical one first, then paraphrases; empty if not describable.
        relations: at most one, to the nearest describable instance, where it is unambiguous.
    """

    category: str
    box: tuple[float, float, float, float]
    mask: np.ndarray
    visible_fraction: float
    attributes: dict[str, str]
    positive_attributes: tuple[str, ...]
    negative_attributes: tuple[str, ...]
    text: str | None
    describable: bool
    captions: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    relations: tuple[SceneRelation, ...] = ()


@dataclass
class Scene:
    """A rendered picture: image (H, W, 3) uint8, instances from back to front, and what is said and asked of it.

    `questions` are one of each kind, `all_questions` every one with a single right answer.
    """

    seed: int
    image: np.ndarray
    background: str
    instances: list[Instance]
    captions: tuple[str, ...] = ()
    questions: list[SceneQuestion] = field(default_factory=list)
    all_questions: list[SceneQuestion] = field(default_factory=list)


@dataclass
class _Placed:
    category: str
    attributes: dict[str, str]
    look: Look
    size: SizeClass
    box: tuple[int, int, int, int]


def render_scene(seed: int, size: int | tuple[int, int] = 256, objects: tuple[int, int] = (4, 8)) -> Scene:
    """Render one scene.

    Args:
        seed: decides everything.
        size: side in pixels, or (width, height).
        objects: fewest and most objects; fewer than asked are placed where there is no room.

    Raises:
        InputError: a size or a number of objects out of range.
    """
    width, height = _check_arguments(seed, size, objects)
    low, high = objects
    draw = np.random.default_rng([seed, 0])
    background = list(BACKGROUNDS)[int(draw.integers(len(BACKGROUNDS)))]
    image = render_background(background, width, height, draw)
    # As on a ground that is seen from a little above, what stands lower is nearer and covers what stands higher.
    placed = sorted(_place_objects(draw, image, int(draw.integers(low, high + 1))), key=lambda item: item.box[3])
    owner = np.full((height, width), -1, np.int16)
    areas = np.zeros(len(placed), int)
    hidden = np.zeros((len(placed), len(placed)), int)  # [front, back]: pixels of `back` that `front` covered first
    for index, item in enumerate(placed):
        areas[index], hidden[index] = _paint(image, owner, item, index, len(placed))
    instances = [
        _instance(owner, item, index, area) for index, (item, area) in enumerate(zip(placed, areas, strict=True))
    ]
    seen = [k for k, instance in enumerate(instances) if instance is not None]
    scene = Scene(seed, image, background, [instance for instance in instances if instance is not None])
    shares = hidden / np.maximum(areas, 1)
    _relate(scene.instances, shares[np.ix_(seen, seen)])
    _say(scene, draw)
    return scene


def render_scenes(
    first_seed: int,
    count: int,
    *,
    size: int | tuple[int, int] = 256,
    objects: tuple[int, int] = (4, 8),
    processes: int = 1,
) -> Iterator[Scene]:
    """Scenes with the seeds first_seed, first_seed + 1, ... in order, rendered by so many processes."""
    if not _is_whole(count) or count < 0:
        raise InputError(f"the number of scenes must be a whole number from 0, got {count!r}")
    seeds = range(first_seed, first_seed + count)
    render = partial(render_scene, size=size, objects=objects)
    if processes <= 1 or count < 8:
        yield from map(render, seeds)
        return
    with ProcessPoolExecutor(min(processes, os.cpu_count() or 1)) as pool:
        # In blocks: a pool's map would render everything ahead of a slow consumer and fill the memory.
        for start in range(0, count, 512):
            yield from pool.map(render, seeds[start : start + 512], chunksize=16)


# -------------------------------------------------------------------- layout


def _place_objects(draw: np.random.Generator, image: np.ndarray, count: int) -> list[_Placed]:
    """Mostly pairs: what an object stands beside is plain, and other things are farther away."""
    placed: list[_Placed] = []
    pairs: list[tuple[int, int]] = []
    for _ in range(count):
        for _ in range(6):
            item = _draw_object(draw, placed, image.shape[1], image.shape[0])
            if item is not None and _find_place(draw, image, item, placed, pairs):
                break
    return placed


def _find_place(
    draw: np.random.Generator, image: np.ndarray, item: _Placed, placed: list[_Placed], pairs: list[tuple[int, int]]
) -> bool:
    """Move the item to a place and list it; False if four tries gave none."""
    height, width = image.shape[:2]
    w, h = item.box[2], item.box[3]
    lone = [k for k, each in enumerate(placed) if each.size.name != "tiny" and all(k not in pair for pair in pairs)]
    for _ in range(4):
        beside = lone[int(draw.integers(len(lone)))] if lone and draw.random() < 0.9 else None
        x, y = _position(draw, item.category, None if beside is None else placed[beside].box, w, h, width, height)
        if not (0 <= x <= width - w and 0 <= y <= height - h):
            continue
        box = (x, y, x + w, y + h)
        if any(_cover(box, other.box) > _MAX_COVER for other in placed):
            continue
        local = image[y : y + h, x : x + w].reshape(-1, 3)[:: max(1, w * h // 64)].mean(axis=0)
        if np.abs(local - np.array(item.look.rgb)).sum() < 90:
            continue
        there = [*placed, replace(item, box=box)]
        paired = pairs if beside is None or item.size.name == "tiny" else [*pairs, (beside, len(placed))]
        if _pairs_stay_clear(there, paired):
            placed[:], pairs[:] = there, paired
            return True
    return False


def _pairs_stay_clear(placed: Sequence[_Placed], pairs: Sequence[tuple[int, int]]) -> bool:
    """Whether both of each pair are much nearer to each other than to any third object."""
    large = [k for k, item in enumerate(placed) if item.size.name != "tiny"]
    for pair in pairs:
        limit = 1.4 * _nearness(placed[pair[0]].box, placed[pair[1]].box)
        if any(_nearness(placed[one].box, placed[k].box) < limit for one in pair for k in large if k not in pair):
            return False
    return True


def _draw_object(draw: np.random.Generator, placed: Sequence[_Placed], width: int, height: int) -> _Placed | None:
    """An object with its top left corner at the origin; None if it is larger than the image."""
    names = category_names()
    category = names[int(draw.integers(len(names)))]
    size = _draw_size(draw, crowded=sum(item.size.low >= 0.38 for item in placed) > 0)
    attributes = {
        family: options[int(draw.integers(len(options)))] for family, options in categories()[category].families.items()
    }
    if draw.random() < 0.5:
        attributes["pattern"] = "plain"
    if "finish" in attributes and draw.random() < 0.4:
        attributes["finish"] = "matte"
    if size.name in ("tiny", "huge"):
        del attributes["size"]
    else:
        attributes["size"] = size.name
    look = random_look(draw, category, attributes)
    longer = draw.uniform(size.low, size.high) * min(width, height)
    aspect = SHAPES[category].aspect(look)
    # Half a pixel either way would leave the class of sizes at low resolution, so the longer side is rounded last.
    w, h = (longer, longer / aspect) if aspect >= 1 else (longer * aspect, longer)
    w, h = max(3, round(w)), max(3, round(h))
    if w >= width or h >= height:
        return None
    return _Placed(category, attributes, look, size, (0, 0, w, h))


def _draw_size(draw: np.random.Generator, *, crowded: bool) -> SizeClass:
    classes = sizes()
    # One big object leaves room for small ones only.
    weights = np.array([0.0 if crowded and item.low >= 0.38 else item.weight for item in classes])
    return classes[int(draw.choice(len(classes), p=weights / weights.sum()))]


def random_look(draw: np.random.Generator, category: str, attributes: dict[str, str], text: str | None = None) -> Look:
    """How an object with these attributes is drawn: its colour jittered, a word of the world on what has one.

    Args:
        text: the word instead, letters A to Z.
    """
    spec = categories()[category]
    anchor = colours()[attributes["colour"]]
    rgb = tuple(int(np.clip(value + draw.integers(-8, 9), 0, 255)) for value in anchor)
    facing = attributes.get("facing")
    words = raw_vocabulary()["sign_words"]
    return Look(
        colour=attributes["colour"],
        rgb=(rgb[0], rgb[1], rgb[2]),
        pattern=attributes["pattern"],
        finish=attributes.get("finish", "matte"),
        state=attributes.get(spec.state_family) if spec.state_family else None,
        pose=attributes.get("pose"),
        facing=facing.split()[-1] if facing else None,
        text=text or words[int(draw.integers(len(words)))] if spec.has_text else None,
        seed=int(draw.integers(2**31)),
    )


def _position(
    draw: np.random.Generator,
    category: str,
    beside: tuple[int, int, int, int] | None,
    w: int,
    h: int,
    width: int,
    height: int,
) -> tuple[int, int]:
    """Beside or in front of an earlier object's box, or where such things are found."""
    if beside is not None:
        x0, y0, x1, y1 = beside
        near = min(max(w, h), max(x1 - x0, y1 - y0))
        gap = (draw.uniform(-0.42, -0.28) if draw.random() < 0.35 else draw.uniform(0.02, 0.4)) * near
        side = int(draw.integers(4))
        if side < 2:  # left, right: the centres nearly level; where they overlap, one stands plainly lower
            x = x0 - gap - w if side == 0 else x1 + gap
            level = (y0 + y1 - h) / 2 + draw.uniform(-0.25, 0.25) * near
            y = level if gap > 0 else y1 - h + draw.choice([-1, 1]) * draw.uniform(0.12, 0.35) * near
        else:  # above, below
            y = y0 - gap - h if side == 2 else y1 + gap
            x = (x0 + x1 - w) / 2 + draw.uniform(-0.25, 0.25) * near
        return round(x), round(y)
    place = categories()[category].place if draw.random() < 0.5 else "anywhere"
    x = draw.integers(0, width - w)
    low, high = {"ground": (height // 3, height - h), "air": (0, height // 2 - h), "anywhere": (0, height - h)}[place]
    return int(x), int(draw.integers(low, high)) if low < high else int(draw.integers(0, height - h))


def _cover(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Share of the smaller box that the two have in common."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


# -------------------------------------------------------------------- pixels


def _paint(image: np.ndarray, owner: np.ndarray, item: _Placed, index: int, count: int) -> tuple[int, np.ndarray]:
    """Blend an object in and mark its pixels; returns how many it has, and how many it took from each earlier one."""
    x0, y0, x1, y1 = item.box
    picture = draw_object(item.category, item.look, x1 - x0, y1 - y0)
    alpha = picture[..., 3:].astype(np.uint16)
    under = image[y0:y1, x0:x1]
    under[:] = ((picture[..., :3] * alpha + under * (255 - alpha) + 127) // 255).astype(np.uint8)
    solid = picture[..., 3] >= 128
    marks = owner[y0:y1, x0:x1]
    before = marks[solid]
    marks[solid] = index
    return int(solid.sum()), np.bincount(before[before >= 0], minlength=count)


def _instance(owner: np.ndarray, item: _Placed, index: int, area: int) -> Instance | None:
    """The object as it is seen; None if nothing of it is."""
    x0, y0, x1, y1 = item.box
    window = owner[y0:y1, x0:x1] == index
    rows, columns = np.flatnonzero(window.any(axis=1)), np.flatnonzero(window.any(axis=0))
    if not len(rows):
        return None
    mask = np.zeros(owner.shape, bool)
    mask[y0:y1, x0:x1] = window
    box = (float(x0 + columns[0]), float(y0 + rows[0]), float(x0 + columns[-1] + 1), float(y0 + rows[-1] + 1))
    fraction = float(window.sum() / area)
    longer = max(box[2] - box[0], box[3] - box[1])
    describable = (
        fraction >= _VISIBLE
        and item.size.name != "tiny"
        and longer >= max(_DESCRIBABLE_PIXELS, _DESCRIBABLE_SHARE * min(owner.shape))
    )
    positive, negative = attribute_words(item.category, item.attributes)
    return Instance(
        category=item.category,
        box=box,
        mask=mask,
        visible_fraction=fraction,
        attributes=item.attributes,
        positive_attributes=positive,
        negative_attributes=negative,
        text=item.look.text,
        describable=describable,
    )


# -------------------------------------------------------------------- relations and words


def relation_between(
    subject: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> str | None:
    """The direction from `other` to `subject`, or None where it is not clear.

    Clear means that the centres differ at least 1.5 times as much along one axis as along the other.
    """
    dx = (subject[0] + subject[2] - other[0] - other[2]) / 2
    dy = (subject[1] + subject[3] - other[1] - other[3]) / 2
    if abs(dx) >= 1.5 * abs(dy) and dx:
        return "to the left of" if dx < 0 else "to the right of"
    if abs(dy) >= 1.5 * abs(dx) and dy:
        return "above" if dy < 0 else "below"
    return None


def box_gap(a: Sequence[float], b: Sequence[float]) -> float:
    """Distance between the edges of two boxes, 0 if they touch."""
    dx = max(0.0, max(a[0], b[0]) - min(a[2], b[2]))
    dy = max(0.0, max(a[1], b[1]) - min(a[3], b[3]))
    return float(np.hypot(dx, dy))


def _relate(instances: list[Instance], hidden: np.ndarray) -> None:
    """Give each describable instance its relation to the nearest other one, where there is no doubt about either.

    `hidden[front, back]` is the share of `back` that `front` covers; from 4% on, one is in front of the other.
    """
    indices = [k for k, instance in enumerate(instances) if instance.describable]
    for k in indices:
        box = instances[k].box
        nearness = sorted((_nearness(box, instances[j].box), j) for j in indices if j != k)
        if not nearness:
            continue
        distance, j = nearness[0]
        if len(nearness) > 1 and nearness[1][0] < 1.2 * distance:
            continue
        longer = max(box[2] - box[0], box[3] - box[1])
        if box_gap(box, instances[j].box) > longer:
            continue
        share = max(hidden[k, j], hidden[j, k])
        if share >= _OCCLUDES:
            predicate = "in front of" if k > j else "behind"
        elif share > _TOUCHES:
            continue  # a little is hidden: neither beside nor in front
        else:
            found = relation_between(box, instances[j].box)
            if found is None:
                continue
            predicate = found
        instances[k].relations = (SceneRelation(predicate, j),)


def _nearness(a: Sequence[float], b: Sequence[float]) -> float:
    """Gap of the edges plus a third of the distance of the centres: what a person calls the nearest thing."""
    centres = np.hypot(a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]) / 2
    return box_gap(a, b) + float(centres) / 3


def _say(scene: Scene, draw: np.random.Generator) -> None:
    for instance in scene.instances:
        related = None
        clause = ""
        if instance.relations:
            other = scene.instances[instance.relations[0].object_index]
            related = (instance.relations[0].predicate, other.category, other.attributes["colour"])
            clause = relation_clause(related[0], related[2], related[1])
        instance.tags = tags(instance.category, instance.positive_attributes, related)
        if instance.describable:
            instance.captions = captions(instance.category, instance.attributes, instance.text, clause)
    shown = [item for item in scene.instances if item.describable]
    shown.sort(key=lambda item: -(item.box[2] - item.box[0]) * (item.box[3] - item.box[1]))
    things = [f"a {item.attributes['colour']} {item.category}" for item in shown]
    if things:
        scene.captions = (scene_caption(scene.background, things[:3]), scene_caption(scene.background, things[:1]))
    pool = _questions(scene, shown)
    scene.questions = [
        options[int(draw.integers(len(options)))]
        for kind in raw_vocabulary()["questions"]
        if (options := pool.get(kind))
    ]
    scene.all_questions = list(dict.fromkeys(asked for options in pool.values() for asked in options))


def _questions(scene: Scene, shown: list[Instance]) -> dict[str, list[SceneQuestion]]:
    """kind -> questions that have a single right answer; one that several objects give rise to is there for each."""
    pool: dict[str, list[SceneQuestion]] = {}
    every = [item.category for item in scene.instances]
    named = [(item.attributes["colour"], item.category) for item in scene.instances]
    places = {id(item): place for place, item in enumerate(scene.instances)}
    for item in shown:
        colour, category, place = item.attributes["colour"], item.category, places[id(item)]
        if every.count(category) == 1:
            pool.setdefault("colour", []).append(question("colour", colour, about=place, category=category))
        smallest = min(
            (k for k, name in enumerate(every) if name == category), key=lambda k: _longer_side(scene.instances[k])
        )
        count = str(every.count(category))
        pool.setdefault("count", []).append(question("count", count, about=smallest, category=category))
        if item.relations and named.count((colour, category)) == 1:
            relation = item.relations[0]
            other = scene.instances[relation.object_index]
            other_colour = other.attributes["colour"]
            where = relation_clause(relation.predicate, other_colour, other.category)
            pool.setdefault("where", []).append(question("where", where, about=place, colour=colour, category=category))
            if named.count((other_colour, other.category)) == 1 and not _rivals(scene.instances, item, relation):
                slots = {"predicate": relation.predicate, "colour": other_colour, "category": other.category}
                answer = with_articles(f"a {colour} {category}")
                pool.setdefault("what", []).append(question("what", answer, about=place, **slots))
        if item.text and named.count((colour, "sign")) == 1:
            pool.setdefault("text", []).append(question("text", item.text.lower(), about=place, colour=colour))
    return pool


def _longer_side(instance: Instance) -> float:
    return max(instance.box[2] - instance.box[0], instance.box[3] - instance.box[1])


def _rivals(instances: list[Instance], item: Instance, relation: SceneRelation) -> bool:
    """Whether something else stands in the same relation to the same object, as far as a person would say."""
    other = instances[relation.object_index]
    for rival in instances:
        if rival is item or rival is other:
            continue
        touches = box_gap(rival.box, other.box) == 0
        if relation.predicate in ("in front of", "behind"):
            if touches:
                return True
        elif relation_between(rival.box, other.box) == relation.predicate:
            return True
    return False


def _check_arguments(seed: Any, size: Any, objects: Any) -> tuple[int, int]:
    """Width and height; InputError where an argument is of a wrong type or out of range."""
    if not _is_whole(seed) or seed < 0:
        raise InputError(f"the seed must be a whole number from 0, got {seed!r}")
    sides = (size, size) if _is_whole(size) else size
    if not isinstance(sides, tuple | list) or len(sides) != 2 or not all(_is_whole(side) for side in sides):
        raise InputError(f"the size of a scene must be a whole number of pixels or (width, height), got {size!r}")
    width, height = sides
    if not (MIN_SIDE <= width <= MAX_SIDE and MIN_SIDE <= height <= MAX_SIDE):
        raise InputError(
            f"a scene of {width} x {height} pixels cannot be rendered: sides must be {MIN_SIDE} to {MAX_SIDE}"
        )
    if not isinstance(objects, tuple | list) or len(objects) != 2 or not all(_is_whole(value) for value in objects):
        raise InputError(f"objects must be a fewest and a most, such as (4, 8), got {objects!r}")
    if not 1 <= objects[0] <= objects[1] <= 64:
        raise InputError(f"objects={objects!r} is out of range: give a fewest and a most from 1 to 64")
    return width, height


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
