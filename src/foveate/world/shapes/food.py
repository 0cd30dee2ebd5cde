"""Food."""

from __future__ import annotations

import math

from foveate.world.pen import Look, Pen
from foveate.world.shapes.shape import Shape


def apple(pen: Pen, look: Look) -> None:
    """Heart-topped round fruit with stem and leaf; bitten, it shows its pale flesh."""
    wide = pen.vary(40, 45)
    pen.blob([(0, -30), (wide * 0.5, -40), (wide, -18), (wide * 0.9, 18), (wide * 0.42, 42), (0, 37),
             (-wide * 0.42, 42), (-wide * 0.9, 18), (-wide, -18), (-wide * 0.5, -40)], "body", edge=1.4)  # fmt: skip
    pen.ellipse(0, -31, 11, 4, "body_dark")
    pen.curve([(0, -30), (2, -44), (8, -55)], 4.5, "trunk")
    pen.blob([(5, -42), (18, -56), (36, -54), (24, -42)], "leaf", edge=1)
    if look.state == "bitten":
        bites = ((-14, 15), (3, 16), (19, 13))
        for y, radius in bites:
            pen.ellipse(wide + 1, y, radius + 4, radius + 3, "cream")
        for y, radius in bites:
            pen.ellipse(wide + 5, y, radius, radius, "clear")
        pen.rectangle(wide * 0.99, -30, wide + 30, 32, "clear")
        pen.ellipse(wide * 0.44, 0, 2.6, 4.4, "soil")


def banana(pen: Pen, look: Look) -> None:
    """A crescent with a stalk and a dark tip."""
    bend = pen.vary(0.92, 1.1)
    pen.blob([(-54, -24), (-44, -30), (-34, -2 * bend), (-6, 16 * bend), (28, 12), (52, -10), (58, -2), (46, 26),
             (14, 46 * bend), (-20, 42 * bend), (-46, 16)], "body", edge=1.4)  # fmt: skip
    pen.curve([(-46, -4), (-30, 20 * bend), (4, 32 * bend), (36, 22), (52, 0)], 2.2, "line")
    pen.polygon([(-55, -22), (-44, -28), (-48, -46), (-58, -43)], "leaf_dark")
    pen.ellipse(55, -7, 5, 4.5, "soil")


def pizza(pen: Pen, look: Look) -> None:
    """Round, crusty and topped; sliced, with cuts and one slice drawn out. The sauce takes the colour."""
    turn = pen.vary(-15, 15)
    whole = look.state != "sliced"
    if whole:
        pen.ellipse(0, 0, 50, 50, "crust", edge=1.4)
        pen.ellipse(0, 0, 42, 42, "body")
    else:
        pen.pie(0, 0, 50, 50, -22.5, 292.5, "crust", edge=1.4)
        pen.pie(0, 0, 42, 42, -22.5, 292.5, "body")
    for k in range(8):
        angle = math.radians(k * 45 + (turn if whole else 0))
        if not whole and k == 7:
            continue
        pen.ellipse(29 * math.cos(angle), 29 * math.sin(angle), 6.5, 6.5, "tomato", edge=1)
        if k % 2 == 0:
            pen.ellipse(14 * math.cos(angle + 0.4), 14 * math.sin(angle + 0.4), 3.2, 3.2, "leaf")
        else:
            pen.ellipse(16 * math.cos(angle), 16 * math.sin(angle), 3.4, 3.4, "cheese")
    if whole:
        pen.ellipse(0, 0, 6.5, 6.5, "tomato", edge=1)
        return
    for k in range(7):
        angle = math.radians(k * 45 + 22.5)
        pen.line([(0, 0), (50 * math.cos(angle), 50 * math.sin(angle))], 3, "clear")
    with pen.turned(shift=(17, -17)):
        pen.pie(0, 0, 50, 50, -67, -23, "crust", edge=1.4)
        pen.pie(0, 0, 42, 42, -67, -23, "body")
        pen.ellipse(20, -20, 6.5, 6.5, "tomato", edge=1)


def cake(pen: Pen, look: Look) -> None:
    """Layer cake with icing drips and candles; sliced, a wedge is missing and the layers show."""
    wide = pen.vary(46, 54)
    pen.ellipse(0, 42, wide + 12, 8, "metal")
    for x in (-26, 0, 26):
        if look.state == "sliced" and x > 0:
            continue
        pen.rectangle(x - 3, -44, x + 3, -20, "paper", edge=0.8)
        pen.ellipse(x, -50, 3.6, 7, "flame")
    pen.rectangle(-wide, -14, wide, 40, "body", radius=5, edge=1.4)
    pen.ellipse(0, -14, wide, 10, "body_light", edge=1.4)
    count = 7
    for k in range(count):
        x = -wide + (k + 0.5) * 2 * wide / count
        pen.rectangle(x - wide / count, -9, x + wide / count, 2 + 7 * (k % 2), "paper", radius=5)
    pen.ellipse(0, -16, wide - 1, 8, "paper")
    pen.rectangle(-wide, 20, wide, 25, "body_dark")
    if look.state == "sliced":
        pen.polygon([(4, -14), (wide + 1, -25), (wide + 1, 41), (4, 41)], "clear")
        pen.polygon([(4, -12), (wide * 0.62, -24), (wide * 0.62, 28), (4, 41)], "cream", edge=1.2)
        for y in (4, 20):
            pen.polygon([(4, y), (wide * 0.62, y - 11), (wide * 0.62, y - 6), (4, y + 6)], "body_dark")


def carrot(pen: Pen, look: Look) -> None:
    """A ringed tapering root with feathery leaves, lying aslant."""
    fat = pen.vary(0.9, 1.12)
    with pen.turned(38):
        for x in (-16, -8, 0, 8, 16):
            pen.curve(
                [(x * 0.3, -34), (x, -52), (x * 1.9, -70 + abs(x) * 0.5)], 6, "leaf" if x % 16 else "leaf_dark", 3.5
            )
        pen.blob([(0, -40), (14 * fat, -38), (19 * fat, -26), (12 * fat, 16), (2, 62), (-2, 62), (-12 * fat, 16),
                 (-19 * fat, -26), (-14 * fat, -38)], "body", edge=1.4)  # fmt: skip
        for y, left, right in ((-22, -17, -4), (-8, 2, 14), (8, -12, -2), (24, 0, 8)):
            pen.line([(left * fat, y), (right * fat, y + 1)], 2.2, "line")


SHAPES = (
    Shape("apple", apple),
    Shape("banana", banana),
    Shape("pizza", pizza),
    Shape("cake", cake),
    Shape("carrot", carrot),
)
