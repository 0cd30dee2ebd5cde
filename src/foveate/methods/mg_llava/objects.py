"""Object features: RoIAlign on the feature pyramid and the mean over its bins (spec 2.4), exact at native resolution.

Upsampling, RoIAlign and the mean are linear and act on rows and columns apart, so that an object's feature is
`wy^T map wx` with one weight per row and column. Folding the upsampling into the weights leaves, for each stage, one
product of (K, n * n) weights with its own n x n map: neither the map of all channels at the finest resolution nor a
tensor of K x channels x bins x bins is ever made.

Shapes: B pictures, K boxes of a picture, R boxes of all, C_k channels and n_k side of stage k.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import InputError
from foveate.ops.roi_align import axis_weights, roi_align

_CHUNK = 2**25
"""Elements of the (K, n * n) weights of one chunk of boxes: 128 MiB, 900 boxes on a map of 192 x 192."""


def pool_objects(
    stages: Sequence[Tensor], boxes: Sequence[Tensor], *, canvas: int, bins: int = 56, pooling: str = "separable"
) -> list[Tensor]:
    """Features of the boxes of each picture: RoIAlign (`aligned=False`, adaptive sampling) on the stages upsampled to
    the side of the first and concatenated, averaged over the bins.

    Args:
        stages: maps (B, C_k, n_k, n_k), the finest first; any floating type.
        boxes: B tensors (K, 4) xyxy in pixels of the canvas.
        canvas: its side in pixels.
        bins: bins per side of RoIAlign.
        pooling: "separable", or "dense", the definition itself, which costs gigabytes at full size.

    Returns:
        B tensors (K, sum of C_k) float32, without gradient.

    Raises:
        InputError: maps that are not square, or not as many box lists as pictures.
    """
    side = _check(stages, boxes)
    device = stages[0].device.type
    # The meta device, on which shapes are tried out, has no autocast.
    single = nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
    with torch.no_grad(), single:
        if pooling == "dense":
            return _pool_dense(stages, boxes, side / canvas, bins)
        counts = [len(own) for own in boxes]
        rows, columns = _weights(torch.cat([own.reshape(-1, 4) for own in boxes]), side, side / canvas, bins)
        pooled = []
        for stage in stages:
            size = stage.shape[-1]
            upsample = upsampling_matrix(size, side) if size != side else None
            along_y = rows if upsample is None else rows @ upsample
            along_x = columns if upsample is None else columns @ upsample
            pooled.append(_pool_stage(stage, along_y.to(stage.device), along_x.to(stage.device), counts))
        return list(torch.cat(pooled, dim=1).split(counts))


def pool_levels(
    stages: Sequence[Tensor], boxes: Sequence[Tensor], *, canvas: int, bins: int, pooling: str = "separable"
) -> list[list[Tensor]]:
    """As `pool_objects`, each stage by itself at its own resolution: for each stage, B tensors (K, C_k)."""
    return [pool_objects([stage], boxes, canvas=canvas, bins=bins, pooling=pooling) for stage in stages]


def upsample_stages(stages: Sequence[Tensor]) -> Tensor:
    """The stages in float32 at the side of the first, bilinear, concatenated: (B, sum of C_k, n_1, n_1)."""
    size = stages[0].shape[-2:]
    return torch.cat(
        [stages[0].float()]
        + [F.interpolate(stage.float(), size, mode="bilinear", align_corners=False) for stage in stages[1:]],
        dim=1,
    )


def upsampling_matrix(size: int, target: int) -> Tensor:
    """(target, size) matrix of the bilinear resize of one axis from `size` to `target` cells, align_corners=False."""
    unit = torch.eye(size)[:, None]
    return F.interpolate(unit, target, mode="linear", align_corners=False)[:, 0].T.contiguous()


def _weights(boxes: Tensor, side: int, scale: float, bins: int) -> tuple[Tensor, Tensor]:
    """(R, side) weight of every row and of every column in the mean over the bins; on the CPU."""
    x0, y0, x1, y1 = (boxes.detach().cpu().float() * scale).unbind(-1)
    rows = axis_weights(y0, y1, bins, side, -1, False).mean(dim=1)
    columns = axis_weights(x0, x1, bins, side, -1, False).mean(dim=1)
    return rows, columns


def _pool_stage(stage: Tensor, rows: Tensor, columns: Tensor, counts: Sequence[int]) -> Tensor:
    """(B, C, n, n), (R, n), (R, n) -> (R, C)."""
    pieces = []
    chunk = max(1, _CHUNK // stage.shape[-1] ** 2)
    for one_map, along_y, along_x in zip(stage, rows.split(list(counts)), columns.split(list(counts)), strict=True):
        flat = one_map.float().flatten(1).T  # (n * n, C)
        for part_y, part_x in zip(along_y.split(chunk), along_x.split(chunk), strict=True):
            pieces.append(torch.einsum("kr,kq->krq", part_y, part_x).flatten(1) @ flat)
    return torch.cat(pieces) if pieces else stage.new_zeros((0, stage.shape[1]), dtype=torch.float32)


def _pool_dense(stages: Sequence[Tensor], boxes: Sequence[Tensor], scale: float, bins: int) -> list[Tensor]:
    pooled = []
    for number, own in enumerate(boxes):
        features = upsample_stages([stage[number : number + 1] for stage in stages])
        index = torch.zeros(len(own), dtype=torch.long)
        aligned = roi_align(features, own.float(), bins, spatial_scale=scale, batch_index=index)
        pooled.append(aligned.mean(dim=(2, 3)))
    return pooled


def _check(stages: Sequence[Tensor], boxes: Sequence[Tensor]) -> int:
    if any(stage.ndim != 4 or stage.shape[-1] != stage.shape[-2] for stage in stages):
        raise InputError(f"stages must be square maps (B, C, n, n), got {[tuple(stage.shape) for stage in stages]}.")
    if len(boxes) != len(stages[0]):
        raise InputError(f"{len(boxes)} lists of boxes are given for {len(stages[0])} pictures; each needs one.")
    return stages[0].shape[-1]
