"""Textured backgrounds: low saturation and moderate contrast, so that no object drowns in them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image

Canvas = np.ndarray  # (GRID, GRID, 3) float32, 0 to 255

# Backgrounds are composed on a coarse grid and enlarged: cheap at any resolution, and without detail that competes
# with the objects. Fine grain is added at full resolution.
GRID = 64
_ROWS = np.linspace(0, 1, GRID, dtype=np.float32)[:, None, None]


@cache
def _grain() -> np.ndarray:
    return np.random.default_rng(20240521).normal(0, 1, (512, 512)).astype(np.float32)


def _colour(draw: np.random.Generator, rgb: tuple[int, int, int], spread: float = 10) -> np.ndarray:
    return np.array(rgb, np.float32) + draw.uniform(-spread, spread, 3).astype(np.float32)


def _split(
    draw: np.random.Generator, top: np.ndarray, bottom: np.ndarray, low: float, high: float
) -> tuple[Canvas, int]:
    """Two areas with a horizon between them, each a little lighter towards it."""
    horizon = int(GRID * draw.uniform(low, high))
    canvas = np.where((np.arange(GRID) < horizon)[:, None, None], top, bottom).astype(np.float32)
    canvas = np.broadcast_to(canvas, (GRID, GRID, 3)).copy()
    canvas += 14 * (1 - 2 * np.abs(_ROWS - horizon / GRID))
    return canvas, horizon


def _blotches(draw: np.random.Generator, strength: float, cells: int = 8) -> np.ndarray:
    """Smooth noise (GRID, GRID, 1)."""
    coarse = draw.normal(0, strength, (cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((GRID, GRID), Image.Resampling.BICUBIC))[..., None]


def _indoor(draw: np.random.Generator) -> Canvas:
    wall = _colour(draw, [(214, 202, 184), (196, 206, 204), (208, 196, 206), (206, 208, 188)][draw.integers(4)])
    canvas, horizon = _split(draw, wall, _colour(draw, (176, 152, 128)), 0.55, 0.75)
    canvas[horizon : horizon + 2] = wall * 0.75
    period = int(draw.integers(6, 12))
    canvas[:horizon, ::period] -= 8
    canvas[horizon + 2 :: 4] -= 10
    return canvas


def _street(draw: np.random.Generator) -> Canvas:
    canvas, horizon = _split(draw, _colour(draw, (190, 206, 216)), _colour(draw, (150, 152, 158), 6), 0.35, 0.5)
    left = 0
    while left < GRID:
        width = int(draw.integers(5, 12))
        height = int(draw.integers(4, max(5, horizon - 4)))
        canvas[horizon - height : horizon, left : left + width] = _colour(draw, (178, 172, 166), 14)
        left += width + int(draw.integers(0, 3))
    canvas[horizon : horizon + 3] = _colour(draw, (196, 192, 184), 6)
    lane = horizon + 3 + (GRID - horizon) // 2
    if lane < GRID:
        for start in range(int(draw.integers(6)), GRID, 10):
            canvas[lane : lane + 1, start : start + 5] = (222, 220, 208)
    return canvas


def _field(draw: np.random.Generator) -> Canvas:
    canvas, horizon = _split(draw, _colour(draw, (196, 214, 224)), _colour(draw, (172, 186, 144)), 0.3, 0.5)
    canvas[horizon:] += _blotches(draw, 9)[horizon:]
    return canvas


def _sea(draw: np.random.Generator) -> Canvas:
    canvas, horizon = _split(draw, _colour(draw, (206, 216, 222)), _colour(draw, (150, 182, 194)), 0.35, 0.55)
    for row in range(horizon + 2, GRID, 3):
        start = int(draw.integers(GRID))
        canvas[row, start : start + int(draw.integers(6, 24))] += 14
    return canvas


def _desert(draw: np.random.Generator) -> Canvas:
    canvas, _ = _split(draw, _colour(draw, (216, 214, 206)), _colour(draw, (214, 192, 152)), 0.35, 0.55)
    columns = np.arange(GRID)
    for _ in range(3):
        height = GRID * draw.uniform(0.5, 0.95) + 3 * np.sin(columns / draw.uniform(5, 12) + draw.uniform(0, 6))
        canvas -= 7 * (np.arange(GRID)[:, None] > height)[..., None]
    return canvas


def _snow(draw: np.random.Generator) -> Canvas:
    canvas, horizon = _split(draw, _colour(draw, (178, 192, 208)), _colour(draw, (210, 216, 224), 5), 0.3, 0.5)
    canvas[horizon:] += _blotches(draw, 5)[horizon:]
    return canvas


def _night(draw: np.random.Generator) -> Canvas:
    canvas, horizon = _split(draw, _colour(draw, (66, 72, 104), 8), _colour(draw, (88, 88, 104), 8), 0.45, 0.65)
    for _ in range(24):
        canvas[int(draw.integers(max(1, horizon))), int(draw.integers(GRID))] = (206, 206, 190)
    return canvas


BACKGROUNDS: dict[str, Callable[[np.random.Generator], Canvas]] = {
    "indoor": _indoor,
    "street": _street,
    "field": _field,
    "sea": _sea,
    "desert": _desert,
    "snow": _snow,
    "night": _night,
}


def render_background(kind: str, width: int, height: int, draw: np.random.Generator) -> np.ndarray:
    """(height, width, 3) uint8."""
    canvas = np.clip(BACKGROUNDS[kind](draw), 0, 255).astype(np.uint8)
    picture = np.asarray(Image.fromarray(canvas).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = _grain()
    top, left = (int(value) for value in draw.integers(0, 256, 2))
    repeats = (height // 256 + 1, width // 256 + 1)
    texture = (3 * np.tile(grain[top : top + 256, left : left + 256], repeats)[:height, :width]).astype(np.int16)
    return np.clip(picture + texture[..., None], 0, 255).astype(np.uint8)
