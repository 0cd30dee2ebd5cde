"""Things of the house."""

from __future__ import annotations

import math

from foveate.world.pen import Look, Pen
from foveate.world.shapes.shape import Shape


def clock(pen: Pen, look: Look) -> None:
    """Alarm clock: round face, two bells, feet, hands."""
    hour, minute = pen.vary(0, 360), pen.vary(0, 360)
    for side in (-1, 1):
        pen.line([(side * 26, 34), (side * 34, 48)], 7, "body_dark")
        pen.ellipse(side * 24, -40, 15, 11, "body_dark", angle=side * 32, edge=1.2)
    pen.rectangle(-3, -52, 3, -38, "metal_dark")
    pen.ellipse(0, 0, 44, 44, "body", edge=1.2)
    pen.ellipse(0, 0, 29, 29, "paper", edge=1)
    for k in range(12):
        angle = math.radians(30 * k)
        x, y = math.cos(angle), math.sin(angle)
        pen.line([(x * 24, y * 24), (x * 28, y * 28)], 2.4 if k % 3 == 0 else 1.2, "ink")
    for angle, length, width in ((hour, 14, 4.5), (minute, 22, 3)):
        pen.line([(0, 0), (math.cos(angle) * length, math.sin(angle) * length)], width, "ink")
    pen.ellipse(0, 0, 3, 3, "tomato")


def cup(pen: Pen, look: Look) -> None:
    """A mug with a handle; full, it shows coffee and steam; empty, its bright inside."""
    tall = pen.vary(60, 72)
    pen.arc(36, tall * 0.48, 17, 17, -80, 80, 8, "body_dark")
    pen.polygon([(-34, 0), (34, 0), (28, tall - 4), (22, tall), (-22, tall), (-28, tall - 4)], "body", edge=1.4)
    pen.ellipse(0, 0, 34, 10, "body_light", edge=1.4)
    if look.state == "full":
        pen.ellipse(0, 1, 29, 7.5, "coffee")
        for x in (-14, 2, 18):
            pen.curve([(x, -12), (x - 5, -20), (x + 4, -28), (x - 1, -38)], 4, "paper")
    else:
        pen.ellipse(0, 1, 29, 7.5, "paper")
        pen.ellipse(0, 3.5, 21, 4.5, "metal")


def bottle(pen: Pen, look: Look) -> None:
    """Narrow neck with a cap, shoulders, label; the liquid stands in a clear window."""
    wide = pen.vary(19, 23)
    pen.rectangle(-8, -58, 8, -46, "ink", radius=2)
    pen.blob([(-7, -46), (7, -46), (8, -28), (wide, -10), (wide, 20), (wide, 60), (wide - 5, 66), (-wide + 5, 66),
             (-wide, 60), (-wide, 20), (-wide, -10), (-8, -28)], "body", edge=1.4)  # fmt: skip
    inner = wide - 7
    pen.rectangle(-inner, -4, inner, 56, "paper", radius=4, edge=1.2)
    if look.state == "full":
        pen.rectangle(-inner + 2, 0, inner - 2, 54, "water", radius=3)
        pen.ellipse(-3, 16, 2.4, 2.4, "paper")
        pen.ellipse(4, 32, 2.4, 2.4, "paper")
    else:
        pen.line([(-inner + 4, 2), (inner - 4, 50)], 1.6, "metal")


def umbrella(pen: Pen, look: Look) -> None:
    """Open: a scalloped canopy over a hooked stick; closed: a slim furled cone."""
    if look.state == "closed":
        slim = pen.vary(0.9, 1.15)
        pen.line([(0, -74), (0, -62)], 3, "metal_dark")
        pen.polygon([(0, -66), (18 * slim, 26), (4, 34), (-4, 34), (-18 * slim, 26)], "body", edge=1.4)
        pen.curve([(-2, -50), (3, -10), (-3, 30)], 1.6, "line")
        pen.line([(-15 * slim, 8), (14 * slim, 3)], 4.5, "body_dark")
        pen.line([(0, 34), (0, 60)], 4.5, "wood_dark")
        pen.arc(-8, 60, 8, 9, 0, 180, 4.5, "wood_dark")
        return
    wide = pen.vary(56, 64)
    pen.line([(0, -46), (0, -36)], 3.5, "metal_dark")
    pen.line([(0, 0), (0, 54)], 4.5, "wood_dark")
    pen.arc(-9, 54, 9, 10, 0, 180, 4.5, "wood_dark")
    pen.pie(0, 6, wide, 46, 180, 360, "body", chord=True, edge=1.2)
    for k in range(4):
        pen.ellipse(-wide + wide * (0.25 + 0.5 * k), 7, wide * 0.25, 6, "clear")
    for x in (-wide * 0.5, 0, wide * 0.5):
        pen.curve([(0, -40), (x * 0.75, -22), (x, 2)], 1.8, "line")


def book(pen: Pen, look: Look) -> None:
    """Closed: a cover with spine, title and page edge; open: two pages of text between covers."""
    if look.state == "open":
        wide = pen.vary(54, 62)
        out = wide + 11
        pen.polygon([(0, -4), (-out, -16), (-out, 62), (0, 78), (out, 62), (out, -16)], "body", edge=1.4)
        for side in (-1, 1):
            pen.blob([(0, 2), (side * wide * 0.4, -14), (side * wide, -9), (side * wide, 20), (side * wide, 46),
                     (side * wide * 0.4, 43), (0, 58), (0, 30)], "paper", edge=1)  # fmt: skip
            for row in range(4):
                y = 4 + row * 10
                pen.line([(side * wide * 0.2, y + 3), (side * wide * 0.84, y - 3)], 2.2, "metal_dark")
        pen.line([(0, 2), (0, 62)], 2, "metal_dark")
        return
    wide = pen.vary(56, 64)
    pen.polygon([(6, -8), (wide + 8, -8), (wide + 8, 74), (6, 82)], "paper", edge=1.2)
    pen.line([(wide + 5, -4), (wide + 5, 74)], 1, "metal_dark")
    pen.rectangle(0, 0, wide, 84, "body", radius=2, edge=1.4)
    pen.rectangle(0, 0, 10, 84, "body_dark", edge=1)
    pen.rectangle(18, 14, wide - 8, 30, "body_light", edge=1)
    pen.rectangle(22, 20, wide - 12, 24, "line")
    pen.ellipse((wide + 10) / 2, 56, 10, 10, "body_light", edge=1)


def laptop(pen: Pen, look: Look) -> None:
    """Open: a screen over a keyboard; closed: a thin slab with a round badge."""
    wide = pen.vary(56, 62)
    if look.state == "closed":
        pen.polygon([(-wide + 10, -20), (wide - 10, -20), (wide + 8, 16), (-wide - 8, 16)], "body", edge=1.4)
        pen.rectangle(-wide - 8, 15, wide + 8, 23, "metal", radius=3, edge=1)
        pen.rectangle(-14, 15, 14, 18, "metal_dark")
        pen.ellipse(0, -3, 9, 6, "body_light", edge=1)
        return
    pen.rectangle(-wide, -70, wide, 4, "body", radius=5, edge=1.4)
    pen.rectangle(-wide + 12, -59, wide - 12, -8, "night")
    pen.rectangle(-wide + 14, -57, wide - 14, -10, "screen")
    pen.rectangle(-wide + 20, -52, -4, -34, "paper")
    for y in (-48, -40, -26, -18):
        pen.line([(4 if y < -30 else -wide + 20, y), (wide - 20, y)], 2.6, "night")
    pen.polygon([(-wide, 4), (wide, 4), (wide + 16, 30), (-wide - 16, 30)], "body", edge=1.4)
    for row in range(3):
        y = 8 + row * 5.5
        half = wide - 6 + row * 3
        pen.line([(-half, y), (half, y)], 3.2, "ink")
    pen.polygon([(-14, 24), (14, 24), (15, 29), (-15, 29)], "body_dark")
    pen.rectangle(-wide - 16, 30, wide + 16, 35, "body_dark", radius=2)


SHAPES = (
    Shape("clock", clock),
    Shape("cup", cup),
    Shape("bottle", bottle),
    Shape("umbrella", umbrella),
    Shape("book", book),
    Shape("laptop", laptop),
)
