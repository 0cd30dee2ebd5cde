"""Which visual tokens of a picture a model kept, and a picture of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from foveate.errors import InputError

_DARK = 0.28  # what is left of the brightness where nothing was kept
_FRAME, _GAP, _BACKGROUND = (255, 190, 40), 12, (24, 24, 28)


@dataclass(frozen=True)
class KeptTokens:
    """The visual tokens of one picture, or of one frame, that reached the language model.

    Attributes:
        keep: (P, N) bool; P partitions of N = S * S tokens in raster order.
        regions: (P, 4) xyxy, the part of the picture, in its pixels, that each partition shows; it may reach beyond it.
        total: tokens that reach the language model where nothing is dropped, newlines included.
        count: tokens that did.
    """

    keep: np.ndarray
    regions: np.ndarray
    total: int
    count: int

    def to_dict(self) -> dict[str, Any]:
        """Counts, and of each partition the tokens a side and the kept ones by number, as JSON takes them."""
        side = math.isqrt(self.keep.shape[1])
        return {
            "kept": self.count,
            "of": self.total,
            "partitions": [
                {"region": [float(edge) for edge in region], "grid": side, "tokens": np.flatnonzero(keep).tolist()}
                for keep, region in zip(self.keep, self.regions, strict=True)
            ],
        }


def square_region(width: int, height: int, *, padded: bool) -> np.ndarray:
    """(1, 4) region of a picture that is padded to a square, or of whose middle a square is cut."""
    side = max(width, height) if padded else min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return np.array([[left, top, left + side, top + side]])


def plot_kept_tokens(image: Image.Image, kept: KeptTokens) -> Image.Image:
    """The picture with what was dropped darkened: by the full picture's tokens and, beside it, by the sub-images'.

    Args:
        image: the picture that the tokens are of.
        kept: as an answer has it.

    Returns:
        RGB, as high as the picture; twice as wide where there are sub-images. A small picture is enlarged, so that each
        token is seen.

    Raises:
        InputError: no picture.
    """
    if not isinstance(image, Image.Image):
        raise InputError(f"an overlay needs the picture that the tokens are of, not {type(image).__name__}.")
    picture = image.convert("RGB")
    scale = max(1, math.ceil(320 / max(picture.size)))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.LANCZOS)
    panels = [_panel(picture, kept, range(1), scale)]
    if len(kept.keep) > 1:
        panels.append(_panel(picture, kept, range(1, len(kept.keep)), scale))
    width = sum(panel.width for panel in panels) + _GAP * (len(panels) - 1)
    canvas = Image.new("RGB", (width, picture.height), _BACKGROUND)
    for number, panel in enumerate(panels):
        canvas.paste(panel, (number * (picture.width + _GAP), 0))
    return canvas


def _panel(picture: Image.Image, kept: KeptTokens, partitions: range, scale: int) -> Image.Image:
    """The picture with the tokens of some partitions bright."""
    side = math.isqrt(kept.keep.shape[1])
    mask = Image.new("L", picture.size, 0)
    draw = ImageDraw.Draw(mask)
    for number in partitions:
        x0, y0, x1, y1 = (float(value) * scale for value in kept.regions[number])
        wide, high = (x1 - x0) / side, (y1 - y0) / side
        for cell in np.flatnonzero(kept.keep[number]):
            row, column = divmod(int(cell), side)
            left, top = x0 + column * wide, y0 + row * high
            # To the pixel before the next cell's first, so that neighbours neither overlap nor leave a seam.
            box = (round(left), round(top), round(left + wide) - 1, round(top + high) - 1)
            if box[2] >= box[0] and box[3] >= box[1]:
                draw.rectangle(box, fill=255)
    dark = Image.eval(picture, lambda value: int(value * _DARK))
    panel = Image.composite(picture, dark, mask)
    lines = ImageDraw.Draw(panel)
    if len(partitions) > 1:
        for number in partitions:
            lines.rectangle([round(float(value) * scale) for value in kept.regions[number]], outline=_FRAME)
    return panel
