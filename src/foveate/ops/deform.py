"""Deformable bilinear sampling with zero padding in pure PyTorch: the DCNv4 core and deformable convolution v1, v2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import InputError

# Up to this many cells a map is sampled by a dense (cells x cells) matrix product, which beats gathering.
_DENSE_CELLS = 1024
# Up to this many, that matrix is made on a CPU of one multiply-add a tap over all cells of all maps, where a small
# product a cell would cost its call; not with gradients, for which every tap would be kept.
_FEW_CELLS = 64


def deform_sample(value: Tensor, offset_mask: Tensor, groups: int, kernel_size: int = 3) -> Tensor:
    """Core of DCNv4 (Xiong et al., CVPR 2024; spec section 2.4, step 4) with stride 1 and "same" padding.

    For group g and cell (y, x), with K = kernel_size**2 taps, k = kernel_size * i + j, i the *column* and j the row,
    r = kernel_size // 2::

        out_g(y, x) = sum_k m_k * bilinear(value_g; x + i - r + dx_k, y + j - r + dy_k)

    The weights m_k are used as they are (no softmax, no sigmoid), and value is zero outside its map.

    Args:
        value: (B, H, W, C) floating, C divisible by `groups`.
        offset_mask: (B, H, W, >= 3 * groups * K). Group g owns the 3 K numbers from 3 K g: K pairs (dx, dy) in cells,
            then K weights. Channels beyond 3 * groups * K are padding and not read.
        groups: channel groups that share their offsets.
        kernel_size: odd.

    Returns:
        (B, H, W, C) in the dtype of `value`, differentiable in both arguments.

    Raises:
        InputError: shapes that do not fit together.
    """
    taps = kernel_size * kernel_size
    if value.ndim != 4 or not value.is_floating_point() or groups < 1 or value.shape[3] % groups:
        raise InputError(
            f"deform_sample needs a floating value (B, H, W, C) with C divisible by {groups} groups, "
            f"got {tuple(value.shape)} {value.dtype}."
        )
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise InputError(f"deform_sample needs an odd kernel_size, got {kernel_size}.")
    if offset_mask.shape[:-1] != value.shape[:-1] or offset_mask.shape[-1] < 3 * groups * taps:
        raise InputError(
            f"deform_sample needs an offset_mask of shape {(*value.shape[:-1], 3 * groups * taps)} (or more channels), "
            f"got {tuple(offset_mask.shape)}."
        )
    height, width, channels = value.shape[1:]
    with torch.autocast(value.device.type, enabled=False):
        # Coordinates stay in float32 or better: bfloat16 could not tell neighbouring sixteenths of a cell apart.
        precision = torch.promote_types(torch.promote_types(value.dtype, offset_mask.dtype), torch.float32)
        per_group = offset_mask[..., : 3 * groups * taps].to(precision).unflatten(-1, (groups, 3 * taps))
        per_group = per_group.permute(0, 3, 4, 1, 2).flatten(0, 1)  # (B G, 3 K, H, W)
        weights = per_group[:, 2 * taps :]
        tap = torch.arange(taps, device=value.device, dtype=precision)[:, None, None]
        column = torch.arange(width, device=value.device, dtype=precision)
        row = torch.arange(height, device=value.device, dtype=precision)[:, None]
        radius = kernel_size // 2
        x = per_group[:, 0 : 2 * taps : 2] + (column + tap.div(kernel_size, rounding_mode="floor") - radius)
        y = per_group[:, 1 : 2 * taps : 2] + (row + tap.remainder(kernel_size) - radius)
        grouped = value.unflatten(-1, (groups, channels // groups))  # (B, H, W, G, C/G)
        if height * width <= _DENSE_CELLS:
            sampled = _sample_dense(grouped, x, y, weights)
        else:
            sampled = _sample_taps(grouped, x, y, weights)
    return sampled


def _sample_dense(grouped: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """All taps folded into one (cells x cells) matrix per group, then one product with the values.

    `grouped` (B, H, W, G, D); x, y, weights (B G, K, H, W) -> (B, H, W, G D).
    """
    batch, height, width, groups, depth = grouped.shape
    cells = height * width
    needs_gradient = x.requires_grad or y.requires_grad or weights.requires_grad
    if cells <= _FEW_CELLS and not needs_gradient and grouped.device.type == "cpu":
        matrix = _matrix_of_few_cells(x, y, weights).unflatten(1, (batch, groups)).permute(1, 2, 3, 0)
    else:
        along_x = _hat(x.flatten(2).transpose(1, 2), width)  # (B G, cells, K, W)
        along_y = _hat(y.flatten(2).transpose(1, 2), height)
        along_y = along_y * weights.flatten(2).transpose(1, 2)[..., None]
        matrix = (along_y.transpose(2, 3) @ along_x).view(batch, groups, cells, cells)
    values = grouped.reshape(batch, cells, groups, depth).transpose(1, 2)
    sampled = matrix.to(grouped.dtype) @ values
    return sampled.transpose(1, 2).reshape(batch, height, width, groups * depth)


def _matrix_of_few_cells(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """How much every cell counts in every sample: x, y, weights (N, K, H, W) -> (H W, N, H W), read cells first."""
    count, _, height, width = x.shape
    # Samples innermost, so that each operation runs along memory.
    x, y, weights = (part.flatten(2).transpose(0, 1).flatten(1)[:, None] for part in (x, y, weights))  # (K, 1, N H W)
    along_x = _hat_along(x, width)
    along_y = _hat_along(y, height).mul_(weights)
    matrix = along_y[0][:, None] * along_x[0]
    for tap in range(1, len(along_x)):
        matrix.addcmul_(along_y[tap][:, None], along_x[tap])
    return matrix.view(height * width, count, height * width)


def _hat_along(position: Tensor, size: int) -> Tensor:
    """The short form of `_hat` with the cells second: (K, 1, M) -> (K, size, M)."""
    cells = torch.arange(size, device=position.device, dtype=position.dtype)[:, None]
    return (position - cells).abs_().neg_().add_(1.0).clamp_min_(0.0)


def _hat(position: Tensor, size: int) -> Tensor:
    """Bilinear weights of the cells 0..size-1 at `position`: (...,) -> (..., size); none beyond one cell outside.

    For a gradient they are written with floor rather than as 1 - |distance|, whose derivative vanishes on the cell
    centres: there, where training starts with zero offsets, the one-sided slope of the interpolation is what lets
    offsets learn. Without one the short form gives the same weights in a third of the time.
    """
    position = position.clamp(-2.0, size + 1.0)
    cells = torch.arange(size, device=position.device, dtype=position.dtype)
    if not position.requires_grad:
        return (position[..., None] - cells).abs_().neg_().add_(1.0).clamp_min_(0.0)
    low = position.detach().floor()
    fraction = (position - low)[..., None]
    low = low[..., None]
    return (cells == low) * (1.0 - fraction) + (cells == low + 1.0) * fraction


def _sample_taps(grouped: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """One bilinear sampling per tap, accumulated, so that no (B, C, H, W, K) tensor exists. Arguments as above."""
    batch, height, width, groups, depth = grouped.shape
    maps = grouped.permute(0, 3, 4, 1, 2).reshape(batch * groups, depth, height, width)
    total = torch.zeros_like(maps)
    for k in range(x.shape[1]):
        total = total + _bilinear(maps, x[:, k], y[:, k]) * weights[:, k, None].to(maps.dtype)
    return total.view(batch, groups, depth, height, width).permute(0, 3, 4, 1, 2).flatten(3)


def _bilinear(maps: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Bilinear samples with zero padding: maps (N, D, H, W), x and y (N, h, w) in cells -> (N, D, h, w)."""
    height, width = maps.shape[-2:]
    x = (2.0 * x.clamp(-2.0, width + 1.0) + 1.0) / width - 1.0
    y = (2.0 * y.clamp(-2.0, height + 1.0) + 1.0) / height - 1.0
    grid = torch.stack((x, y), -1)
    sampled = F.grid_sample(maps.to(grid.dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled.to(maps.dtype)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """Deformable convolution v1 (Dai et al., ICCV 2017) and, with `mask`, v2 (Zhu et al., CVPR 2019, equation 1).

    Tap k = kernel_width * row + column (row-major) of cell p reads ``input(p * stride - padding + k * dilation +
    offset_k) * mask_k``, bilinearly, zero outside the map. Arguments are those of the usual detection libraries.

    Args:
        input: (B, C, H, W) floating.
        offset: (B, 2 * D * kh * kw, h, w), pairs (dy, dx) in cells; D offset groups divide the channels.
        weight: (C', C / convolution groups, kh, kw).
        bias: (C',) or None.
        mask: (B, D * kh * kw, h, w) modulation, used as it is, or None for all ones.
        stride, padding, dilation: as in `torch.nn.functional.conv2d`, one number or (y, x).

    Returns:
        (B, C', h, w), differentiable in all tensors.

    Raises:
        InputError: shapes that do not fit together.
    """
    (stride_y, stride_x), (pad_y, pad_x), (step_y, step_x) = (
        (v, v) if isinstance(v, int) else v for v in (stride, padding, dilation)
    )
    if input.ndim != 4 or weight.ndim != 4 or not input.is_floating_point():
        raise InputError(
            f"deform_conv2d needs input (B, C, H, W) and weight (C', C / groups, kh, kw), "
            f"got {tuple(input.shape)} {input.dtype} and {tuple(weight.shape)}."
        )
    batch, channels, height, width = input.shape
    out_channels, per_group, kernel_h, kernel_w = weight.shape
    if min(stride_y, stride_x, step_y, step_x) < 1 or min(pad_y, pad_x) < 0 or per_group < 1 or channels % per_group:
        raise InputError(
            f"deform_conv2d cannot apply a weight {tuple(weight.shape)} to {channels} channels with stride {stride}, "
            f"padding {padding} and dilation {dilation}."
        )
    groups = channels // per_group
    out_h = (height + 2 * pad_y - step_y * (kernel_h - 1) - 1) // stride_y + 1
    out_w = (width + 2 * pad_x - step_x * (kernel_w - 1) - 1) // stride_x + 1
    taps = kernel_h * kernel_w
    offset_groups = offset.shape[1] // (2 * taps) if offset.ndim == 4 else 0
    if (
        offset_groups < 1
        or out_channels % groups
        or channels % offset_groups
        or offset.shape != (batch, 2 * offset_groups * taps, out_h, out_w)
        or (mask is not None and mask.shape != (batch, offset_groups * taps, out_h, out_w))
        or (bias is not None and bias.shape != (out_channels,))
    ):
        raise InputError(
            f"deform_conv2d needs an offset (B, 2 * offset groups * {taps}, {out_h}, {out_w}), a mask with half as "
            f"many channels and a bias ({out_channels},), got {tuple(offset.shape)}, "
            f"{None if mask is None else tuple(mask.shape)} and {None if bias is None else tuple(bias.shape)}."
        )
    with torch.autocast(input.device.type, enabled=False):
        precision = torch.promote_types(input.dtype, torch.float32)
        maps = input.reshape(batch * offset_groups, channels // offset_groups, height, width)
        shifts = offset.to(precision).reshape(batch * offset_groups, taps, 2, out_h, out_w)
        row = torch.arange(out_h, device=input.device, dtype=precision)[:, None] * stride_y - pad_y
        column = torch.arange(out_w, device=input.device, dtype=precision) * stride_x - pad_x
        total = input.new_zeros(batch, out_channels, out_h, out_w)
        for k in range(taps):
            y = shifts[:, k, 0] + (row + k // kernel_w * step_y)
            x = shifts[:, k, 1] + (column + k % kernel_w * step_x)
            sampled = _bilinear(maps, x, y)
            if mask is not None:
                modulation = mask.reshape(batch * offset_groups, taps, out_h, out_w)[:, k, None]
                sampled = sampled * modulation.to(input.dtype)
            sampled = sampled.reshape(batch, channels, out_h, out_w)
            tap_weight = weight[:, :, k // kernel_w, k % kernel_w, None, None].to(input.dtype)
            total = total + F.conv2d(sampled, tap_weight, groups=groups)
        return total if bias is None else total + bias.to(input.dtype)[:, None, None]
