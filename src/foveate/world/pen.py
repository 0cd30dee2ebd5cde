"""A small vector pen: shapes are recorded as filled polygons, fitted to a pixel box and rendered with anti-aliasing.

A drawing function works in any units it likes (y grows downwards); the pen fits what was drawn to the box exactly, so
every drawing is tight by construction. Colours are indices into a palette while drawing, which is what lets a single
8-bit canvas carry the picture and the mask of the parts that take the object's own colour, pattern and finish.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

from foveate.errors import InputError

RGB = tuple[int, int, int]
Point = tuple[float, float]

PATTERNS = ("plain", "striped", "dotted", "checked")
FINISHES = ("matte", "shiny", "wooden", "furry")

NAMED_PAINTS: dict[str, RGB] = {
    "ink": (30, 28, 32),
    "paper": (244, 242, 236),
    "skin": (224, 172, 132),
    "hair": (70, 46, 32),
    "wood": (150, 104, 62),
    "wood_dark": (104, 70, 42),
    "metal": (168, 174, 182),
    "metal_dark": (104, 110, 118),
    "tyre": (38, 38, 42),
    "glass": (168, 208, 226),
    "leaf": (66, 138, 60),
    "leaf_dark": (44, 100, 48),
    "trunk": (112, 78, 48),
    "beak": (238, 160, 40),
    "flame": (255, 214, 84),
    "glow": (255, 243, 178),
    "night": (46, 52, 72),
    "cream": (250, 232, 196),
    "crust": (206, 150, 84),
    "cheese": (246, 212, 110),
    "tomato": (198, 52, 40),
    "soil": (96, 66, 46),
    "pot": (178, 96, 64),
    "coffee": (92, 58, 36),
    "water": (92, 158, 216),
    "tongue": (226, 108, 120),
    "screen": (92, 196, 226),
    "straw": (214, 178, 100),
}
# Index 0 of the canvas is "nothing drawn here"; 1-4 depend on the look; the rest are named or explicit colours.
_LOOK_PAINTS = {"clear": 0, "body": 1, "body_dark": 2, "body_light": 3, "line": 4}
_FIRST_FREE = 5

_ANGLES = np.linspace(0.0, 2.0 * math.pi, 33)[:-1]
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
_SMALL_CIRCLE = _CIRCLE[::3]
_STEPS = np.linspace(0.0, 1.0, 7)[:-1]
# Catmull-Rom basis: row k gives the weights of the four control points at parameter _STEPS[k].
_SPLINE = 0.5 * np.stack(
    [
        -_STEPS + 2 * _STEPS**2 - _STEPS**3,
        2 - 5 * _STEPS**2 + 3 * _STEPS**3,
        _STEPS + 4 * _STEPS**2 - 3 * _STEPS**3,
        -(_STEPS**2) + _STEPS**3,
    ],
    axis=1,
)

# Capital letters as strokes on a grid of 4 x 6 (x right, y down). Drawn as thick lines, they stay legible at a few
# pixels a letter and need no font file.
_LETTERS: dict[str, tuple[tuple[Point, ...], ...]] = {
    "A": (((0, 6), (2, 0), (4, 6)), ((0.9, 4), (3.1, 4))),
    "B": (((0, 0), (0, 6), (3, 6), (4, 5.2), (4, 3.8), (3, 3), (0, 3)),
          ((0, 0), (2.8, 0), (3.7, 0.8), (3.7, 2.2), (3, 3))),
    "C": (((4, 1.2), (3, 0), (1, 0), (0, 1.2), (0, 4.8), (1, 6), (3, 6), (4, 4.8)),),
    "D": (((0, 0), (0, 6), (2.6, 6), (4, 4.6), (4, 1.4), (2.6, 0), (0, 0)),),
    "E": (((4, 0), (0, 0), (0, 6), (4, 6)), ((0, 3), (3.2, 3))),
    "F": (((4, 0), (0, 0), (0, 6)), ((0, 3), (3.2, 3))),
    "G": (((4, 1.2), (3, 0), (1, 0), (0, 1.2), (0, 4.8), (1, 6), (3, 6), (4, 4.8), (4, 3.2), (2.4, 3.2)),),
    "H": (((0, 0), (0, 6)), ((4, 0), (4, 6)), ((0, 3), (4, 3))),
    "I": (((0.8, 0), (3.2, 0)), ((2, 0), (2, 6)), ((0.8, 6), (3.2, 6))),
    "J": (((4, 0), (4, 4.8), (3, 6), (1, 6), (0, 4.8)),),
    "K": (((0, 0), (0, 6)), ((4, 0), (0, 3.6)), ((1.2, 2.6), (4, 6))),
    "L": (((0, 0), (0, 6), (4, 6)),),
    "M": (((0, 6), (0, 0), (2, 3), (4, 0), (4, 6)),),
    "N": (((0, 6), (0, 0), (4, 6), (4, 0)),),
    "O": (((1, 0), (3, 0), (4, 1.2), (4, 4.8), (3, 6), (1, 6), (0, 4.8), (0, 1.2), (1, 0)),),
    "P": (((0, 6), (0, 0), (3, 0), (4, 0.9), (4, 2.5), (3, 3.4), (0, 3.4)),),
    "Q": (((1, 0), (3, 0), (4, 1.2), (4, 4.8), (3, 6), (1, 6), (0, 4.8), (0, 1.2), (1, 0)), ((2.6, 4.4), (4.2, 6.4))),
    "R": (((0, 6), (0, 0), (3, 0), (4, 0.9), (4, 2.3), (3, 3.2), (0, 3.2)), ((2, 3.2), (4, 6))),
    "S": (((4, 1), (3, 0), (1, 0), (0, 1), (0, 2.1), (1, 3), (3, 3), (4, 3.9), (4, 5), (3, 6), (1, 6), (0, 5)),),
    "T": (((0, 0), (4, 0)), ((2, 0), (2, 6))),
    "U": (((0, 0), (0, 4.8), (1, 6), (3, 6), (4, 4.8), (4, 0)),),
    "V": (((0, 0), (2, 6), (4, 0)),),
    "W": (((0, 0), (0.9, 6), (2, 2.2), (3.1, 6), (4, 0)),),
    "X": (((0, 0), (4, 6)), ((4, 0), (0, 6))),
    "Y": (((0, 0), (2, 3), (4, 0)), ((2, 3), (2, 6))),
    "Z": (((0, 0), (4, 0), (0, 6), (4, 6)),),
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How one object looks.

    Args:
        colour: name of the object's colour, for example ``"red"``.
        rgb: that colour as drawn, 0-255 each.
        pattern: one of ``PATTERNS``.
        finish: one of ``FINISHES``.
        state: ``"open"``, ``"lit"``, ... or ``None`` for categories without states.
        pose: ``"standing"``, ... or ``None``.
        facing: ``"left"``, ``"right"`` or ``None``.
        text: the word on a sign, or ``None``.
        seed: chooses proportions, skin, hair and pattern phase; the same seed gives the same drawing.
    """

    colour: str
    rgb: RGB
    pattern: str = "plain"
    finish: str = "matte"
    state: str | None = None
    pose: str | None = None
    facing: str | None = None
    text: str | None = None
    seed: int = 0


class Pen:
    """Records filled polygons in the drawing's own units.

    A paint is ``"body"`` (the object's colour, pattern and finish), ``"body_dark"`` or ``"body_light"`` (shades of it
    that contrast with it, whatever the colour), ``"line"`` (a thin-line tone that shows on the body), ``"clear"``
    (a hole), a key of ``NAMED_PAINTS`` or an RGB tuple.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.polygons: list[np.ndarray] = []
        self.paints: list[str | RGB] = []
        self.edges: list[float] = []
        self._transform: np.ndarray | None = None

    def vary(self, low: float, high: float) -> float:
        """The next of the seed's numbers, uniform in ``[low, high]``."""
        return self._random.uniform(low, high)

    def choose(self, options: Sequence[RGB]) -> RGB:
        """One of ``options``, by the seed."""
        return self._random.choice(options)

    @contextmanager
    def turned(
        self, degrees: float = 0.0, about: Point = (0.0, 0.0), scale: Point = (1.0, 1.0), shift: Point = (0.0, 0.0)
    ) -> Iterator[None]:
        """Draws what is inside scaled, then turned clockwise about a point, then shifted."""
        angle = math.radians(degrees)
        cos, sin = math.cos(angle), math.sin(angle)
        matrix = np.array([[cos * scale[0], -sin * scale[1], 0.0], [sin * scale[0], cos * scale[1], 0.0], [0, 0, 1.0]])
        centre = np.array(about)
        matrix[:2, 2] = centre - matrix[:2, :2] @ centre + np.array(shift)
        outer = self._transform
        self._transform = matrix if outer is None else outer @ matrix
        try:
            yield
        finally:
            self._transform = outer

    def _add(self, points: np.ndarray, paint: str | RGB, edge: float = 0.0) -> None:
        if self._transform is not None:
            points = points @ self._transform[:2, :2].T + self._transform[:2, 2]
        self.polygons.append(points)
        self.paints.append(paint)
        self.edges.append(edge)

    def polygon(self, points: Sequence[Point], paint: str | RGB, edge: float = 0.0) -> None:
        """A filled polygon; ``edge`` > 0 also draws its contour in the ``"line"`` tone, that wide."""
        self._add(np.array(points, dtype=float), paint, edge)

    def blob(self, points: Sequence[Point], paint: str | RGB, edge: float = 0.0) -> None:
        """A filled smooth closed curve through the points (Catmull-Rom)."""
        self._add(_smooth(np.array(points, dtype=float), closed=True), paint, edge)

    def ellipse(
        self, cx: float, cy: float, rx: float, ry: float, paint: str | RGB, angle: float = 0.0, edge: float = 0.0
    ) -> None:
        """A filled ellipse with centre and half axes, turned clockwise by ``angle`` degrees."""
        points = _CIRCLE * (rx, ry)
        if angle:
            cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            points = points @ np.array([[cos, sin], [-sin, cos]])
        self._add(points + np.array((cx, cy)), paint, edge)

    def rectangle(
        self,
        x0: float,
        y0: float,
        x1: float,
        y1: float,
        paint: str | RGB,
        radius: float = 0.0,
        edge: float = 0.0,
    ) -> None:
        """A filled rectangle; ``radius`` > 0 rounds its corners."""
        if radius <= 0:
            self._add(np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], dtype=float), paint, edge)
            return
        radius = min(radius, (x1 - x0) / 2, (y1 - y0) / 2)
        left, top, right, bottom = x0 + radius, y0 + radius, x1 - radius, y1 - radius
        centres = np.array([(right, bottom), (left, bottom), (left, top), (right, top)])
        quarters = _CIRCLE[[0, 2, 4, 6, 8, 8, 10, 12, 14, 16, 16, 18, 20, 22, 24, 24, 26, 28, 30, 0]]
        self._add(np.repeat(centres, 5, axis=0) + radius * quarters, paint, edge)

    def line(self, points: Sequence[Point], width: float, paint: str | RGB) -> None:
        """A polyline of straight segments with round ends and joints."""
        array = np.array(points, dtype=float)
        for start, end in pairwise(array):
            along = end - start
            length = math.hypot(along[0], along[1])
            if length > 0:
                normal = np.array([-along[1], along[0]]) * (width / 2 / length)
                self._add(np.array([start + normal, end + normal, end - normal, start - normal]), paint)
        for point in array:
            self._add(_SMALL_CIRCLE * (width / 2) + point, paint)

    def curve(self, points: Sequence[Point], width: float, paint: str | RGB, end_width: float | None = None) -> None:
        """A smooth open stroke through the points; its width may change linearly to ``end_width``."""
        self._strip(_smooth(np.array(points, dtype=float), closed=False), width, paint, end_width)

    def arc(
        self, cx: float, cy: float, rx: float, ry: float, start: float, end: float, width: float, paint: str | RGB
    ) -> None:
        """A stroke along an ellipse from ``start`` to ``end`` degrees (clockwise from the right)."""
        angles = np.radians(np.linspace(start, end, max(6, int(abs(end - start) / 12) + 2)))
        self._strip(np.stack([cx + rx * np.cos(angles), cy + ry * np.sin(angles)], axis=1), width, paint)

    def pie(
        self,
        cx: float,
        cy: float,
        rx: float,
        ry: float,
        start: float,
        end: float,
        paint: str | RGB,
        edge: float = 0.0,
        chord: bool = False,
    ) -> None:
        """A filled sector from ``start`` to ``end`` degrees (clockwise from the right), or what its chord cuts off."""
        angles = np.radians(np.linspace(start, end, max(4, int(abs(end - start) / 10) + 2)))
        points = np.stack([cx + rx * np.cos(angles), cy + ry * np.sin(angles)], axis=1)
        self._add(points if chord else np.vstack([points, (cx, cy)]), paint, edge)

    def text(self, x0: float, y0: float, x1: float, y1: float, word: str, paint: str | RGB) -> None:
        """A word in bold capitals that fills a box.

        Raises:
            InputError: a character is not a letter A-Z.
        """
        unknown = [letter for letter in word.upper() if letter not in _LETTERS]
        if unknown or not word:
            raise InputError(f"the text {word!r} cannot be drawn: use letters A-Z only")
        pitch = (x1 - x0) / (len(word) - 0.22)
        stroke = min(pitch * 0.19, (y1 - y0) * 0.16)
        for position, letter in enumerate(word.upper()):
            left = x0 + position * pitch + stroke / 2
            sx, sy = (pitch * 0.78 - stroke) / 4, (y1 - y0 - stroke) / 6
            for stroke_points in _LETTERS[letter]:
                self.line([(left + x * sx, y0 + stroke / 2 + y * sy) for x, y in stroke_points], stroke, paint)

    def _strip(self, points: np.ndarray, width: float, paint: str | RGB, end_width: float | None = None) -> None:
        tangents = np.gradient(points, axis=0)
        tangents /= np.maximum(np.hypot(tangents[:, 0], tangents[:, 1]), 1e-9)[:, None]
        widths = np.linspace(width, width if end_width is None else end_width, len(points))[:, None] / 2
        normals = np.stack([-tangents[:, 1], tangents[:, 0]], axis=1) * widths
        self._add(np.vstack([points + normals, (points - normals)[::-1]]), paint)
        for point, half in ((points[0], widths[0]), (points[-1], widths[-1])):
            self._add(_SMALL_CIRCLE * half + point, paint)

    def extents(self) -> tuple[float, float, float, float]:
        """``(x0, y0, x1, y1)`` of everything that is drawn and not cut away by holes."""
        pairs = list(zip(self.polygons, self.paints, strict=True))
        drawn = np.vstack([points for points, paint in pairs if paint != "clear"])
        (x0, y0), (x1, y1) = drawn.min(axis=0).tolist(), drawn.max(axis=0).tolist()
        if "clear" not in self.paints:
            return x0, y0, x1, y1
        # A hole may cut through the rim (a bite): then only a rendering tells what is left.
        step = max(x1 - x0, y1 - y0) / 256
        canvas = Image.new("1", (round((x1 - x0) / step) + 1, round((y1 - y0) / step) + 1), 0)
        draw = ImageDraw.Draw(canvas)
        for points, paint in pairs:
            draw.polygon(((points - (x0, y0)) / step).ravel().tolist(), fill=int(paint != "clear"))
        left, top, right, bottom = canvas.getbbox() or (0, 0, *canvas.size)
        return (
            x0 + left * step if left > 1 else x0,
            y0 + top * step if top > 1 else y0,
            x0 + right * step if right < canvas.width - 1 else x1,
            y0 + bottom * step if bottom < canvas.height - 1 else y1,
        )


def _smooth(points: np.ndarray, closed: bool) -> np.ndarray:
    """Samples a Catmull-Rom spline: ``(N, 2)`` control points -> ``(M, 2)`` points on the curve."""
    if closed:
        padded = np.vstack([points[-1:], points, points[:2]])
    else:
        padded = np.vstack([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    windows = np.stack([padded[i : len(padded) - 3 + i] for i in range(4)], axis=1)
    samples = (_SPLINE @ windows).reshape(-1, 2)
    return samples if closed else np.vstack([samples, points[-1:]])


def luminance(rgb: RGB) -> float:
    """Rec. 601 luma of a colour, 0-255."""
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


def _mix(rgb: Sequence[float], other: Sequence[float], share: float) -> RGB:
    """``rgb`` moved towards ``other`` by ``share``."""
    first, second, third = (round(a + (b - a) * share) for a, b in zip(rgb, other, strict=True))
    return first, second, third


def _look_palette(rgb: RGB) -> list[RGB]:
    """Colours of canvas indices 0-4. Very dark bodies get lighter shades, or their parts would not be seen."""
    if luminance(rgb) < 75:
        return [(0, 0, 0), rgb, _mix(rgb, (255, 255, 255), 0.16), _mix(rgb, (255, 255, 255), 0.34),
                _mix(rgb, (255, 255, 255), 0.55)]  # fmt: skip
    return [(0, 0, 0), rgb, _mix(rgb, (0, 0, 0), 0.27), _mix(rgb, (255, 255, 255), 0.42), _mix(rgb, (0, 0, 0), 0.68)]


def render(pen: Pen, look: Look, width: int, height: int) -> np.ndarray:
    """Fits the recorded drawing to a box and renders it.

    Args:
        pen: the recorded drawing.
        look: colour, pattern, finish and seed of the body.
        width: pixels, at least 1.
        height: pixels, at least 1.

    Returns:
        ``uint8 (height, width, 4)``, straight-alpha RGBA.
    """
    x0, y0, x1, y1 = pen.extents()
    longer = max(width, height)
    factor = 4 if longer < 48 else 3 if longer < 140 else 2
    sx, sy = width * factor / (x1 - x0), height * factor / (y1 - y0)

    palette = _look_palette(look.rgb)
    inks: dict[str | RGB, int] = {**_LOOK_PAINTS}
    canvas = Image.new("L", (width * factor, height * factor), 0)
    draw = ImageDraw.Draw(canvas)
    # The rasteriser fills the pixels up to and including the end point, so half a pixel is taken off.
    fitted = (np.vstack(pen.polygons) - (x0, y0)) * (sx, sy) - 0.5
    flat = fitted.ravel().tolist()
    position = 0
    scale = math.sqrt(sx * sy)
    for points, paint, edge in zip(pen.polygons, pen.paints, pen.edges, strict=True):
        end = position + 2 * len(points)
        ink = inks.get(paint)
        if ink is None:
            ink = inks[paint] = _FIRST_FREE + len(inks) - len(_LOOK_PAINTS)
            palette.append(NAMED_PAINTS[paint] if isinstance(paint, str) else paint)
        outline = flat[position:end]
        draw.polygon(outline, fill=ink)
        if edge > 0:
            draw.line(outline + outline[:4], fill=inks["line"], width=max(1, round(edge * scale)))
        position = end

    body_table = [0, 255, 255, 255] + [0] * 252
    body = np.asarray(canvas.point(body_table).reduce(factor), dtype=np.float32) / 255.0
    alpha = np.asarray(canvas.point([0] + [255] * 255).reduce(factor), dtype=np.float32) / 255.0
    canvas.putpalette([channel for colour in palette for channel in colour])
    colours = np.asarray(canvas.convert("RGB").reduce(factor), dtype=np.float32)  # premultiplied: index 0 is black

    generator = np.random.default_rng(look.seed)
    colours = _apply_pattern(colours, body, look, generator)
    colours = _apply_finish(colours, body, look, generator)
    if look.finish == "furry":
        colours, alpha = _fray(colours, alpha, body, generator)
    colours = _outline(colours, alpha, look.rgb, 0.4 if look.finish == "furry" else 0.72)

    picture = np.empty((height, width, 4), dtype=np.uint8)
    straight = colours / np.maximum(alpha, 1.0 / 255.0)[..., None]
    np.clip(straight + 0.5, 0.0, 255.0, out=straight)
    picture[..., :3] = straight
    picture[..., 3] = alpha * 255.0 + 0.5
    return picture


def _coordinates(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres in units of the longer side: x ``(1, width)``, y ``(height, 1)``."""
    longer = max(width, height)
    x = (np.arange(width, dtype=np.float32)[None, :] + 0.5) / longer
    y = (np.arange(height, dtype=np.float32)[:, None] + 0.5) / longer
    return x, y


def _apply_pattern(colours: np.ndarray, body: np.ndarray, look: Look, generator: np.random.Generator) -> np.ndarray:
    """Blends the pattern's second colour into the body: ``(H, W, 3)`` premultiplied, ``(H, W)`` coverage."""
    if look.pattern == "plain":
        return colours
    height, width = body.shape
    longer = max(width, height)
    x, y = _coordinates(width, height)
    phase_x, phase_y, tilt = generator.random(3)
    # At least 4.5 px a repeat, or a small object's pattern would melt into one mixed colour.
    count = min(longer / 4.5, 8.0)
    if look.pattern == "striped":
        angle = (-0.6, 0.0, 0.6, 1.5708)[int(tilt * 4)]
        ramp = (x * math.sin(angle) + y * math.cos(angle)) * count + phase_x
        distance = np.abs(ramp - np.floor(ramp) - 0.5)  # 0 in the middle of a stripe
        weight = (0.19 - distance) * (longer / count) + 0.5
    elif look.pattern == "dotted":
        row = y * count * 1.1 + phase_y
        column = x * count + phase_x + 0.5 * (np.floor(row) % 2)
        distance = np.hypot(column - np.floor(column) - 0.5, row - np.floor(row) - 0.5)
        weight = (0.31 - distance) * (longer / count) + 0.5
    else:
        # Two lattices of squares, corner to corner, each a little smaller than half a period.
        period = longer / (count * 0.62)
        across = np.abs((x * longer / period + phase_x) % 1.0 - 0.5)
        down = np.abs((y * longer / period + phase_y) % 1.0 - 0.5)
        distance = np.minimum(np.maximum(across, down), np.maximum(0.5 - across, 0.5 - down))
        weight = (0.22 - distance) * period + 0.5
    weight = np.clip(weight, 0.0, 1.0) * body
    rgb = np.array(look.rgb, dtype=np.float32)
    # A pattern must not make its body look like another colour: light and grey bodies get dark marks, the others white
    # ones. Checks, the densest pattern, get nearer tones, but on black a nearer tone would read as grey.
    checked, bright = look.pattern == "checked", luminance(look.rgb)
    grey = bright >= 75 and max(look.rgb) - min(look.rgb) < 30
    if bright > 165 or grey:
        other = np.array(_mix(look.rgb, (24, 20, 24), 0.4 if checked and bright > 165 else 0.66))
    else:
        other = np.array(_mix(look.rgb, (255, 255, 255), 0.55 if checked and bright >= 75 else 0.8))
    return colours + weight[..., None] * (other - rgb).astype(np.float32)


def _apply_finish(colours: np.ndarray, body: np.ndarray, look: Look, generator: np.random.Generator) -> np.ndarray:
    """Lights the body: gloss, grain or fur as a signed field, + towards white and - towards black."""
    if look.finish == "matte":
        return colours
    height, width = body.shape
    longer = max(width, height)
    x, y = _coordinates(width, height)
    bright = luminance(look.rgb)
    if look.finish == "shiny":
        # A hard diagonal glint with a thin second one, and a dark falling edge: polished metal or plastic.
        ramp = (x / (width / longer) + y / (height / longer)) * 0.5 + 0.03 * generator.random()
        glint = np.clip(1.0 - np.abs(ramp - 0.33) / 0.075, 0, 1) ** 0.5 * 0.9
        second = np.clip(1.0 - np.abs(ramp - 0.50) / 0.022, 0, 1) * 0.7
        # The dark hem of the glint is what shows it on white.
        hem = np.clip(1.0 - np.abs(np.abs(ramp - 0.33) - 0.095) / 0.03, 0, 1) * 0.3
        fall = np.clip((ramp - 0.55) * 1.6, 0, 0.52)
        field = np.maximum(glint, second) - np.maximum(fall, hem) * (glint <= 0)
        amount = 1.0
    elif look.finish == "wooden":
        rings = min(12.0, longer / 3.6)
        knot_x, knot_y = 0.3 + 0.4 * generator.random(), (0.3 + 0.4 * generator.random()) * height / longer
        swell = np.exp(-(((x - knot_x) / 0.16) ** 2 + ((y - knot_y) / 0.10) ** 2))
        grain = y * rings + 0.35 * np.sin(x * 7.0 + 6.28 * generator.random()) + 1.3 * swell * np.sign(y - knot_y)
        wave = np.abs(grain - np.floor(grain) - 0.5)  # a saw: thin dark lines where it peaks
        field = -np.clip((wave - 0.26) * 6.0, 0, 1) * 0.62 + 0.08
        amount = 1.0 if bright >= 75 else -0.7
    else:
        # Short hairs: noise that is stretched downwards, a hair being about a fortieth of the object wide.
        hair = max(1, round(longer / 48))
        rows, columns = height // (hair * 3) + 3, width // hair + 2
        noise = generator.random((rows, columns), dtype=np.float32)
        column_index = np.arange(width) // hair
        row_index = (np.arange(height)[:, None] + (column_index * 2 * hair)[None, :] % (3 * hair)) // (3 * hair)
        field = noise[row_index, column_index[None, :]] - 0.5
        amount = 0.9 if bright >= 75 else 0.6
    field = field * amount
    gain = (body * field).astype(np.float32)[..., None]
    lift, fall = np.maximum(gain, 0.0), np.minimum(gain, 0.0)
    return colours * (1.0 + fall) + lift * np.maximum(255.0 - colours, 0.0)


def _inner(alpha: np.ndarray) -> np.ndarray:
    """Smallest alpha of a pixel and its four neighbours; outside the box counts as empty."""
    padded = np.pad(alpha, 1)
    sides = np.minimum(np.minimum(padded[:-2, 1:-1], padded[2:, 1:-1]), np.minimum(padded[1:-1, :-2], padded[1:-1, 2:]))
    return np.minimum(alpha, sides)


def _fray(
    colours: np.ndarray, alpha: np.ndarray, body: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Makes the body's silhouette ragged by one pixel here and there."""
    keep = 1.0 - body * (generator.random(alpha.shape, dtype=np.float32) < 0.4)
    frayed = np.maximum(_inner(alpha), alpha * keep)
    share = frayed / np.maximum(alpha, 1e-6)
    return colours * share[..., None], frayed


def _outline(colours: np.ndarray, alpha: np.ndarray, rgb: RGB, strength: float) -> np.ndarray:
    """A rim of about a pixel in a tone that separates the object from its background; light for dark bodies."""
    rim = (alpha - _inner(alpha))[..., None]
    tone = np.array(_mix(rgb, (255, 255, 255), 0.62) if luminance(rgb) < 75 else _mix(rgb, (0, 0, 0), 0.72))
    share = strength * rim / np.maximum(alpha, 1e-6)[..., None]
    return colours * (1.0 - share) + share * alpha[..., None] * tone.astype(np.float32)
