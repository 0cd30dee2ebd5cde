"""What a shape is: a named drawing whose aspect follows from what it draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from foveate.world.pen import Look, Pen


@dataclass(frozen=True)
class Shape:
    """One category's drawing.

    Args:
        name: the category.
        draw: records the drawing with the pen. Things with a facing are drawn facing left.
    """

    name: str
    draw: Callable[[Pen, Look], None]

    def aspect(self, look: Look) -> float:
        """Width over height of the drawing with this look."""
        x0, y0, x1, y1 = record(self, look).extents()
        return (x1 - x0) / (y1 - y0)


@lru_cache(maxsize=64)
def record(shape: Shape, look: Look) -> Pen:
    """The recorded drawing. Kept for a moment: asking for the aspect and then drawing records once."""
    pen = Pen(look.seed)
    shape.draw(pen, look)
    return pen
