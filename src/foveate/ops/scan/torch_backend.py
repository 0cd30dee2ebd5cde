"""The scan in plain PyTorch (spec 2.6): blocks that stay in the cache, each a two-pass scan over chunks.

Inside a block, K chunks of T elements are scanned side by side as if each began with a zero state, which takes T steps;
then K steps carry the state from chunk to chunk, and one pass adds what each chunk inherits. So L elements cost about
2 T + K operators instead of L.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_SCRATCH = 1 << 17
"""Elements of a scratch tensor: half a megabyte of float32, so that the three or four of them stay in the cache."""
_LANES = 12_288
"""With this many lanes a step of the plain loop costs more than calling the operator: chunks would not pay."""


def forward(x: Tensor, y: Tensor | None, h0: Tensor, reverse: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """See `operators.scan`."""
    h = x.new_empty((*x.shape[:3], x.shape[-1]))
    last = h0.clone()
    for group, rows, steps in _blocks(h, reverse, against=False):
        carry = last[rows, group]
        if y is None:
            a, b = _coefficients(x[rows, steps, group, 0].to(carry.dtype), x[rows, steps, group, 1].to(carry.dtype))
        else:
            a, b = _copy(x[rows, steps, group], carry), _copy(y[rows, steps, group], carry)
        last[rows, group] = _solve(a, b, carry, reverse[group])
        h[rows, steps, group] = b
    return h, last


def backward(
    x: Tensor, y: Tensor | None, h: Tensor, h0: Tensor, dh: Tensor, dlast: Tensor, reverse: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `operators.scan_backward`."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dy = None if y is None else torch.empty_like(y, memory_format=torch.contiguous_format)
    carries = dlast.clone()
    length = x.shape[1]
    for group, rows, steps in _blocks(h, reverse, against=True):
        backwards = reverse[group]
        carry = carries[rows, group].clone()
        upstream = dh[rows, steps, group].to(carry.dtype)
        if y is None:
            p, q = x[rows, steps, group, 0].to(carry.dtype), x[rows, steps, group, 1].to(carry.dtype)
            a = torch.neg(q).sigmoid_()
        else:
            a = _copy(x[rows, steps, group], carry)
        # Against the direction of the scan: c_t = a_t c_{t+1} + a_t dh_t.
        c = a * upstream
        carries[rows, group] = _solve(a, c, carry, not backwards)
        adjoint = upstream.clone()  # λ
        before = torch.empty_like(adjoint)  # h of the element before, in the direction of the scan
        if backwards:
            adjoint[:, 1:] += c[:, :-1]
            adjoint[:, 0] += carry
            before[:, :-1] = h[rows, steps, group][:, 1:]
            before[:, -1] = h0[rows, group] if steps.stop == length else h[rows, steps.stop, group]
        else:
            adjoint[:, :-1] += c[:, 1:]
            adjoint[:, -1] += carry
            before[:, 1:] = h[rows, steps, group][:, :-1]
            before[:, 0] = h0[rows, group] if steps.start == 0 else h[rows, steps.start - 1, group]
        if dy is None:
            z = torch.sigmoid(q)
            low = p.clamp_max(0).sigmoid_()  # sigmoid(p) for p < 0
            slope = torch.where(p.ge(0), 1.0, low * (1 - low))
            adjoint.mul_(z)
            dx[rows, steps, group, 0] = slope.mul_(adjoint)
            dx[rows, steps, group, 1] = (
                low.add_(p.clamp_min(0)).sub_(before).mul_(adjoint).mul_(torch.neg(q).sigmoid_())
            )
        else:
            dx[rows, steps, group] = before.mul_(adjoint)
            dy[rows, steps, group] = adjoint
    return dx, dy, carries


def _coefficients(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """a = 1 - z and b = z g(p). Both gates come from their own sigmoid: 1 - z would cancel."""
    b = p.clamp_max(0).sigmoid_().add_(p.clamp_min(0)).mul_(torch.sigmoid(q))
    return torch.neg(q).sigmoid_(), b


def _copy(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype, copy=True, memory_format=torch.contiguous_format)


def _blocks(h: Tensor, reverse: Sequence[bool], *, against: bool) -> Iterator[tuple[int, slice, slice]]:
    """Direction, batch rows and elements of each block, in the order of the scan or against it."""
    batch, length, _, channels = h.shape
    rows = min(batch, max(1, math.ceil(_LANES / channels)))
    steps = min(length, max(1, _SCRATCH // (rows * channels)))
    for group, backwards in enumerate(reverse):
        starts = range(0, length, steps)
        for row in range(0, batch, rows):
            for start in reversed(starts) if backwards != against else starts:
                yield group, slice(row, row + rows), slice(start, min(start + steps, length))


def _solve(a: Tensor, b: Tensor, carry: Tensor, backwards: bool) -> Tensor:
    """Turns b (n, l, c) into h in place, and spoils a; returns the state (n, c) after the last element."""
    rows, length, channels = b.shape
    chunk = length if rows * channels >= _LANES else max(1, math.isqrt(length // 2))
    count = length // chunk
    whole = count * chunk
    first = length - whole if backwards else 0
    if count > 1:
        a_steps = a.narrow(1, first, whole).unflatten(1, (count, chunk))
        b_steps = b.narrow(1, first, whole).unflatten(1, (count, chunk))
        a_list, b_list = list(a_steps.unbind(2)), list(b_steps.unbind(2))
        if backwards:
            a_list.reverse()
            b_list.reverse()
        for t in range(1, chunk):
            b_list[t].addcmul_(a_list[t], b_list[t - 1])
            a_list[t].mul_(a_list[t - 1])
        decays, ends = a_list[-1].unbind(1), b_list[-1].unbind(1)
        inherited = torch.empty_like(b_list[-1])
        for k in reversed(range(count)) if backwards else range(count):
            inherited[:, k] = carry
            carry = torch.addcmul(ends[k], decays[k], carry)
        b_steps.addcmul_(a_steps, inherited[:, :, None])
    else:
        whole = 0
    a_rest, b_rest = list(a.unbind(1)), list(b.unbind(1))
    rest = range(length - whole - 1, -1, -1) if backwards else range(whole, length)
    for t in rest:
        carry = b_rest[t].addcmul_(a_rest[t], carry)
    return carry
