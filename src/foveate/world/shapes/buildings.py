"""Buildings and doors."""

from __future__ import annotations

from foveate.world.pen import Look, Pen
from foveate.world.shapes.shape import Shape


def house(pen: Pen, look: Look) -> None:
    """Gabled roof with chimney, door and two windows, which glow when it is lit."""
    wide = pen.vary(48, 58)
    lit = look.state == "lit"
    pen.rectangle(wide * 0.42, -50, wide * 0.42 + 14, -18, "tomato", edge=1)
    pen.rectangle(-wide, 0, wide, 62, "body", edge=1.4)
    pen.polygon([(-wide - 12, 2), (0, -52), (wide + 12, 2)], "body_dark", edge=1.8)
    for y in (-10, -22, -34):
        half = (wide + 12) * (y + 52) / 54
        pen.line([(-half + 4, y), (half - 4, y)], 1.3, "line")
    pen.rectangle(-9, 26, 9, 62, "wood_dark", edge=1)
    pen.ellipse(6, 44, 2, 2, "flame")
    for side in (-1, 1):
        x = side * (wide - 20)
        pen.rectangle(x - 14, 12, x + 14, 42, "paper")
        pen.rectangle(x - 11.5, 14.5, x + 11.5, 39.5, "glow" if lit else "night")
        pen.line([(x, 15), (x, 39)], 2, "flame" if lit else "paper")
        pen.line([(x - 11, 27), (x + 11, 27)], 2, "flame" if lit else "paper")
    if lit:
        pen.ellipse(0, -20, 8, 8, "glow")


def tower(pen: Pen, look: Look) -> None:
    """A tall castle tower: battlements, arrow slits, arched gate."""
    tall = pen.vary(120, 140)
    pen.polygon([(-24, 0), (24, 0), (30, tall), (-30, tall)], "body", edge=1.4)
    pen.rectangle(-33, -22, 33, 4, "body_dark", edge=1.4)
    for x in (-33, -11.5, 10):
        pen.rectangle(x, -40, x + 23 - 10, -20, "body_dark", edge=1.2)
    pen.rectangle(20, -40, 33, -20, "body_dark", edge=1.2)
    pen.rectangle(10, -40, 20, -22.6, "clear")
    for row in range(4):
        y = 16 + row * (tall - 60) / 4
        for x in (-20, -2, 12):
            pen.rectangle(x + 4 * (row % 2), y, x + 9 + 4 * (row % 2), y + 4, "body_light")
    for y in (22, 56):
        pen.rectangle(-4, y - 2, 4, y + 16, "night", radius=4)
    pen.rectangle(-13, tall - 32, 13, tall + 10, "wood_dark", radius=13)
    pen.rectangle(-31, tall - 2, 31, tall + 10, "body_dark")
    pen.rectangle(-13, tall - 14, 13, tall + 10, "wood_dark")


def tent(pen: Pen, look: Look) -> None:
    """A triangular tent with poles and guy ropes; open, its flaps are tied back from a dark inside."""
    wide = pen.vary(60, 70)
    pen.line([(-8, -62), (8, -44)], 3, "wood_dark")
    pen.line([(8, -62), (-8, -44)], 3, "wood_dark")
    for side in (-1, 1):
        pen.line([(side * wide * 0.5, -6), (side * (wide + 18), 34)], 1.8, "straw")
        pen.line([(side * (wide + 18), 30), (side * (wide + 17), 38)], 4, "wood_dark")
    pen.polygon([(0, -52), (wide, 38), (-wide, 38)], "body", edge=1.6)
    if look.state == "open":
        pen.polygon([(0, -34), (27, 38), (-27, 38)], "night")
        for side in (-1, 1):
            pen.polygon([(0, -38), (side * 14, 6), (side * 20, 38), (side * 34, 38)], "body_light", edge=1.2)
            pen.line([(side * 13, 10), (side * 23, 8)], 3, "straw")
    else:
        pen.polygon([(0, -38), (24, 38), (-24, 38)], "body_light", edge=1.2)
        pen.line([(0, -36), (0, 37)], 2.4, "ink")
        for y in (-16, 2, 20):
            pen.line([(-4, y), (4, y)], 2.4, "ink")


def door(pen: Pen, look: Look) -> None:
    """A panelled door with a knob in a frame; open, the leaf swings out from a dark opening."""
    wide = pen.vary(54, 62)
    pen.rectangle(-8, -8, wide + 8, 112, "wood", edge=1.2)
    pen.rectangle(-12, 108, wide + 12, 116, "metal_dark")
    if look.state == "open":
        pen.rectangle(0, 0, wide, 108, "night")
        pen.polygon([(0, 60), (wide, 60), (wide, 108), (0, 108)], (70, 76, 100))
        slope = 14
        x = -wide * 0.62
        pen.polygon([(0, 0), (x, -slope), (x, 108 + slope), (0, 108)], "body", edge=1.6)
        pen.polygon([(x * 0.2, 8), (x * 0.8, 1), (x * 0.8, 46), (x * 0.2, 46)], "body_dark", edge=1)
        pen.polygon([(x * 0.2, 60), (x * 0.8, 60), (x * 0.8, 108), (x * 0.2, 100)], "body_dark", edge=1)
        pen.ellipse(x * 0.88, 54, 3, 4, "flame")
        return
    pen.rectangle(0, 0, wide, 108, "body", edge=1.6)
    half = wide / 2
    for x0, x1 in ((7, half - 4), (half + 4, wide - 7)):
        pen.rectangle(x0, 8, x1, 46, "body_dark", edge=1)
        pen.rectangle(x0, 62, x1, 100, "body_dark", edge=1)
    pen.ellipse(wide - 7, 54, 4.2, 4.2, "flame", edge=0.8)


SHAPES = (Shape("house", house), Shape("tower", tower), Shape("tent", tent), Shape("door", door))
