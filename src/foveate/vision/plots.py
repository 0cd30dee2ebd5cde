"""Line charts drawn with Pillow, so that benchmarks make their pictures without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from foveate.errors import InputError

PALETTE: tuple[tuple[int, int, int], ...] = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 145, 105),
    (190, 90, 160),
    (230, 159, 0),
    (70, 170, 225),
    (130, 90, 50),
    (100, 100, 110),
    (60, 60, 150),
    (150, 30, 50),
)
"""Told apart by most colour-blind readers too (after Okabe and Ito); one line each, series first, then baselines."""

_SCALE = 4  # lines are drawn this many times larger and reduced, which smooths their edges
_TEXT, _AXIS, _GRID, _BACKGROUND = (40, 40, 46), (90, 90, 98), (228, 228, 232), (255, 255, 255)
_DASH, _GAP = 7.0, 5.0

Point = tuple[float, float]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def line_chart(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    baselines: Mapping[str, float] | None = None,
    x_names: Sequence[str] = (),
    size: tuple[int, int] = (800, 500),
) -> Image.Image:
    """Draw one line per series, dots at its points, and one dashed horizontal line per baseline.

    The axes end on round numbers. The y axis starts at zero if no value is negative and the lowest is at most half of
    the highest. The legend stands between title and plot. The font knows Latin letters only.

    Args:
        series: label -> (x values, y values), at least one, each with as many x as y.
        title, x_label, y_label: text around the plot; an empty one takes no room.
        baselines: label -> y.
        x_names: what x = 0, 1, ... stand for, where they are no amounts: written below the axis in place of numbers,
            and dots are not joined.
        size: width and height in pixels, at least 320 x 240.

    Returns:
        RGB picture of `size`.

    Raises:
        InputError: no series, an empty one, lengths that differ, numbers that are not finite, a label used twice, more
            lines than colours, or a size so small that no plot is left.

    Example:
        >>> line_chart({"detail": ([0.1, 0.3], [0.99, 0.98])}, x_label="t", baselines={"chance": 0.25}).size
        (800, 500)
    """
    lines = {label: _points(label, *values) for label, values in series.items()}
    levels = {label: float(value) for label, value in (baselines or {}).items()}
    _check(lines, levels, size)
    if x_names and any(x not in range(len(x_names)) for points in lines.values() for x in points[:, 0]):
        raise InputError(f"with {len(x_names)} names, x must be 0 to {len(x_names) - 1}, whole numbers.")
    values = np.concatenate(list(lines.values()))
    x_ticks = [-0.5, len(x_names) - 0.5] if x_names else _ticks(*_span(values[:, 0].tolist()), 10)
    y_ticks = _ticks(*_span([*values[:, 1].tolist(), *levels.values()], from_zero=True), 7)

    width, height = size
    small, large = ImageFont.load_default(13), ImageFont.load_default(17)
    colours = dict(zip([*lines, *levels], PALETTE, strict=False))
    y_names = _tick_names(y_ticks)
    left = 18 + max(math.ceil(small.getlength(name)) for name in y_names) + (24 if y_label else 0)
    right, bottom = width - 24, height - 30 - (22 if x_label else 0)
    rows = _legend_rows([*lines, *levels], small, right - left)
    top = 14 + (30 if title else 0) + 20 * len(rows) + 8
    if right - left < 80 or bottom - top < 60:
        raise InputError(f"a chart of {width} x {height} pixels has no room for its labels; draw it larger.")

    def place(point: Sequence[float]) -> Point:
        across = (point[0] - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (point[1] - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + across * (right - left), bottom - up * (bottom - top)

    canvas = Image.new("RGB", (width * _SCALE, height * _SCALE), _BACKGROUND)
    pen = _Pen(ImageDraw.Draw(canvas))
    for y in y_ticks:
        pen.line([place((x_ticks[0], y)), place((x_ticks[-1], y))], _GRID, 1)
    for x in range(len(x_names)) if x_names else x_ticks:
        at = place((x, y_ticks[0]))
        pen.line([at, (at[0], at[1] + 5)], _AXIS, 1)
    pen.line(
        [place((x_ticks[0], y_ticks[-1])), place((x_ticks[0], y_ticks[0])), place((x_ticks[-1], y_ticks[0]))], _AXIS, 1
    )
    for label, level in levels.items():
        pen.dashes(place((x_ticks[0], level)), place((x_ticks[-1], level)), colours[label], 1.8)
    for label, points in lines.items():
        placed = [place(point) for point in points]
        if not x_names:
            pen.line(placed, colours[label], 2.2)
        # More dots than this would hide the line they sit on.
        if len(placed) <= 30 or x_names:
            pen.dots(placed, colours[label], 6.0 if x_names else 3.6)
    legend_at = _legend_positions(rows, small, left, top - 8 - 20 * len(rows))
    for label, (x, y) in legend_at.items():
        if label in levels:
            pen.dashes((x, y + 10), (x + 24, y + 10), colours[label], 1.8)
        else:
            pen.line([(x, y + 10), (x + 24, y + 10)], colours[label], 2.2)
            pen.dots([(x + 12, y + 10)], colours[label], 3.6)

    picture = canvas.resize(size, Image.Resampling.BOX)
    draw = ImageDraw.Draw(picture)
    if title:
        draw.text((left, 12), title, fill=_TEXT, font=large)
    for label, (x, y) in legend_at.items():
        draw.text((x + 30, y + 10), label, fill=_TEXT, font=small, anchor="lm")
    for y, name in zip(y_ticks, y_names, strict=True):
        draw.text((left - 8, place((x_ticks[0], y))[1]), name, fill=_AXIS, font=small, anchor="rm")
    for x, name in enumerate(x_names) if x_names else zip(x_ticks, _tick_names(x_ticks), strict=True):
        draw.text((place((x, y_ticks[0]))[0], bottom + 9), name, fill=_AXIS, font=small, anchor="mt")
    if x_label:
        draw.text(((left + right) / 2, height - 12), x_label, fill=_TEXT, font=small, anchor="ms")
    if y_label:
        _paste_upright(picture, y_label, small, (18, (top + bottom) // 2))
    return picture


class _Pen:
    """Draws in pixels of the finished picture on a canvas that is `_SCALE` times larger."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self.draw = draw

    def line(self, points: Sequence[Point], colour: tuple[int, int, int], width: float) -> None:
        enlarged = [(x * _SCALE, y * _SCALE) for x, y in points]
        self.draw.line(enlarged, fill=colour, width=round(width * _SCALE), joint="curve")

    def dots(self, points: Sequence[Point], colour: tuple[int, int, int], radius: float) -> None:
        for x, y in points:
            x, y, r = x * _SCALE, y * _SCALE, radius * _SCALE
            self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour, outline=_BACKGROUND, width=_SCALE)

    def dashes(self, start: Point, stop: Point, colour: tuple[int, int, int], width: float) -> None:
        """A horizontal dashed line."""
        x = start[0]
        while x < stop[0]:
            self.line([(x, start[1]), (min(x + _DASH, stop[0]), start[1])], colour, width)
            x += _DASH + _GAP


def _points(label: str, x: Sequence[float], y: Sequence[float]) -> np.ndarray:
    """(N, 2) points of one series."""
    if len(x) != len(y) or not len(x):
        raise InputError(
            f"the series {label!r} has {len(x)} x and {len(y)} y values; give as many of both, at least 1."
        )
    try:
        return np.stack([np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)], axis=1)
    except (TypeError, ValueError) as error:
        raise InputError(f"the series {label!r} holds something that is not a number ({error}).") from None


def _check(lines: Mapping[str, np.ndarray], levels: Mapping[str, float], size: tuple[int, int]) -> None:
    if not lines:
        raise InputError("a line chart needs at least one series, got none.")
    if len({*lines, *levels}) != len(lines) + len(levels):
        both = sorted(set(lines) & set(levels))
        raise InputError(f"the label {both[0]!r} names both a series and a baseline; give each line its own.")
    if len(lines) + len(levels) > len(PALETTE):
        raise InputError(
            f"a chart shows at most {len(PALETTE)} lines, got {len(lines) + len(levels)}; draw two charts."
        )
    for label, numbers in [*lines.items(), *((name, np.array([level])) for name, level in levels.items())]:
        if not (np.abs(numbers) < 1e100).all():
            raise InputError(f"{label!r} has a value that is not finite or beyond 1e100; leave such points out.")
    if size[0] < 320 or size[1] < 240:
        raise InputError(f"a chart must be at least 320 x 240 pixels, not {size[0]} x {size[1]}.")


def _span(values: Sequence[float], *, from_zero: bool = False) -> tuple[float, float]:
    """Lowest and highest value, widened where they are one; from zero unless that would waste half of the plot."""
    low, high = min(values), max(values)
    if from_zero and 0 <= low <= high / 2:
        low = 0.0
    if low == high:
        margin = abs(low) / 2 or 0.5
        low, high = low - margin, high + margin
    return low, high


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers, evenly spaced, from at most `low` to at least `high`: as many as fit in `most` steps."""
    magnitude = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 2.5, 5, 10, 20):
        step = factor * magnitude
        # A billionth of a step forgives that 0.1 + 0.2 is not 0.3.
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            return [k * step for k in range(first, last + 1)]
    raise AssertionError("twenty magnitudes span more than any range of `most` steps")


def _tick_names(ticks: Sequence[float]) -> list[str]:
    """All with the same number of decimals, the fewest that tell the step."""
    step = ticks[1] - ticks[0]
    decimals = next((d for d in range(12) if abs(round(step, d) - step) < 1e-6 * step), 12)
    return [f"{tick + 0.0:.{decimals}f}" for tick in ticks]


def _legend_width(label: str, font: Font) -> int:
    return 30 + math.ceil(font.getlength(label)) + 22


def _legend_rows(labels: Sequence[str], font: Font, width: int) -> list[list[str]]:
    """Labels broken into rows that fit."""
    rows: list[list[str]] = [[]]
    used = 0
    for label in labels:
        needed = _legend_width(label, font)
        if rows[-1] and used + needed > width:
            rows.append([])
            used = 0
        rows[-1].append(label)
        used += needed
    return rows


def _legend_positions(rows: Sequence[Sequence[str]], font: Font, left: float, top: float) -> dict[str, Point]:
    """Upper left corner of each entry."""
    positions = {}
    for row, labels in enumerate(rows):
        x = left
        for label in labels:
            positions[label] = (x, top + 20 * row)
            x += _legend_width(label, font)
    return positions


def _paste_upright(picture: Image.Image, text: str, font: Font, centre: tuple[int, int]) -> None:
    """Text that reads from bottom to top."""
    _, _, right, bottom = font.getbbox(text)
    strip = Image.new("RGB", (math.ceil(right), math.ceil(bottom) + 2), _BACKGROUND)
    ImageDraw.Draw(strip).text((0, 0), text, fill=_TEXT, font=font)
    upright = strip.rotate(90, expand=True)
    picture.paste(upright, (centre[0] - upright.width // 2, centre[1] - upright.height // 2))
