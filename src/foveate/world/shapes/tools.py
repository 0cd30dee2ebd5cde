"""Tools: the grip (or the whole thing) takes the object's colour."""

from __future__ import annotations

from foveate.world.pen import Look, Pen
from foveate.world.shapes.shape import Shape


def hammer(pen: Pen, look: Look) -> None:
    """Claw hammer aslant: coloured handle, steel head."""
    thick = pen.vary(0.92, 1.15)
    with pen.turned(pen.vary(20, 34)):
        pen.polygon([(-8 * thick, -34), (8 * thick, -34), (14 * thick, 66), (-14 * thick, 66)], "body", edge=1.4)
        pen.rectangle(-14 * thick, 60, 14 * thick, 70, "body_dark", radius=4, edge=1)
        pen.rectangle(-26, -53, 14, -30, "metal", edge=1.2)
        pen.rectangle(-36, -56, -24, -28, "metal_dark", edge=1)
        pen.blob([(10, -52), (30, -48), (44, -30), (40, -28), (26, -36), (10, -32)], "metal", edge=1.2)
        pen.rectangle(-9, -56, 9, -28, "metal_dark", radius=2)


def scissors(pen: Pen, look: Look) -> None:
    """Two crossed steel blades with big ring grips."""
    spread = pen.vary(15, 21)
    for side in (-1, 1):
        with pen.turned(side * spread, about=(0, 0)):
            pen.polygon([(-5, 14), (5, 14), (7, -30), (0, -72), (-4, -30)], "metal", edge=1.2)
            pen.line([(0, -60), (2, 6)], 1.4, "metal_dark")
            pen.line([(0, 8), (side * 2, 24)], 12, "body")
    for side in (-1, 1):
        x = -side * (15 + spread * 0.35)
        pen.ellipse(x, 42, 19, 25, "body", angle=side * 16, edge=1.4)
        pen.ellipse(x, 43, 7, 12, "clear", angle=side * 16)
    pen.ellipse(0, 2, 4.5, 4.5, "ink")


def key(pen: Pen, look: Look) -> None:
    """Round bow with a hole, long shank, two teeth."""
    shank = pen.vary(58, 70)
    pen.rectangle(10, -8, 24 + shank, 8, "body", edge=1.4)
    for x, drop in ((shank - 14, 25), (shank + 1, 20), (shank + 14, 27)):
        pen.rectangle(x, 6, x + 9, drop, "body")
    pen.rectangle(22, -12, 29, 12, "body_dark", radius=2, edge=1)
    pen.ellipse(0, 0, 29, 29, "body", edge=1.4)
    pen.ellipse(0, 0, 20, 20, "body_light", edge=1)
    pen.ellipse(-8, 0, 8.5, 8.5, "clear")
    pen.line([(32, -3), (20 + shank, -3)], 1.8, "body_dark")


SHAPES = (Shape("hammer", hammer), Shape("scissors", scissors), Shape("key", key))
