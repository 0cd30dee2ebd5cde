"""Plants: the crown, the petals, the stems or the cap take the object's colour."""

from __future__ import annotations

import math

from foveate.world.pen import Look, Pen
from foveate.world.shapes.shape import Shape


def tree(pen: Pen, look: Look) -> None:
    """Forked trunk under a crown of round clumps."""
    wide = pen.vary(0.92, 1.1)
    pen.polygon([(-8, 20), (8, 20), (11, 82), (18, 90), (-18, 90), (-11, 82)], "trunk", edge=1.2)
    pen.line([(0, 44), (20, 20)], 6, "trunk")
    pen.line([(0, 38), (-18, 18)], 6, "trunk")
    clumps = ((-32, 2, 24), (32, 2, 24), (-20, -26, 25), (22, -26, 25), (0, -42, 24), (0, 2, 28))
    for x, y, radius in clumps:
        pen.ellipse(x * wide, y, radius, radius, "body", edge=1.4)
    pen.ellipse(0, -14, 27 * wide, 24, "body")
    for x, y in ((-30, -4), (-12, -32), (16, -26), (30, 2), (2, -6)):
        pen.arc(x * wide, y, 10, 8, 200, 330, 2.4, "body_light")


def flower(pen: Pen, look: Look) -> None:
    """Petals round a yellow heart on a leafy stem; wilted, the head hangs and the petals droop."""
    if look.state == "wilted":
        lean = pen.vary(26, 32)
        pen.curve([(0, 90), (-4, 40), (4, 4), (lean, -8), (lean + 10, 12)], 6, "leaf_dark")
        pen.blob([(-2, 70), (-20, 76), (-30, 92), (-12, 86)], "leaf_dark", edge=1)
        pen.blob([(-1, 60), (18, 66), (22, 84), (8, 76)], "leaf_dark", edge=1)
        with pen.turned(shift=(lean + 10, 14)):
            for angle in (50, -50, 26, -26, 0):
                pen.ellipse(-angle * 0.38, 22 - abs(angle) * 0.12, 7.5, 19, "body", angle=angle * 0.5, edge=1.4)
            pen.pie(0, 4, 13, 11, 180, 360, "leaf", chord=True)
            pen.ellipse(0, 5, 13, 5, "soil")
        pen.ellipse(lean - 14, 88, 9, 5, "body", angle=-10, edge=1)
        return
    count = 6 + round(pen.vary(0, 2))
    pen.curve([(0, 96), (-3, 60), (0, 0)], 6, "leaf_dark")
    pen.blob([(-1, 84), (-16, 62), (-34, 58), (-24, 78)], "leaf", edge=1)
    pen.blob([(0, 74), (14, 54), (32, 50), (22, 70)], "leaf", edge=1)
    for k in range(count):
        angle = 360 * k / count - 90
        x, y = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        pen.ellipse(25 * x, 25 * y, 18, 11.5, "body", angle=angle, edge=1.4)
    pen.ellipse(0, 0, 14, 14, "flame", edge=1.2)
    for x, y in ((-5, -4), (4, -5), (0, 4), (6, 3), (-6, 5)):
        pen.ellipse(x, y, 1.7, 1.7, "wood")


def cactus(pen: Pen, look: Look) -> None:
    """A ribbed column with two upturned arms and spines, in a pot."""
    arm = pen.vary(-6, 8)
    pen.curve([(0, 30 + arm), (-24, 28 + arm), (-31, 14 + arm), (-31, -6 + arm)], 15, "body")
    pen.curve([(0, 18 - arm), (24, 14 - arm), (31, 2 - arm), (31, -20 - arm)], 15, "body")
    pen.rectangle(-16, -56, 16, 66, "body", radius=16, edge=1.4)
    for x in (-7, 7):
        pen.line([(x, -42), (x, 60)], 1.8, "line")
    for y in (-40, -20, 0, 20, 40):
        for x in (-16, 0, 16):
            pen.line([(x - 4, y - 4), (x + 4, y + 2)], 1.4, "paper")
            pen.line([(x + 4, y - 4), (x - 4, y + 2)], 1.4, "paper")
    for k in range(5):
        angle = math.radians(72 * k - 90)
        pen.ellipse(6 * math.cos(angle), -58 + 6 * math.sin(angle), 4.5, 4.5, (228, 90, 140))
    pen.ellipse(0, -58, 3, 3, "flame")
    pen.polygon([(-26, 64), (26, 64), (19, 98), (-19, 98)], "pot", edge=1.2)
    pen.rectangle(-30, 57, 30, 68, "pot", radius=2, edge=1.2)


def mushroom(pen: Pen, look: Look) -> None:
    """A domed cap with pale spots over gills and a thick white stem."""
    wide = pen.vary(48, 56)
    pen.blob([(-14, 4), (14, 4), (14, 34), (21, 56), (0, 62), (-21, 56), (-14, 34)], "cream", edge=1.4)
    pen.polygon([(-18, 18), (18, 18), (24, 28), (-24, 28)], "paper", edge=1)
    pen.ellipse(0, 2, wide * 0.92, 11, "crust", edge=1)
    for k in range(-4, 5):
        pen.line([(k * 4, 2), (k * wide * 0.19, 10)], 1.2, "wood_dark")
    pen.pie(0, 4, wide, 54, 180, 360, "body", chord=True, edge=1.4)
    for x, y, radius in ((-24, -12, 8), (2, -32, 9), (26, -14, 7.5), (0, -8, 6), (-38, -2, 4.5), (40, -2, 4.5)):
        pen.ellipse(x * wide / 52, y, radius, radius * 0.86, "paper")


SHAPES = (Shape("tree", tree), Shape("flower", flower), Shape("cactus", cactus), Shape("mushroom", mushroom))
