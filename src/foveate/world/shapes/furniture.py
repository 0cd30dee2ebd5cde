"""Furniture."""

from __future__ import annotations

from foveate.world.pen import Look, Pen
from foveate.world.shapes.shape import Shape


def chair(pen: Pen, look: Look) -> None:
    """Slatted back, seat and four legs, seen a little from the side."""
    back = pen.vary(-62, -54)
    for x in (12, 62):
        pen.line([(x, 4), (x - 2 + 4 * (x > 40), 52)], 6, "body_dark")
    pen.line([(10, 0), (8, back)], 7, "body")
    pen.line([(58, 0), (60, back)], 7, "body")
    for y in (back + 4, back + 20, back + 36):
        pen.rectangle(8, y - 5, 60, y + 6, "body", edge=1.2)
    pen.polygon([(6, -6), (60, -6), (72, 10), (-4, 10)], "body_light", edge=1.2)
    pen.rectangle(-4, 9, 72, 16, "body", edge=1.2)
    for x in (0, 68):
        pen.line([(x, 14), (x, 64)], 7, "body")
    pen.line([(0, 42), (68, 42)], 4, "body_dark")


def table(pen: Pen, look: Look) -> None:
    """Wide top in perspective with a drawer and four long legs."""
    height = pen.vary(56, 66)
    for x in (22, 108):
        pen.rectangle(x - 4, 10, x + 4, height - 8, "body_dark")
    pen.polygon([(18, -16), (112, -16), (132, 6), (-2, 6)], "body_light", edge=1.2)
    pen.rectangle(-2, 6, 132, 15, "body", edge=1.2)
    pen.rectangle(8, 15, 122, 26, "body_dark")
    pen.rectangle(48, 16.5, 82, 25, "body", edge=1)
    pen.ellipse(65, 21, 2.4, 2.4, "flame")
    for x in (9, 121):
        pen.polygon([(x - 6, 15), (x + 6, 15), (x + 4, height + 6), (x - 4, height + 6)], "body", edge=1)


def bed(pen: Pen, look: Look) -> None:
    """Headboard on the left, white pillow, coloured blanket over a mattress."""
    length = pen.vary(126, 142)
    pen.rectangle(0, 52, 8, 66, "wood_dark")
    pen.rectangle(length - 8, 52, length, 66, "wood_dark")
    pen.rectangle(-4, -14, 8, 62, "wood", radius=4, edge=1.2)
    pen.rectangle(length - 8, 12, length + 3, 62, "wood", radius=4, edge=1.2)
    pen.rectangle(8, 44, length - 8, 56, "wood_dark")
    pen.rectangle(8, 22, length - 8, 46, "paper", radius=4, edge=1)
    pen.blob([(10, 24), (12, 10), (30, 6), (42, 12), (42, 24), (26, 28)], "paper", edge=1.2)
    pen.blob([(44, 18), (60, 8), (length - 30, 9), (length - 8, 18), (length - 8, 52), (length - 40, 48), (46, 52)],
             "body", edge=1.4)  # fmt: skip
    pen.polygon([(42, 14), (56, 9), (58, 50), (44, 52)], "body_light", edge=1)


def lamp(pen: Pen, look: Look) -> None:
    """A table lamp: tapered shade on a stand; lit, it throws a bright cone."""
    wide = pen.vary(0.92, 1.1)
    lit = look.state == "lit"
    if lit:
        pen.polygon([(-30 * wide, 44), (30 * wide, 44), (44 * wide, 108), (-44 * wide, 108)], "glow")
        for x in (-1, 1):
            pen.line([(x * 46 * wide, 20), (x * 58 * wide, 14)], 4, "flame")
            pen.line([(x * 44 * wide, 2), (x * 54 * wide, -10)], 4, "flame")
    pen.line([(0, 44), (0, 106)], 6, "metal_dark")
    pen.ellipse(0, 70, 6, 9, "body_dark")
    pen.pie(0, 112, 24, 13, 180, 360, "body_dark", chord=True, edge=1.2)
    if lit:
        pen.ellipse(0, 46, 11, 11, "flame")
    else:
        pen.line([(12, 44), (12, 62)], 1.6, "ink")
        pen.ellipse(12, 63, 2.4, 2.4, "ink")
    pen.polygon([(-18 * wide, -6), (18 * wide, -6), (38 * wide, 46), (-38 * wide, 46)], "body", edge=1.4)
    pen.polygon([(-36 * wide, 40), (36 * wide, 40), (38 * wide, 46), (-38 * wide, 46)], "flame" if lit else "body_dark")
    pen.rectangle(-18 * wide, -9, 18 * wide, -4, "body_light" if lit else "body_dark")


def sofa(pen: Pen, look: Look) -> None:
    """Low and wide with fat rolled arms, a back and two seat cushions."""
    wide = pen.vary(66, 74)
    for x in (-wide + 12, wide - 12):
        pen.rectangle(x - 4, 50, x + 4, 62, "wood_dark")
    pen.rectangle(-wide + 10, -14, wide - 10, 40, "body", radius=14, edge=1.4)
    pen.line([(0, -10), (0, 20)], 1.6, "line")
    pen.rectangle(-wide + 6, 34, wide - 6, 55, "body_dark", edge=1)
    pen.rectangle(-wide + 18, 20, -1, 38, "body_light", radius=6, edge=1.2)
    pen.rectangle(1, 20, wide - 18, 38, "body_light", radius=6, edge=1.2)
    for side in (-1, 1):
        low, high = sorted((side * wide, side * (wide - 20)))
        pen.rectangle(low, 8, high, 56, "body", radius=10, edge=1.4)
        pen.ellipse(side * (wide - 10), 17, 5.5, 5.5, "body_dark", edge=1)


SHAPES = (Shape("chair", chair), Shape("table", table), Shape("bed", bed), Shape("lamp", lamp), Shape("sofa", sofa))
