"""The DCT perceptual hash with which DynRefer compares views (spec section 4.2), batched over boxes and images.

The hash of a box is: crop, bilinear resize to 224 x 224 without antialiasing, two-dimensional orthonormal DCT-II, the
8 x 8 block of lowest frequencies, one bit per coefficient. With A the 8 x 224 cosines the block is
``A @ resized @ A^T`` (spec section 4.2). Crop and resize are linear and separable too, so they are folded into two
8-row matrices per box, and the block is ``By @ grey @ Bx^T``: neither the crop nor the 224 x 224 picture is ever made.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveate.errors import InputError
from foveate.ops.boxes import as_box_tensor

HASH_SIZE = 8
RESIZED = 224

# Boxes of all images hashed at a time, which bounds the memory of the bases.
_CHUNK = 256


def to_grey(image: Tensor) -> Tensor:
    """uint8 RGB (..., H, W, 3) -> BT.601 luma (..., H, W) uint8, ``(9798 R + 19235 G + 3735 B + 16384) >> 15``.

    This is OpenCV's integer arithmetic, bit for bit (spec section 4.2).

    Raises:
        InputError: not uint8, or the last axis is not RGB.
    """
    if image.dtype != torch.uint8 or image.ndim < 3 or image.shape[-1] != 3:
        raise InputError(f"to_grey needs a uint8 RGB image (..., H, W, 3), got {tuple(image.shape)} {image.dtype}.")
    red, green, blue = image.to(torch.int32).unbind(-1)
    return ((9798 * red + 19235 * green + 3735 * blue + 16384) >> 15).to(torch.uint8)


def dct_block(grey: Tensor, boxes: Tensor) -> Tensor:
    """Low 8 x 8 block of the orthonormal DCT-II of each box resized to 224 x 224.

    Args:
        grey: (H, W), or (B, H, W) for a batch; images of several sizes are padded to one, the padding is never read.
        boxes: (..., 4) xyxy pixels for one image, (B, ..., 4) for a batch; truncated to integers towards zero.

    Returns:
        (..., 8, 8) or (B, ..., 8, 8) float64 (float32 where the device has no float64), vertical frequency first.

    Raises:
        InputError: shapes that do not fit, or a box that is empty or outside the image after truncation.
    """
    boxes = as_box_tensor(boxes).to(grey.device)
    if grey.ndim not in (2, 3) or grey.is_complex():
        raise InputError(f"a grey image must be (H, W) or (B, H, W), got {tuple(grey.shape)} {grey.dtype}.")
    if grey.ndim == 3 and (boxes.ndim < 2 or boxes.shape[0] != grey.shape[0]):
        raise InputError(f"{grey.shape[0]} grey images need boxes (B, ..., 4), got {tuple(boxes.shape)}.")
    leading = boxes.shape[:-1]
    images = grey if grey.ndim == 3 else grey[None]
    batch, height, width = images.shape
    corners = boxes.reshape(batch, math.prod(leading) // max(batch, 1), 4).trunc()
    x1, y1, x2, y2 = corners.unbind(-1)
    usable = (x1 >= 0) & (y1 >= 0) & (x2 > x1) & (y2 > y1) & (x2 <= width) & (y2 <= height)
    if not usable.all():
        wrong = [round(v, 2) for v in boxes.reshape(*usable.shape, 4)[~usable][0].tolist()]
        raise InputError(
            f"cannot hash box {wrong} of an image {width} wide and {height} high: after truncation to whole pixels it "
            "must lie inside the image and keep at least one pixel."
        )
    precision = torch.float32 if grey.device.type == "mps" else torch.float64
    images = images.to(precision)
    chunk = max(1, _CHUNK // max(batch, 1))
    blocks = [_block(images, part.to(precision)) for part in corners.split(chunk, dim=1)]
    return torch.cat(blocks, 1).reshape(*leading, HASH_SIZE, HASH_SIZE)


def perceptual_hash(grey: Tensor, boxes: Tensor) -> Tensor:
    """64-bit hash of each box: is a coefficient of `dct_block` above the mean of all 64, the constant one included?

    Arguments and errors are those of `dct_block`. Returns bool (..., 64), row by row of the block.
    """
    block = dct_block(grey, boxes).flatten(-2)
    return block > block.mean(-1, keepdim=True)


def hamming(a: Tensor, b: Tensor) -> Tensor:
    """Number of bits in which bool hashes (..., N) differ, int64 (...); the leading axes broadcast."""
    if a.dtype != torch.bool or b.dtype != torch.bool or a.shape[-1:] != b.shape[-1:]:
        raise InputError(
            f"hamming needs bool hashes of one length, got {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}."
        )
    return (a ^ b).sum(-1)


def _cosines(like: Tensor) -> Tensor:
    """First 8 rows of the orthonormal DCT-II matrix of length 224: (8, 224)."""
    frequency = torch.arange(HASH_SIZE, device=like.device, dtype=like.dtype)[:, None]
    place = torch.arange(RESIZED, device=like.device, dtype=like.dtype) + 0.5
    cosines = torch.cos(frequency * place * (math.pi / RESIZED)) * math.sqrt(2.0 / RESIZED)
    cosines[0] = math.sqrt(1.0 / RESIZED)
    return cosines


def _basis(start: Tensor, stop: Tensor, size: int) -> Tensor:
    """Crop, resize and cosines of one axis in one matrix: (B, N, 8, size).

    `start` and `stop` (B, N) are the whole-pixel ends of the crop. Pixel centres are at half-integers, and beyond the
    outermost centres the border pixel is repeated.
    """
    cosines = _cosines(start)
    length = (stop - start)[..., None]
    place = torch.arange(RESIZED, device=start.device, dtype=start.dtype) + 0.5
    position = torch.minimum((place * (length / RESIZED) - 0.5).clamp(min=0.0), length - 1.0)
    low = position.floor()
    fraction = (position - low)[..., None, :]
    high = torch.minimum(low + 1.0, length - 1.0)
    weight = torch.cat((cosines * (1.0 - fraction), cosines * fraction), -1)
    pixel = (torch.cat((low, high), -1) + start[..., None]).long()[..., None, :].expand_as(weight)
    return weight.new_zeros(*weight.shape[:-1], size).scatter_add_(-1, pixel, weight)


def _block(images: Tensor, corners: Tensor) -> Tensor:
    """(B, H, W) and whole-pixel (B, N, 4) -> (B, N, 8, 8)."""
    batch, height, width = images.shape
    x1, y1, x2, y2 = corners.unbind(-1)
    lines = _basis(y1, y2, height).flatten(1, 2) @ images
    return lines.view(batch, -1, HASH_SIZE, width) @ _basis(x1, x2, width).transpose(-1, -2)
