"""RoIAlign (He et al., "Mask R-CNN", ICCV 2017, section 3) as two matrix products.

A bilinear sample is a product of one interpolation along y and one along x, and so are the average over the samples of
a bin and the rule that samples outside the map count as zero. RoIAlign is therefore exactly ``Wy @ map @ Wx^T`` with
one small matrix per region and axis, which needs no gather, batches over all regions and runs on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.errors import InputError

# Size of the intermediate (regions, rows, W, C) of one chunk of regions, in elements: 2**27 floats are 512 MiB.
_CHUNK_ELEMENTS = 2**27
# Samples per region and axis. Boxes that lie in a map need about as many as the map has cells.
_MAX_SAMPLES = 2**16


def roi_align(
    input: Tensor,
    boxes: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    batch_index: Tensor | None = None,
) -> Tensor:
    """Average of bilinear samples of `input` in an even grid of bins over each box.

    Sample coordinates follow the semantics that detection libraries agree on: a coordinate below -1 or above the size
    of the map gives zero, the rest is clamped to the border cells; without `aligned` a region is at least one cell wide
    and high.

    Args:
        input: feature maps (B, C, H, W), floating. Channels-last memory is the fast layout, in and out.
        boxes: (R, 4) xyxy in pixels of the image that has `1 / spatial_scale` pixels per cell.
        output_size: bins (rows, columns), or one number for both.
        spatial_scale: cells per pixel.
        sampling_ratio: samples per bin along each axis; 0 or less means ceil(region / bins), counted in cells per
            region and axis.
        aligned: shift by half a cell, so that the centre of cell (0, 0) is the point (0.5, 0.5).
        batch_index: (R,) integer, the map that each box lies in. May be left out if R == B: box i is in map i.

    Returns:
        (R, C, rows, columns) in the dtype of `input`; gradients flow to `input`, not to `boxes`.

    Raises:
        InputError: wrong shapes or dtypes, a `batch_index` outside [0, B), or boxes far larger than the map in the
            adaptive mode.
    """
    rows, columns = (output_size, output_size) if isinstance(output_size, int) else output_size
    _check(input, boxes, rows, columns, spatial_scale, batch_index)
    batch, channels, height, width = input.shape
    regions = boxes.shape[0]
    with torch.autocast(input.device.type, enabled=False):
        with torch.no_grad():
            coordinates = torch.float64 if input.dtype == torch.float64 else torch.float32
            corners = boxes.to(input.device, coordinates) * spatial_scale - (0.5 if aligned else 0.0)
            x1, y1, x2, y2 = corners.unbind(-1)
            along_y = axis_weights(y1, y2, rows, height, sampling_ratio, aligned).to(input.dtype)
            along_x = axis_weights(x1, x2, columns, width, sampling_ratio, aligned).to(input.dtype)
        maps = input.permute(0, 2, 3, 1).reshape(batch, height, width * channels)
        if regions == 0:
            # Still a function of the input, so that a batch without regions can be trained on.
            pooled = maps.view(batch, -1, channels).sum((0, 1)).expand(0, rows, columns, channels)
        elif batch_index is None:
            pooled = _pool_lines((along_y @ maps).view(regions, rows, width, channels), along_x)
        else:
            # One product per map serves all of its regions; a copy of the map for each of them would be slower.
            index = batch_index.to(input.device)
            order = index.argsort(stable=True)
            counts = index.bincount(minlength=batch).tolist()
            chunk = max(1, _CHUNK_ELEMENTS // (rows * width * channels))
            pieces = []
            for one_map, own in zip(maps, order.split(counts), strict=True):
                for part in own.split(chunk) if len(own) else ():
                    lines = along_y[part].flatten(0, 1) @ one_map
                    pieces.append(_pool_lines(lines.view(-1, rows, width, channels), along_x[part]))
            pooled = torch.cat(pieces)[order.argsort()]
    return pooled.permute(0, 3, 1, 2)


def _pool_lines(lines: Tensor, along_x: Tensor) -> Tensor:
    """(R, rows, W, C) lines and (R, columns, W) weights -> (R, rows, columns, C)."""
    return along_x[:, None] @ lines


def axis_weights(start: Tensor, stop: Tensor, bins: int, size: int, sampling_ratio: int, aligned: bool) -> Tensor:
    """Interpolation matrix of one axis: (R, bins, size), row b averages the samples of bin b.

    `start` and `stop` (R,) are in cells. The order of the operations is that of the reference kernels, so that a sample
    on the edge between "zero" and "clamped" falls on the same side in floating point.
    """
    length = stop - start
    if not aligned:
        length = length.clamp(min=1.0)
    bin_length = length / bins
    if sampling_ratio > 0:
        samples, most = torch.full_like(length, sampling_ratio), sampling_ratio
    else:
        samples = bin_length.ceil().clamp(min=0.0)
        largest = samples.max().item() if samples.numel() else 0.0
        if not largest * bins <= _MAX_SAMPLES:
            raise InputError(
                f"a region is {length.max().item():g} cells long, too large for adaptive sampling of {bins} bins: "
                "clip the boxes to the image first."
            )
        most = int(largest)
    weights = start.new_zeros(start.shape[0], bins, size)
    cells = torch.arange(size, device=start.device, dtype=start.dtype)
    first = start[:, None] + torch.arange(bins, device=start.device, dtype=start.dtype) * bin_length[:, None]
    for i in range(most):
        within = ((i + 0.5) * bin_length / samples.clamp(min=1.0))[:, None]
        position = first + within
        counts = (samples[:, None] > i) & ~((position < -1.0) | (position > size))
        position = position.clamp(0.0, size - 1)
        # The hat function is the pair of bilinear weights, spread over all cells.
        hat = (1.0 - (position[..., None] - cells).abs()).clamp(min=0.0)
        weights += hat * counts[..., None]
    return weights / samples.clamp(min=1.0)[:, None, None]


def _check(
    input: Tensor, boxes: Tensor, rows: int, columns: int, spatial_scale: float, batch_index: Tensor | None
) -> None:
    if input.ndim != 4 or not input.is_floating_point() or 0 in input.shape[1:]:
        raise InputError(
            f"roi_align needs a floating input (B, C, H, W) without empty axes, got {tuple(input.shape)} {input.dtype}."
        )
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise InputError(f"roi_align needs boxes of shape (R, 4), got {tuple(boxes.shape)}.")
    if rows < 1 or columns < 1 or not spatial_scale > 0:
        raise InputError(
            f"roi_align needs a positive output_size and spatial_scale, got {(rows, columns)} and {spatial_scale}."
        )
    if batch_index is None:
        if boxes.shape[0] != input.shape[0]:
            raise InputError(
                f"roi_align got {boxes.shape[0]} boxes for {input.shape[0]} maps: pass batch_index, one map per box."
            )
        return
    if batch_index.shape != boxes.shape[:1] or batch_index.is_floating_point() or batch_index.dtype == torch.bool:
        raise InputError(
            f"batch_index must be {boxes.shape[0]} integers, got {tuple(batch_index.shape)} {batch_index.dtype}."
        )
    if batch_index.numel():
        low, high = (int(v) for v in batch_index.aminmax())
        if low < 0 or high >= input.shape[0]:
            raise InputError(f"batch_index goes from {low} to {high}, but there are {input.shape[0]} maps.")
