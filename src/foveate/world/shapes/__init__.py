"""Parametric drawings of the world's object categories.

``draw_object`` is the one door: a category and a ``Look`` in, an anti-aliased cut-out that fills its box out.
"""

from __future__ import annotations

import numpy as np

from foveate.errors import InputError
from foveate.world.pen import FINISHES, PATTERNS, Look, render
from foveate.world.shapes import animals, buildings, food, furniture, household, people, plants, signs, tools, vehicles
from foveate.world.shapes.shape import Shape, record

__all__ = ["FINISHES", "PATTERNS", "SHAPES", "Look", "Shape", "draw_object"]

_GROUPS = (people, animals, vehicles, furniture, household, food, tools, buildings, plants, signs)
SHAPES: dict[str, Shape] = {shape.name: shape for group in _GROUPS for shape in group.SHAPES}


def draw_object(category: str, look: Look, width: int, height: int) -> np.ndarray:
    """Draws one object so that it touches all four sides of its box.

    Args:
        category: a key of ``SHAPES``.
        look: colour, pattern, finish, state, pose, facing, text and seed.
        width: pixels, at least 1. ``SHAPES[category].aspect(look)`` gives the undistorted width / height.
        height: pixels, at least 1.

    Returns:
        ``uint8 (height, width, 4)``: RGBA with straight alpha, anti-aliased.

    Raises:
        InputError: unknown category, pattern, finish or facing, no RGB colour, a box without pixels, a sign without
            a word or with a facing.
    """
    shape = SHAPES.get(category)
    if shape is None:
        raise InputError(f"there is no category {category!r}: use one of {', '.join(SHAPES)}")
    if look.pattern not in PATTERNS:
        raise InputError(f"there is no pattern {look.pattern!r}: use one of {', '.join(PATTERNS)}")
    if look.finish not in FINISHES:
        raise InputError(f"there is no finish {look.finish!r}: use one of {', '.join(FINISHES)}")
    if look.facing not in (None, "left", "right"):
        raise InputError(f"an object cannot face {look.facing!r}: use left, right or None")
    if len(look.rgb) != 3 or not all(0 <= channel <= 255 for channel in look.rgb):
        raise InputError(f"{look.rgb!r} is not a colour: give three numbers from 0 to 255")
    if width < 1 or height < 1:
        raise InputError(f"an object of {width} x {height} pixels cannot be drawn: both sides must be at least 1")
    if category == "sign" and look.facing is not None:
        raise InputError(f"a sign cannot be {look.facing!r}-facing: its word would be mirrored, leave facing out")
    picture = render(record(shape, look), look, width, height)
    return np.ascontiguousarray(picture[:, ::-1]) if look.facing == "right" else picture
