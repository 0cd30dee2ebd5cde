"""Vehicles, drawn facing left."""

from __future__ import annotations

import math

from foveate.world.pen import Look, Pen
from foveate.world.shapes.shape import Shape


def _wheel(pen: Pen, x: float, y: float, radius: float) -> None:
    pen.ellipse(x, y, radius, radius, "tyre")
    pen.ellipse(x, y, radius * 0.52, radius * 0.52, "metal")
    pen.ellipse(x, y, radius * 0.2, radius * 0.2, "metal_dark")


def car(pen: Pen, look: Look) -> None:
    """Low saloon with a bonnet, sloping screens and two wheels."""
    roof = pen.vary(-36, -31)
    pen.blob([(0, 8), (2, -6), (26, -12), (36, -14), (44, roof + 3), (56, roof), (82, roof), (94, roof + 5), (108, -13),
             (124, -9), (128, 8), (124, 14), (4, 14)], "body", edge=1.2)  # fmt: skip
    pen.polygon([(42, -13), (51, roof + 6), (66, roof + 5), (66, -13)], "glass")
    pen.polygon([(71, -13), (71, roof + 5), (86, roof + 6), (99, -13)], "glass")
    pen.line([(68.5, roof + 6), (68.5, 12)], 1.6, "line")
    pen.rectangle(74, -7, 82, -4.5, "line", radius=1)
    pen.ellipse(5, -1, 4, 4.5, "flame")
    pen.rectangle(121, -5, 127, 2, (214, 50, 44), radius=1)
    pen.rectangle(-1, 8, 10, 14, "metal", radius=2)
    pen.rectangle(118, 8, 129, 14, "metal", radius=2)
    for x in (28, 99):
        pen.ellipse(x, 13, 15.5, 15, "ink")
        _wheel(pen, x, 14, 13)


def bus(pen: Pen, look: Look) -> None:
    """A long tall box with a row of windows and a door."""
    length = pen.vary(138, 156)
    pen.rectangle(0, 0, length, 62, "body", radius=9, edge=1.4)
    pen.rectangle(4, 9, 18, 36, "glass", radius=3)
    pen.rectangle(22, 11, 34, 60, "night", radius=2)
    pen.rectangle(23.5, 13, 32.5, 58, "glass")
    pen.line([(28, 12), (28, 59)], 1.6, "night")
    count = 5
    pitch = (length - 44) / count
    for i in range(count):
        pen.rectangle(39 + i * pitch, 11, 39 + (i + 0.82) * pitch, 33, "glass", radius=2)
    pen.rectangle(38, 42, length - 4, 47, "body_light")
    pen.rectangle(2, 2.5, 30, 7, "ink", radius=1)
    pen.ellipse(4, 52, 3, 3.5, "flame")
    for x in (50, length - 26):
        pen.pie(x, 62, 14, 14, 180, 360, "ink", chord=True)
        _wheel(pen, x, 63, 11)


def truck(pen: Pen, look: Look) -> None:
    """Cab in front, a high cargo box behind, three wheels."""
    length = pen.vary(118, 134)
    pen.rectangle(28, 54, length, 61, "metal_dark")
    pen.polygon([(0, 60), (0, 38), (9, 14), (34, 14), (34, 60)], "body_dark", edge=1.4)
    pen.polygon([(6, 36), (13, 19), (28, 19), (28, 36)], "glass")
    pen.rectangle(24, 41, 30, 43, "line")
    pen.rectangle(38, -8, length, 54, "body", radius=2, edge=1.6)
    for i in range(1, 5):
        x = 38 + (length - 38) * i / 5
        pen.line([(x, -5), (x, 51)], 1.4, "line")
    pen.rectangle(29, 0, 33, 14, "metal")
    pen.rectangle(-4, 54, 10, 61, "metal", radius=1)
    pen.ellipse(2, 47, 3, 3.5, "flame")
    for x in (18, length - 42, length - 16):
        _wheel(pen, x, 62, 12)


def bicycle(pen: Pen, look: Look) -> None:
    """Two spoked wheels and a diamond frame."""
    base = pen.vary(62, 70)
    for x in (0.0, base):
        pen.arc(x, 0, 27, 27, 0, 360, 3.5, "tyre")
        pen.arc(x, 0, 22.5, 22.5, 0, 360, 6, "body")
        for k in range(6):
            angle = math.pi * k / 6
            dx, dy = 20 * math.cos(angle), 20 * math.sin(angle)
            pen.line([(x - dx, -dy), (x + dx, dy)], 1.0, "metal")
        pen.ellipse(x, 0, 3.5, 3.5, "metal_dark")
    crank, seat, head = (base * 0.48, 3.0), (base * 0.62, -36.0), (14.0, -38.0)
    width = 8.0
    pen.line([(base, 0), crank, seat, (base, 0)], width * 0.9, "body")
    pen.line([crank, (head[0] - 2, head[1] + 8)], width, "body")
    pen.line([seat, head], width, "body")
    pen.line([(0, 0), head, (head[0] + 3, -52)], width, "body")
    pen.curve([(head[0] + 5, -52), (2, -55), (-5, -46)], 4.5, "ink")
    pen.line([seat, (seat[0] + 2, -46)], 3.5, "metal_dark")
    pen.blob([(seat[0] - 12, -50), (seat[0] + 14, -52), (seat[0] + 14, -45), (seat[0] - 4, -46)], "ink")
    pen.ellipse(*crank, 7, 7, "metal_dark")
    pen.line([(crank[0] - 8, 13), crank, (crank[0] + 8, -7)], 2.6, "ink")
    pen.line([(crank[0] - 12, 13), (crank[0] - 4, 13)], 3.5, "ink")


def boat(pen: Pen, look: Look) -> None:
    """A hull in the object's colour under a mast with white and coloured sails."""
    mast = pen.vary(-92, -80)
    pen.line([(60, 2), (60, mast)], 4, "wood")
    pen.polygon([(65, mast + 6), (65, -8), (112, -8)], "body", edge=1.2)
    pen.polygon([(55, mast + 12), (55, -8), (14, -8)], "paper", edge=1.2)
    pen.polygon([(60, mast - 10), (60, mast + 2), (76, mast - 4)], "tomato")
    pen.polygon([(-8, 0), (128, 0), (112, 34), (22, 34)], "body", edge=1.4)
    pen.polygon([(-8, 0), (128, 0), (126, 6), (-3, 6)], "wood")
    for x in (40, 62, 84):
        pen.ellipse(x, 18, 5, 5, "paper")
        pen.ellipse(x, 18, 3.4, 3.4, "night")


def airplane(pen: Pen, look: Look) -> None:
    """Airliner in side view: tube, swept wings, tail fin, round windows."""
    length = pen.vary(142, 158)
    pen.polygon([(66, -4), (88, -46), (100, -46), (94, -4)], "body_dark", edge=1.2)
    pen.polygon([(length - 36, -10), (length - 10, -48), (length + 6, -48), (length - 4, -4)], "body_dark", edge=1.2)
    pen.blob([(0, 4), (6, -8), (26, -16), (length - 40, -16), (length, -10), (length - 4, 0), (length - 50, 15),
             (28, 16), (6, 12)], "body", edge=1.2)  # fmt: skip
    pen.polygon([(8, -6), (14, -13), (26, -13), (24, -6)], "glass")
    for i in range(8):
        x = 38 + i * (length - 74) / 8
        pen.ellipse(x, -5, 3.2, 3.8, "night")
    pen.rectangle(70, 20, 92, 32, "metal", radius=5)
    pen.ellipse(71, 26, 3, 6, "ink")
    pen.polygon([(60, 4), (90, 4), (124, 46), (108, 46)], "body", edge=1.4)
    pen.polygon([(length - 26, -3), (length - 8, -3), (length + 14, 14), (length + 2, 14)], "body", edge=1.2)


SHAPES = (
    Shape("car", car),
    Shape("bus", bus),
    Shape("truck", truck),
    Shape("bicycle", bicycle),
    Shape("boat", boat),
    Shape("airplane", airplane),
)
