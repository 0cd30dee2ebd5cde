"""Animals, drawn facing left."""

from __future__ import annotations

from collections.abc import Callable

from foveate.world.pen import Look, Pen, Point
from foveate.world.shapes.shape import Shape


def _eye(pen: Pen, x: float, y: float, size: float) -> None:
    pen.ellipse(x, y, size, size * 1.1, "paper")
    pen.ellipse(x - size * 0.25, y, size * 0.6, size * 0.75, "ink")


def _dog_head(pen: Pen, x: float, y: float) -> None:
    pen.ellipse(x, y, 14, 13, "body", edge=1.2)
    pen.blob([(x - 6, y - 5), (x - 24, y - 1), (x - 25, y + 9), (x - 6, y + 12)], "body_light")
    pen.ellipse(x - 24, y + 1, 4.2, 3.6, "ink")
    pen.curve([(x - 24, y + 5), (x - 17, y + 8), (x - 10, y + 6)], 1.6, "ink")
    pen.blob([(x - 18, y + 8), (x - 13, y + 8), (x - 14, y + 17), (x - 18, y + 17)], "tongue")
    _eye(pen, x - 6, y - 3, 3.2)
    pen.blob(
        [(x + 2, y - 13), (x + 14, y - 10), (x + 17, y + 8), (x + 10, y + 16), (x + 3, y + 5)], "body_dark", edge=1
    )


def _cat_head(pen: Pen, x: float, y: float) -> None:
    for side in (-1, 1):
        pen.polygon([(x + side * 15, y - 1), (x + side * 14, y - 22), (x + side * 2, y - 10)], "body", edge=1.2)
        pen.polygon([(x + side * 12, y - 7), (x + side * 12, y - 17), (x + side * 5.5, y - 9)], "tongue")
    pen.ellipse(x, y, 16, 13, "body", edge=1.2)
    for side in (-1, 1):
        pen.ellipse(x + side * 6, y - 2, 3.6, 3.8, (214, 226, 90))
        pen.ellipse(x + side * 6, y - 2, 1.2, 3.5, "ink")
        for rise in (-2, 3):
            pen.line([(x + side * 6, y + 5 + rise * 0.3), (x + side * 23, y + 5 + rise)], 1.1, "line")
    pen.ellipse(x, y + 6.5, 6, 4.2, "body_light")
    pen.polygon([(x - 2.4, y + 3.5), (x + 2.4, y + 3.5), (x, y + 6.5)], "tongue")


def _horse_head(pen: Pen, x: float, y: float) -> None:
    pen.polygon([(x - 1, y - 9), (x + 3, y - 19), (x + 7, y - 7)], "body", edge=1)
    pen.blob([(x + 8, y - 9), (x + 11, y + 6), (x - 2, y + 12), (x - 18, y + 25), (x - 27, y + 22), (x - 25, y + 12),
             (x - 8, y - 6)], "body", edge=1.2)  # fmt: skip
    pen.blob([(x - 18, y + 11), (x - 16, y + 24), (x - 26, y + 24), (x - 27, y + 14)], "body_dark")
    pen.ellipse(x - 23.5, y + 16, 1.6, 1.8, "ink")
    _eye(pen, x - 4, y - 1, 2.6)


def _rabbit_head(pen: Pen, x: float, y: float) -> None:
    for lean, paint in ((9, "body_dark"), (-1, "body")):
        pen.ellipse(x + 4 + lean, y - 27, 5.5, 20, paint, angle=lean * 1.5 + 4, edge=1.2)
    pen.ellipse(x + 3, y - 26, 2.3, 14, "tongue", angle=2.5)
    pen.ellipse(x, y, 15, 13, "body", edge=1.2)
    pen.ellipse(x - 8, y + 4, 7.5, 6, "body_light")
    pen.ellipse(x - 14, y + 1.5, 2.4, 2, "tongue")
    pen.rectangle(x - 13, y + 7.5, x - 9, y + 13, "paper", edge=0.6)
    _eye(pen, x - 4, y - 4, 3.2)


def _quadruped(
    pen: Pen,
    look: Look,
    head: Callable[[Pen, float, float], None],
    tail: Callable[[Pen, float, float, bool], None],
    length: float,
    depth: float,
    leg: float,
    leg_width: float,
    neck: Point,
    neck_width: float,
    foot: str = "body_light",
    mane: Callable[[Pen, Point, Point], None] | None = None,
) -> None:
    """A body from shoulder at x = 0 to hip at x = ``length``, on the ground at y = 0, in one of three poses."""

    def limb(points: list[Point], paint: str) -> None:
        pen.curve(points, leg_width * 1.15, paint, leg_width * 0.85)
        x, y = points[-1]
        pen.ellipse(x - leg_width * 0.3, y, leg_width * 0.8, leg_width * 0.5, foot)

    toe = -leg_width * 0.5
    if look.pose == "sitting":
        shoulder, hip = (4.0, -leg - depth * 0.9), (length * 0.62, -depth * 0.7)
        tail(pen, hip[0] + depth * 0.55, -leg_width, True)
        limb([(shoulder[0] + 6, shoulder[1]), (shoulder[0] + 6, toe)], "body_dark")
        pen.curve([shoulder, ((shoulder[0] + hip[0]) / 2 + 3, (shoulder[1] + hip[1]) / 2), hip], depth * 1.05, "body",
                  depth * 1.5)  # fmt: skip
        pen.ellipse(hip[0], -depth * 0.62, depth * 0.72, depth * 0.62, "body", edge=1.2)
        pen.ellipse(hip[0] - depth * 0.6, toe, leg_width * 1.4, leg_width * 0.55, foot)
        limb([shoulder, (shoulder[0] - 2, toe)], "body")
    elif look.pose == "lying":
        shoulder, hip = (4.0, -depth * 0.62), (length, -depth * 0.5)
        tail(pen, hip[0] + depth * 0.5, -leg_width * 0.6, True)
        pen.blob([(-depth * 0.4, -depth * 0.5), (0, -depth * 1.02), (length * 0.5, -depth), (length, -depth * 1.02),
                 (length + depth * 0.5, -depth * 0.4), (length, 0), (0, 0)], "body")  # fmt: skip
        pen.ellipse(length * 0.98, -depth * 0.42, depth * 0.5, depth * 0.42, "body", edge=1.2)
        limb([(length * 0.9, toe), (length * 0.62, toe)], "body_dark")
        limb([(6, toe * 1.2), (-leg * 0.55 - depth * 0.4, toe)], "body")
    else:
        top = -leg - depth * 0.5
        shoulder, hip = (2.0, top), (length, top)
        tail(pen, length + depth * 0.42, top - depth * 0.2, False)
        for x in (8.0, length - 8.0):
            limb([(x, top), (x + 1, -leg * 0.5), (x, toe)], "body_dark")
        pen.blob([(-depth * 0.45, top - depth * 0.1), (0, top - depth * 0.52), (length * 0.5, top - depth * 0.45),
                 (length, top - depth * 0.55), (length + depth * 0.46, top), (length + 2, top + depth * 0.5),
                 (length * 0.5, top + depth * 0.42), (2, top + depth * 0.55)], "body", edge=1.2)  # fmt: skip
        for x in (0.0, length):
            limb([(x, top), (x - 2, -leg * 0.5), (x, toe)], "body")
    crown = (shoulder[0] + neck[0], shoulder[1] + neck[1])
    if mane is not None:
        mane(pen, shoulder, crown)
    pen.line([shoulder, crown], neck_width, "body")
    head(pen, *crown)


def dog(pen: Pen, look: Look) -> None:
    """Floppy ear, long muzzle with tongue, collar, raised tail."""

    def tail(pen: Pen, x: float, y: float, low: bool) -> None:
        end = (x + 24, y - 6) if low else (x + 12, y - 26)
        pen.curve([(x - 6, y + 3), (x + 8, y - 4), end], 7, "body", 3)

    length = 44 * pen.vary(0.92, 1.1)
    _quadruped(pen, look, _dog_head, tail, length, 27, 27 * pen.vary(0.9, 1.1), 9, (-14, -22), 16)
    if look.pose is not None:
        crown_x, crown_y = {"sitting": (4, -51), "lying": (4, -17)}.get(look.pose, (2, -40))
        pen.line([(crown_x - 14, crown_y - 3), (crown_x + 1, crown_y - 8)], 4, (200, 60, 50))


def cat(pen: Pen, look: Look) -> None:
    """Pointed ears, whiskers, slit eyes, long thin tail in an S."""

    def tail(pen: Pen, x: float, y: float, low: bool) -> None:
        if low:
            pen.curve([(x - 8, y), (x + 10, y - 2), (x + 20, y - 10), (x + 30, y - 6)], 5.5, "body", 5)
        else:
            pen.curve([(x - 6, y), (x + 8, y - 8), (x + 6, y - 26), (x + 16, y - 38)], 5.5, "body", 5)

    _quadruped(pen, look, _cat_head, tail, 40 * pen.vary(0.92, 1.1), 21, 17 * pen.vary(0.9, 1.15), 7, (-10, -18), 12)


def horse(pen: Pen, look: Look) -> None:
    """Long legs with hooves, upright neck with mane, long face, hanging tail."""

    def tail(pen: Pen, x: float, y: float, low: bool) -> None:
        end = (x + 22, y) if low else (x + 12, y + 36)
        pen.curve([(x - 6, y), (x + 9, y + (0 if low else 6)), end], 6, "ink", 9)

    def mane(pen: Pen, shoulder: Point, crown: Point) -> None:
        pen.line([(shoulder[0] + 14, shoulder[1] - 4), (crown[0] + 9, crown[1] - 8)], 14, "ink")

    height = 46 * pen.vary(0.92, 1.08)
    _quadruped(pen, look, _horse_head, tail, 58 * pen.vary(0.94, 1.1), 30, height, 8, (-16, -38), 19, "ink", mane)


def rabbit(pen: Pen, look: Look) -> None:
    """Long upright ears, front teeth, round body, puff of a tail."""

    def tail(pen: Pen, x: float, y: float, low: bool) -> None:
        pen.ellipse(x + 3, y - (6 if low else -2), 8, 8, "paper", edge=0.8)

    _quadruped(pen, look, _rabbit_head, tail, 26 * pen.vary(0.9, 1.1), 32, 11, 9, (-12, -16), 16)


def elephant(pen: Pen, look: Look) -> None:
    """Trunk, tusk, one big ear, pillar legs."""
    girth = pen.vary(0.94, 1.08)
    pen.curve([(108, 40), (118, 52), (116, 74)], 3.5, "body_dark")
    pen.ellipse(116, 76, 3, 5, "ink")
    for x, paint in ((48, "body_dark"), (90, "body_dark"), (34, "body"), (102, "body")):
        pen.rectangle(x - 10, 60, x + 10, 112, paint, radius=4)
        for toe in (-6, 0, 6):
            pen.ellipse(x + toe, 110, 2.4, 2.6, "paper")
    pen.ellipse(70, 48, 44 * girth, 33, "body", edge=1.2)
    pen.ellipse(26, 38, 24, 26, "body", edge=1.2)
    pen.curve([(12, 44), (3, 66), (4, 88), (-8, 100), (-18, 94)], 17, "body", 8)
    for rise in (62, 70, 78, 86):
        pen.line([(-1, rise), (8, rise - 1)], 1.4, "line")
    pen.curve([(15, 58), (6, 70), (-10, 70)], 5, "paper", 2)
    pen.blob([(34, 14), (58, 12), (64, 40), (52, 64), (38, 56), (30, 36)], "body_dark", edge=1.4)
    _eye(pen, 18, 32, 3.2)


def bird(pen: Pen, look: Look) -> None:
    """Perched on a twig with folded wing, or flying with spread wings."""
    plump = pen.vary(0.94, 1.1)
    if look.pose == "flying":
        pen.polygon([(52, 2), (104, -14), (104, 0), (98, 14), (56, 14)], "body_dark")
        pen.blob([(36, -2), (50, -34), (70, -58), (74, -30), (70, -2)], "body_dark", edge=1.2)
        pen.ellipse(36, 2, 36, 17 * plump, "body", edge=1.2)
        pen.blob([(28, 4), (50, 0), (66, 8), (78, 30), (72, 52), (50, 34)], "body", edge=1.4)
        for end in ((72, 46), (60, 38)):
            pen.line([(46, 14), end], 1.5, "line")
        pen.ellipse(0, -6, 15, 14, "body", edge=1.2)
        pen.ellipse(30, 12, 22, 6, "body_light")
        pen.polygon([(-12, -11), (-30, -4), (-12, 0)], "beak")
        _eye(pen, -4, -9, 3.4)
        return
    pen.polygon([(44, 42), (74, 88), (62, 92), (38, 62)], "body_dark", edge=1.2)
    for x in (18, 28):
        pen.line([(x, 62), (x - 1, 88)], 3, "beak")
    pen.line([(-16, 90), (52, 90)], 6, "trunk")
    pen.ellipse(24, 44, 26 * plump, 25, "body", edge=1.2)
    pen.ellipse(12, 50, 13, 17, "body_light")
    pen.blob([(22, 30), (44, 34), (58, 64), (40, 60), (26, 50)], "body_dark", edge=1.4)
    pen.ellipse(8, 16, 17, 16, "body", edge=1.2)
    pen.polygon([(-7, 10), (-24, 17), (-7, 22)], "beak")
    _eye(pen, 3, 12, 3.8)


def fish(pen: Pen, look: Look) -> None:
    """Oval body, forked tail, fins, gill and scales."""
    tall = pen.vary(0.9, 1.12)
    pen.blob([(84, 0), (118, -28), (110, 0), (118, 28)], "body_dark", edge=1.2)
    pen.polygon([(34, -20), (54, -42), (76, -34), (78, -12)], "body_dark", edge=1.2)
    pen.polygon([(46, 20), (60, 38), (72, 16)], "body_dark", edge=1.2)
    pen.blob(
        [(0, 2), (24, -24 * tall), (60, -24 * tall), (92, -5), (92, 5), (60, 24 * tall), (24, 24 * tall)], "body", 1.2
    )
    for x in (44, 58, 72):
        for y in (-9, 5):
            pen.arc(x, y, 6, 6, -80, 80, 1.6, "line")
    pen.arc(14, 0, 16, 18 * tall, -60, 60, 2.2, "line")
    pen.blob([(34, 4), (50, 6), (54, 16), (40, 14)], "body_light", edge=1)
    pen.ellipse(14, -7, 5.5, 5.5, "paper")
    pen.ellipse(13, -7, 2.8, 2.8, "ink")
    pen.curve([(1, 6), (6, 9), (10, 8)], 2, "ink")


SHAPES = (
    Shape("dog", dog),
    Shape("cat", cat),
    Shape("horse", horse),
    Shape("bird", bird),
    Shape("fish", fish),
    Shape("rabbit", rabbit),
    Shape("elephant", elephant),
)
