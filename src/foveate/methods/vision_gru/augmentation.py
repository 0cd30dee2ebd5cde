"""What training does to images (spec 3): random crop, flip, RandAugment, erasing; mixup and cutmix of a batch; and to
scenes whose pixels have classes: random size and window, photometric distortion.

Written from the papers: RandAugment (arXiv 1909.13719), random erasing (1708.04896), mixup (1710.09412), cutmix
(1905.04899), photometric distortion (SSD, 1512.02325, section 2.2). Every choice comes from the generator that is
passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from foveate.metrics.segmentation import IGNORE

from .processing import MEAN

_FILL = tuple(round(255 * value) for value in MEAN)
_TRIES = 10

Draw = np.random.Generator


def random_resized_crop(
    image: Image.Image,
    size: int,
    draw: Draw,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image.Image:
    """A rectangle of random area (share in `scale`) and aspect (log-uniform in `ratio`), as a square of `size`."""
    width, height = image.size
    for _ in range(_TRIES):
        area = width * height * draw.uniform(*scale)
        aspect = math.exp(draw.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draw.integers(width - w + 1)), int(draw.integers(height - h + 1))
            break
    else:  # no such rectangle fits: the largest one in the middle
        w, h = min(width, max(1, round(height * ratio[1]))), min(height, max(1, round(width / ratio[0])))
        left, top = (width - w) // 2, (height - h) // 2
    box = (left, top, left + w, top + h)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _affine(image: Image.Image, matrix: tuple[float, float, float, float, float, float]) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR, fillcolor=_FILL
    )


def _solarize_add(image: Image.Image, added: int) -> Image.Image:
    return image.point([min(255, value + added) if value < 128 else value for value in range(256)] * 3)


# Each takes the image, a strength from 0 to 1 and a sign, and does more the higher the strength.
_OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "auto_contrast": lambda image, _, __: ImageOps.autocontrast(image),
    "equalize": lambda image, _, __: ImageOps.equalize(image),
    "invert": lambda image, _, __: ImageOps.invert(image),
    "rotate": lambda image, level, sign: image.rotate(
        sign * 30 * level, resample=Image.Resampling.BILINEAR, fillcolor=_FILL
    ),
    "posterize": lambda image, level, _: ImageOps.posterize(image, max(1, 4 - int(4 * level))),
    "solarize": lambda image, level, _: ImageOps.solarize(image, 256 - int(256 * level)),
    "solarize_add": lambda image, level, _: _solarize_add(image, int(110 * level)),
    "colour": lambda image, level, sign: ImageEnhance.Color(image).enhance(1 + sign * 0.9 * level),
    "contrast": lambda image, level, sign: ImageEnhance.Contrast(image).enhance(1 + sign * 0.9 * level),
    "brightness": lambda image, level, sign: ImageEnhance.Brightness(image).enhance(1 + sign * 0.9 * level),
    "sharpness": lambda image, level, sign: ImageEnhance.Sharpness(image).enhance(1 + sign * 0.9 * level),
    "shear_x": lambda image, level, sign: _affine(image, (1, sign * 0.3 * level, 0, 0, 1, 0)),
    "shear_y": lambda image, level, sign: _affine(image, (1, 0, 0, sign * 0.3 * level, 1, 0)),
    "translate_x": lambda image, level, sign: _affine(image, (1, 0, sign * 0.45 * level * image.width, 0, 1, 0)),
    "translate_y": lambda image, level, sign: _affine(image, (1, 0, 0, 0, 1, sign * 0.45 * level * image.height)),
}
OPERATIONS = tuple(_OPERATIONS)


def rand_augment(
    image: Image.Image,
    draw: Draw,
    *,
    operations: int = 2,
    magnitude: float = 9.0,
    deviation: float = 0.5,
    probability: float = 0.5,
) -> Image.Image:
    """`operations` random ones, each applied with `probability`, of strength N(magnitude, deviation) out of 10."""
    for name in draw.choice(len(OPERATIONS), operations):
        level = min(max(draw.normal(magnitude, deviation), 0.0), 10.0) / 10
        sign = 1 if draw.random() < 0.5 else -1
        if draw.random() < probability:
            image = _OPERATIONS[OPERATIONS[name]](image, level, sign)
    return image


def random_erasing(pixels: Tensor, draw: Draw, probability: float = 0.25) -> Tensor:
    """Zeros in a rectangle of 2 to 33 % of the area, aspect 0.3 to 3.3, of normalised pixels (3, H, W), in place."""
    if draw.random() >= probability:
        return pixels
    height, width = pixels.shape[1:]
    for _ in range(_TRIES):
        area = height * width * draw.uniform(0.02, 1 / 3)
        aspect = math.exp(draw.uniform(math.log(0.3), math.log(3.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = int(draw.integers(height - h + 1)), int(draw.integers(width - w + 1))
            pixels[:, top : top + h, left : left + w] = 0
            break
    return pixels


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """(B,) indices -> (B, K) probabilities: `smoothing` / K everywhere, the rest on the class."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix(
    images: Tensor,
    targets: Tensor,
    draw: Draw,
    *,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    probability: float = 1.0,
    switch: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Mixes every image of a batch with its counterpart from the other end of the batch.

    mixup takes λ x + (1 - λ) x'; cutmix pastes a rectangle of x' of the share 1 - λ. λ ~ Beta(alpha, alpha); where a
    rectangle is cut off by the border, λ is what is left of x. Targets are mixed by λ.

    Args:
        images: (B, 3, H, W).
        targets: (B, K) probabilities.
        probability: of mixing this batch at all.
        switch: probability of cutmix where both alphas are above 0.
    """
    if draw.random() >= probability or not (mixup_alpha or cutmix_alpha):
        return images, targets
    cut = bool(cutmix_alpha) and (not mixup_alpha or draw.random() < switch)
    alpha = cutmix_alpha if cut else mixup_alpha
    share = float(draw.beta(alpha, alpha))
    others = images.flip(0)
    if cut:
        height, width = images.shape[2:]
        side = math.sqrt(1 - share)
        h, w = int(height * side), int(width * side)
        y, x = int(draw.integers(height)), int(draw.integers(width))
        top, bottom = max(y - h // 2, 0), min(y + h // 2, height)
        left, right = max(x - w // 2, 0), min(x + w // 2, width)
        images = images.clone()
        images[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        images = torch.lerp(others, images, share)
    return images, share * targets + (1 - share) * targets.flip(0)


def scene_window(labels: np.ndarray, size: int, draw: Draw, largest_share: float = 0.75) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random window of `size` x `size`, or of what there is of it.

    Ten are tried for one in which no class has `largest_share` of the labelled pixels or more; then any will do.

    Args:
        labels: (H, W); `IGNORE` counts nothing.
    """
    height, width = labels.shape
    w, h = min(size, width), min(size, height)
    left = top = 0
    for _ in range(_TRIES):
        left, top = int(draw.integers(width - w + 1)), int(draw.integers(height - h + 1))
        if largest_share >= 1:
            break
        inside = labels[top : top + h, left : left + w]
        counts = np.bincount(inside[inside != IGNORE])
        if (counts > 0).sum() > 1 and counts.max() < largest_share * counts.sum():
            break
    return left, top, left + w, top + h


def photometric_distortion(image: Image.Image, draw: Draw) -> Image.Image:
    """Each with probability 1/2: brightness +-32 of 255, contrast x 0.5 to 1.5 (first or last), saturation
    x 0.5 to 1.5, hue +-36 degrees (spec 3.2: 18 of 180)."""

    def change(image: Image.Image, factor: float, added: float) -> Image.Image:
        table = np.clip(np.arange(256) * factor + added, 0, 255).astype(np.uint8).tolist()
        return image.point(table * len(image.getbands()))

    if draw.random() < 0.5:
        image = change(image, 1.0, draw.uniform(-32, 32))
    contrast_first = draw.random() < 0.5
    contrast = draw.uniform(0.5, 1.5) if draw.random() < 0.5 else 1.0
    if contrast_first:
        image = change(image, contrast, 0.0)
    saturation = draw.uniform(0.5, 1.5) if draw.random() < 0.5 else 1.0
    turn = int(draw.integers(-18, 19)) * 256 / 180 if draw.random() < 0.5 else 0.0
    if saturation != 1.0 or turn:
        hue, strength, value = image.convert("HSV").split()
        hue = hue.point([round(angle + turn) % 256 for angle in range(256)])
        image = Image.merge("HSV", (hue, change(strength, saturation, 0.0), value)).convert("RGB")
    return image if contrast_first else change(image, contrast, 0.0)
