"""The linear recurrence h_t = a_t h_{t-1} + b_t, forward and backward, on CPU and GPU (spec vision_gru, 2.6).

One operator of torch, `foveate::scan`, is what `torch.compile` and `torch.export` see. What computes it:

- `triton`: fused kernels on CUDA;
- `numba`: a fused kernel on CPUs (extra `fast`);
- `torch`: a blocked two-pass scan in plain PyTorch, on every device;
- `reference`: a loop in float64, to compare with;
- `logspace`: the form of the original code (arXiv 2410.01201, appendix), to compare with.

The first that can run is taken, unless an argument, `use_scan_backend` or `FOVEATE_SCAN_BACKEND` names another;
`scan_backend_in_use` says which. State and arithmetic are float32 at least, whatever the dtype of the inputs. The
recurrence is evaluated as it stands: for a gate in (0, 1) nothing can overflow or cancel, at any length, while the
log-space form loses digits as the length grows (float32: 3e-7 against 6e-3 of relative error at 65,536 elements).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.errors import InputError
from foveate.ops.scan import operators
from foveate.ops.scan.operators import (
    available_scan_backends,
    requested_backend,
    scan_backend_in_use,
    scan_decompositions,
    use_scan_backend,
)
from foveate.ops.scan.reference import linear_sequential, mingru_logspace, mingru_sequential

__all__ = [
    "available_scan_backends",
    "linear_scan",
    "mingru_scan",
    "scan_backend_in_use",
    "scan_decompositions",
    "use_scan_backend",
]

_NARROW = 8
"""Kernels work on neighbouring channels together; with fewer than this the leading dimensions become channels too."""


def linear_scan(
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    *,
    dim: int = -2,
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """h_t = a_t h_{t-1} + b_t along one dimension, element-wise over all others.

    Args:
        a, b: the same shape (..., L, ...) and dtype, floating; any strides.
        h0: the state before the first element, of the shape without `dim`; zero by default.
        dim: the dimension of length L, which may be 0.
        reverse: run from the last element to the first, h_t = a_t h_{t+1} + b_t.
        backend: one of `available_scan_backends()`; by default the fastest for the device.

    Returns:
        h: shape and dtype of `b`. Differentiable once in a, b and h0.

    Raises:
        InputError: shapes or dtypes that do not fit, a dimension that is not there, or an unknown backend.
    """
    if a.shape != b.shape or a.dtype != b.dtype or not b.is_floating_point():
        raise InputError(
            f"linear_scan needs a and b of one shape and floating dtype, got {tuple(a.shape)} {a.dtype} and "
            f"{tuple(b.shape)} {b.dtype}."
        )
    if not -b.ndim <= dim < b.ndim:
        raise InputError(f"linear_scan runs along a dimension of {tuple(b.shape)}, which has no dimension {dim}.")
    dim %= b.ndim
    before, length, after = b.shape[:dim], b.shape[dim], b.shape[dim + 1 :]
    if h0 is not None and h0.shape != (*before, *after):
        raise InputError(f"linear_scan needs a state of shape {(*before, *after)}, got {tuple(h0.shape)}.")
    name = requested_backend(backend)
    if name == "logspace":
        raise InputError("the logspace backend scans minGRU gates only; use another backend for linear_scan.")
    if name == "reference":
        return linear_sequential(a, b, h0, dim, reverse)
    rows, channels = before.numel(), after.numel()
    narrow = channels < _NARROW and rows > 1
    if narrow:
        a, b = (value.movedim(dim, 0).reshape(1, length, 1, rows * channels) for value in (a, b))
        state = None if h0 is None else h0.reshape(1, 1, rows * channels)
    else:
        a, b = (value.reshape(rows, length, 1, channels) for value in (a, b))
        state = None if h0 is None else h0.reshape(rows, 1, channels)
    h, _ = operators.scan(a, b, state, [reverse], name)
    if narrow:
        return h.reshape(length, *before, *after).movedim(0, dim)
    return h.reshape(*before, length, *after)


def mingru_scan(
    pq: Tensor,
    h0: Tensor | None = None,
    reverse: bool | Sequence[bool] = False,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan of a minGRU (spec 2.4): h_t = (1 - z_t) h_{t-1} + z_t g(p_t), z = sigmoid(q), in one fused pass.

    g(p) = p + 0.5 for p >= 0, else sigmoid(p). The kernels read p and q once, write h once, and keep nothing else for
    the backward pass.

    Args:
        pq: (N, L, G * 2 * C): for each of G independent directions the C candidates p, then the C gates q.
        h0: (N, 1, G * C) state before the first element (of the direction), or None for zero.
        reverse: whether a direction runs from the last element to the first; one bool for each of the G directions,
            or one for all channels (G = 1).
        backend: one of `available_scan_backends()`; by default the fastest for the device.

    Returns:
        h (N, L, G * C) in the dtype of `pq`, and the state after the last element (N, 1, G * C), float32 or better.
        Both are differentiable once in pq and h0.

    Raises:
        InputError: shapes that do not fit, or an unknown backend.
    """
    directions = [reverse] if isinstance(reverse, bool) else [bool(value) for value in reverse]
    groups = len(directions)
    if pq.ndim != 3 or not pq.is_floating_point() or not groups or pq.shape[2] % (2 * groups):
        raise InputError(
            f"mingru_scan needs a floating pq (N, L, {2 * groups} * C) for {groups} directions, got {tuple(pq.shape)} "
            f"{pq.dtype}."
        )
    batch, length, width = pq.shape
    channels = width // (2 * groups)
    if h0 is not None and h0.shape != (batch, 1, groups * channels):
        raise InputError(f"mingru_scan needs a state of shape {(batch, 1, groups * channels)}, got {tuple(h0.shape)}.")
    name = requested_backend(backend)
    split = pq.reshape(batch, length, groups, 2, channels)
    state = None if h0 is None else h0.reshape(batch, groups, channels)
    if name in ("reference", "logspace"):
        compute = mingru_sequential if name == "reference" else mingru_logspace
        parts = [
            compute(split[:, :, g, 0], split[:, :, g, 1], None if state is None else state[:, g], directions[g])
            for g in range(groups)
        ]
        h = torch.stack([part for part, _ in parts], 2)
        last = torch.stack([end for _, end in parts], 1)
    else:
        h, last = operators.scan(split, None, state, directions, name)
    return h.reshape(batch, length, groups * channels), last.reshape(batch, 1, groups * channels)
