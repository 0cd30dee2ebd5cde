"""Signs with words, flags and balls."""

from __future__ import annotations

from foveate.errors import InputError
from foveate.world.pen import Look, Pen
from foveate.world.shapes.shape import Shape


def sign(pen: Pen, look: Look) -> None:
    """A board on a post with a word on a white field framed in the object's colour."""
    if look.text is None:
        raise InputError("a sign needs a text: give the look a word of letters A-Z")
    word = look.text
    wide = pen.vary(54, 58)
    pen.rectangle(-5, 30, 5, 88, "metal", edge=1)
    pen.rectangle(-wide, -32, wide, 40, "body", radius=7, edge=1.4)
    pen.rectangle(-wide + 7, -15, wide - 7, 23, "paper", radius=2)
    half = min(wide - 10, 5.4 * 2.25 * len(word))
    pen.text(-half, -11, half, 19, word, "ink")
    pen.ellipse(0, -24, 3, 3, "body_light")
    pen.ellipse(0, 32, 3, 3, "body_light")


def flag(pen: Pen, look: Look) -> None:
    """A waving cloth on a pole with a knob."""
    wave = pen.vary(5, 9)
    length = pen.vary(74, 86)
    pen.line([(0, -52), (0, 76)], 6, "wood")
    pen.ellipse(0, -57, 6, 6, "flame", edge=1)
    top = [(2.0, -46.0), (length * 0.3, -46 - wave), (length * 0.65, -46 + wave), (length, -46 - wave * 0.4)]
    bottom = [(x, y + 66) for x, y in reversed(top)]
    upper, lower = Pen(0), Pen(0)
    upper.curve(top, 0.01, "body")
    lower.curve(bottom, 0.01, "body")
    count = len(upper.polygons[0]) // 2
    edge = [(float(x), float(y)) for x, y in upper.polygons[0][:count]]
    edge += [(float(x), float(y)) for x, y in lower.polygons[0][:count]]
    pen.polygon(edge, "body", edge=1.6)
    pen.curve([(length * 0.3, -46 - wave), (length * 0.34, -14), (length * 0.3, 20 - wave)], 2, "body_dark")
    pen.curve([(length * 0.65, -46 + wave), (length * 0.69, -12), (length * 0.65, 20 + wave)], 2, "body_light")


def ball(pen: Pen, look: Look) -> None:
    """A basketball's seams on a sphere."""
    tilt = pen.vary(-25, 25)
    pen.ellipse(0, 0, 50, 50, "body", edge=1.4)
    with pen.turned(tilt):
        pen.line([(-49, 0), (49, 0)], 2.6, "line")
        pen.line([(0, -49), (0, 49)], 2.6, "line")
        pen.arc(-58, 0, 40, 50, -50, 50, 2.6, "line")
        pen.arc(58, 0, 40, 50, 130, 230, 2.6, "line")


SHAPES = (Shape("sign", sign), Shape("flag", flag), Shape("ball", ball))
