"""Boxes drawn into pictures, with their words below."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PALETTE = (
    (214, 39, 40),
    (31, 119, 180),
    (44, 160, 44),
    (255, 127, 14),
    (148, 103, 189),
    (23, 190, 207),
    (227, 119, 194),
    (140, 86, 75),
)
MAX_SIDE = 16_383
"""Most pixels of a side of a picture: what WebP can hold. PNG could hold more, which no memory would."""

Colour = tuple[int, int, int]
Corners = tuple[float, float, float, float]
GREY: Colour = (90, 90, 90)


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Corners],
    words: Sequence[str],
    scores: Sequence[float | None] | None = None,
    side: int = 1024,
) -> Image.Image:
    """The image with a thin numbered box in a colour of its own for each region, and below it a line for each: number,
    words, score. Made for many regions.

    Args:
        boxes: xyxy pixels; what lies outside the image is not drawn.
        words: of each box.
        scores: of each box, where it has one.
        side: least length in pixels of the image's longer side; small images are enlarged for reading, and such as
            would give a picture of more than 16,383 pixels are reduced.
    """
    # At least a quarter of the height is kept for the lines.
    scale = min(max(1.0, side / max(image.size)), MAX_SIDE / image.width, MAX_SIDE * 0.75 / image.height)
    width, height = (max(1, round(length * scale)) for length in image.size)
    letter = min(max(14, round(max(width, height) / 73)), 48)
    font, gap, row = ImageFont.load_default(letter), letter, round(letter * 1.45)
    full = max(width, 36 * letter)
    columns = max(1, full // (34 * letter))
    lines = min(-(-len(boxes) // columns), (MAX_SIDE - height - 2 * gap) // row - 1)
    left_out = max(0, len(boxes) - lines * columns)
    out = Image.new("RGB", (full, height + 2 * gap + row * max(1, lines + (left_out > 0))), "white")
    out.paste(image.resize((width, height)))
    draw = ImageDraw.Draw(out)
    colours = [_dense_colour(number) for number in range(len(boxes))]
    corners = [_corners(box, scale, (width, height)) for box in boxes]
    for number in sorted(range(len(corners)), key=lambda k: _area(corners[k]), reverse=True):  # small ones on top
        draw.rectangle(corners[number], outline=colours[number], width=max(2, letter // 7))
    taken = np.zeros((len(corners), 4))
    for number, box in enumerate(corners):
        size = (round(font.getlength(str(number + 1))) + letter // 2, round(letter * 1.2))
        # Where there are more numbers than room, the last ones no longer look for a free place.
        place = _label_place(box, size, (width, height), taken[: number if number < 500 else 0])
        taken[number] = place
        draw.rectangle(place, fill=colours[number])
        draw.text((place[0] + letter // 4, place[1]), str(number + 1), fill="white", font=font)
    column_width, patch = (full - gap) // columns, 2 * letter
    for number, text in enumerate(words[: lines * columns]):
        left, top = gap + column_width * (number // lines), height + gap + row * (number % lines)
        value = None if scores is None else scores[number]
        score = "" if value is None else f"  ({value:.2f})"
        room = column_width - patch - gap - letter // 2 - round(font.getlength(score))
        draw.rectangle((left, top, left + patch, top + round(letter * 1.2)), fill=colours[number])
        draw.text((left + patch // 2, top), str(number + 1), fill="white", font=font, anchor="ma")
        line = fit_text(text, font, room) + score
        draw.text((left + patch + letter // 2, top), line, fill="black", font=font)
    if left_out or not boxes:
        note = more_regions(left_out) if left_out else "no region was found"
        draw.text((gap, height + gap + row * lines), note, fill=GREY, font=font)
    return out


def _dense_colour(number: int) -> Colour:
    """Colours without end: steps of the golden ratio around the hues never come back, and neighbours differ. Dark
    enough for white numbers: a green of the same lightness looks lighter than a blue, so it gets less."""
    hue = (0.01 + number * 0.618034) % 1.0
    lightness = (0.44, 0.36, 0.5)[number % 3]
    while True:
        red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.8)
        # WCAG's relative luminance: white has at least 4.2 times the contrast on it.
        if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 <= 0.2:
            return round(red * 255), round(green * 255), round(blue * 255)
        lightness -= 0.02


def _corners(box: Corners, scale: float, room: tuple[int, int]) -> Corners:
    """First and last pixels of a half-open box in the enlarged picture; a box thinner than a pixel has one."""
    x0, x1 = (min(max(0.0, value * scale), room[0]) for value in (box[0], box[2]))
    y0, y1 = (min(max(0.0, value * scale), room[1]) for value in (box[1], box[3]))
    return x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)


def _area(corners: Corners) -> float:
    return max(0.0, corners[2] - corners[0]) * max(0.0, corners[3] - corners[1])


def _label_place(box: Corners, size: tuple[int, int], room: tuple[int, int], taken: np.ndarray) -> Corners:
    """Where a number goes: at a corner or side of its box, where it covers as little as possible of other numbers,
    which are at `taken` (N, 4)."""
    x0, y0, x1, y1 = box
    width, height = size
    best, least = (0.0, 0.0, 0.0, 0.0), float("inf")
    for x in (x0, x1 - width, x1, x0 - width, (x0 + x1 - width) / 2):
        for y in (y0 - height, y0, y1, y1 - height, (y0 + y1 - height) / 2):
            left, top = min(max(0.0, x), room[0] - width), min(max(0.0, y), room[1] - height)
            place = (left, top, left + width, top + height)
            shared = np.minimum(place[2:], taken[:, 2:]) - np.maximum(place[:2], taken[:, :2])
            covered = float(shared.clip(0).prod(axis=1).sum())
            if covered < least:
                best, least = place, covered
            if covered == 0:
                return best
    return best


def fit_text(text: str, font: Any, width: int) -> str:
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip(" ,…") + "…" if len(text) > 2 else ""
    return text


def more_regions(count: int) -> str:
    return f"and {count} more region{'s' * (count != 1)}"


def tile(pictures: Sequence[Image.Image], columns: int = 4) -> Image.Image:
    """Pictures side by side, row after row, reduced where they would be more than 16,383 pixels wide or high."""
    gap = 8
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    heights = [max(picture.height for picture in row) for row in rows]
    width = max(sum(picture.width + gap for picture in row) for row in rows) + gap
    out = Image.new("RGB", (width, sum(height + gap for height in heights) + gap), "white")
    top = gap
    for row, height in zip(rows, heights, strict=True):
        left = gap
        for picture in row:
            out.paste(picture, (left, top))
            left += picture.width + gap
        top += height + gap
    out.thumbnail((MAX_SIDE, MAX_SIDE))
    return out
