"""People: man, woman and child, standing, sitting or walking."""

from __future__ import annotations

from foveate.world.pen import RGB, Look, Pen
from foveate.world.shapes.shape import Shape

_SKINS: tuple[RGB, ...] = ((241, 203, 170), (224, 172, 132), (188, 132, 92), (136, 92, 62))
_HAIRS: tuple[RGB, ...] = ((58, 40, 28), (34, 28, 28), (96, 62, 36), (140, 96, 50))


def _legs(pen: Pen, look: Look, hip: float, ground: float, spread: float, width: float, paint: str | RGB) -> None:
    """Two legs with shoes, centred on x = 0, for the pose."""
    knee = (hip + ground) / 2
    shoe = width * 0.95
    if look.pose == "walking":
        stride = (ground - hip) * 0.42
        pen.curve([(1, hip), (stride * 0.55, knee), (stride, ground - 3)], width, paint, width * 0.8)
        pen.curve([(-1, hip), (-stride * 0.62, knee), (-stride * 0.8, ground - 3)], width, paint, width * 0.8)
        pen.ellipse(stride - shoe * 0.4, ground - 2, shoe, 3.4, "ink")
        pen.ellipse(-stride * 0.8 - shoe * 0.4, ground - 2, shoe, 3.4, "ink")
        return
    for side in (-1, 1):
        pen.line([(side * spread, hip), (side * spread, ground - 4)], width, paint)
        pen.ellipse(side * (spread + 2), ground - 2.5, shoe * 0.8, 3.6, "ink")


def _sitting_legs(pen: Pen, hip: float, reach: float, drop: float, width: float, paint: str | RGB) -> None:
    """Thighs forward (to the left), shins down, on a stool."""
    pen.rectangle(-13, hip + width * 0.45, 17, hip + width * 0.45 + 4, "wood")
    pen.line([(-9, hip + width * 0.5 + 4), (-10, hip + drop)], 3, "wood_dark")
    pen.line([(13, hip + width * 0.5 + 4), (14, hip + drop)], 3, "wood_dark")
    for shift in (5, -1):
        bent = [(2.0, hip), (-reach + shift, hip), (-reach + shift, hip + drop - 3)]
        pen.line(bent, width + 1.6, "line")
        pen.line(bent, width, paint)
    pen.ellipse(-reach - 4, hip + drop - 2, width * 0.9, 3.4, "ink")


def _arms(pen: Pen, look: Look, shoulder: float, reach: float, width: float, paint: str | RGB, skin: RGB) -> None:
    """Two arms from shoulders at +-reach: hanging, swinging, or on the knees."""
    length = 34 * reach / 17
    hands: list[tuple[float, float]]
    if look.pose == "walking":
        hands = [(-reach - 13, shoulder + length * 0.72), (reach + 12, shoulder + length * 0.74)]
    elif look.pose == "sitting":
        hands = [(-reach - 6, shoulder + length * 0.88), (reach - 2, shoulder + length * 0.95)]
    else:
        hands = [(-reach - 5, shoulder + length), (reach + 5, shoulder + length)]
    for side, (x, y) in zip((-1, 1), hands, strict=True):
        elbow = (side * (reach + 5), shoulder + length * 0.5)
        pen.curve([(side * reach, shoulder + 2), elbow, (x, y)], width, paint, width * 0.8)
        pen.ellipse(x, y, width * 0.5, width * 0.5, skin)


def _face(pen: Pen, cy: float, size: float) -> None:
    for side in (-1, 1):
        pen.ellipse(side * size * 0.4, cy, size * 0.12, size * 0.16, "ink")
    pen.arc(0, cy + size * 0.2, size * 0.34, size * 0.3, 30, 150, size * 0.11, (150, 60, 54))


def man(pen: Pen, look: Look) -> None:
    """Broad shoulders, short hair, moustache, tie, long trousers."""
    skin, hair = pen.choose(_SKINS), pen.choose(_HAIRS)
    broad = pen.vary(0.92, 1.1)
    if look.pose == "sitting":
        _sitting_legs(pen, 84, 24, 40, 12, "body_dark")
    else:
        _legs(pen, look, 82, 148, 7.5, 13, "body_dark")
    _arms(pen, look, 42, 18 * broad, 10, "body", skin)
    pen.rectangle(-5, 26, 5, 40, skin)
    pen.polygon([(-20 * broad, 38), (-8, 33), (8, 33), (20 * broad, 38), (16, 88), (-16, 88)], "body", edge=1.2)
    pen.polygon([(-7, 33), (7, 33), (0, 45)], "paper")
    pen.polygon([(-2.5, 36), (2.5, 36), (3.6, 60), (0, 65), (-3.6, 60)], "ink")
    pen.rectangle(-16, 82, 16, 87, "ink")
    pen.ellipse(0, 17, 11.5, 14, skin)
    pen.pie(0, 12.5, 12.5, 12, 178, 362, hair, chord=True)
    pen.rectangle(-12.5, 11, -9.5, 18, hair)
    pen.rectangle(9.5, 11, 12.5, 18, hair)
    _face(pen, 17, 11)
    pen.curve([(-6, 24), (0, 21.5), (6, 24)], 3.6, hair)


def woman(pen: Pen, look: Look) -> None:
    """Long hair, waist, wide skirt, bare legs."""
    skin, hair = pen.choose(_SKINS), pen.choose(_HAIRS)
    flare = pen.vary(0.92, 1.12)
    pen.blob([(0, 2), (14, 10), (16, 30), (19, 52), (8, 54), (-8, 54), (-19, 52), (-16, 30), (-14, 10)], hair)
    if look.pose == "sitting":
        _sitting_legs(pen, 84, 26, 40, 9, skin)
    else:
        _legs(pen, look, 100, 148, 7, 7.5, skin)
    _arms(pen, look, 42, 14.5, 7, skin, skin)
    pen.rectangle(-4, 26, 4, 38, skin)
    pen.blob([(-13, 38), (0, 42), (13, 38), (13, 50), (9, 64), (12, 74), (-12, 74), (-9, 64), (-13, 50)], "body")
    if look.pose == "sitting":
        pen.blob([(-9, 63), (10, 63), (17, 88), (4, 94), (-26, 95), (-30, 82), (-14, 76)], "body", edge=1.2)
    else:
        pen.polygon([(-9, 62), (9, 62), (30 * flare, 118), (-30 * flare, 118)], "body", edge=1.2)
        pen.polygon([(-28 * flare, 113), (28 * flare, 113), (30.5 * flare, 119), (-30.5 * flare, 119)], "body_dark")
    pen.rectangle(-10, 61, 10, 66, "body_light")
    pen.ellipse(0, 17, 10.5, 13, skin)
    pen.blob([(-11, 20), (-11, 8), (0, 2), (11, 8), (11, 20), (6, 11), (-2, 9), (-8, 13)], hair)
    _face(pen, 18, 10.5)


def child(pen: Pen, look: Look) -> None:
    """Big head with a peaked cap, short body in dungarees."""
    skin, hair = pen.choose(_SKINS), pen.choose(_HAIRS)
    head = pen.vary(0.95, 1.06)
    if look.pose == "sitting":
        _sitting_legs(pen, 66, 20, 26, 12, "body_dark")
    else:
        _legs(pen, look, 66, 98, 7.5, 12, "body_dark")
    _arms(pen, look, 46, 13, 8, "paper", skin)
    pen.rectangle(-14, 42, 14, 60, "paper", radius=6)
    pen.rectangle(-15, 52, 15, 74, "body", radius=5, edge=1.2)
    pen.line([(-9, 42), (-9, 54)], 5, "body")
    pen.line([(9, 42), (9, 54)], 5, "body")
    pen.ellipse(-9, 55, 2, 2, "flame")
    pen.ellipse(9, 55, 2, 2, "flame")
    pen.ellipse(-19.5 * head, 26, 4, 5, skin)
    pen.ellipse(19.5 * head, 26, 4, 5, skin)
    pen.ellipse(0, 24, 20 * head, 20, skin)
    pen.pie(0, 18, 20.5 * head, 8, 0, 180, hair, chord=True)
    pen.pie(0, 18, 21 * head, 19, 180, 360, "body", chord=True, edge=1.2)
    pen.ellipse(-16, 18, 19, 4, "body_dark")
    pen.ellipse(0, -1, 3.4, 3, "body_light")
    _face(pen, 28, 17)


SHAPES = (Shape("man", man), Shape("woman", woman), Shape("child", child))
