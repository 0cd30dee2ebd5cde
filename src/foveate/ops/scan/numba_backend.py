"""The fused scan for CPUs, compiled by numba at its first call and kept in its cache (spec 2.6).

A job is a sequence and a range of its channels; channels of a step are neighbours in memory and go through the vector
unit together, with an exponential of our own, since numba has no vectorised one. Jobs are shared out to a few Python
threads (the kernels hold no lock): numba's own threading layers either forbid concurrent callers or forked children.
"""

# pyright: reportCallIssue=false
# (numba gives the typing context to an intrinsic by itself)
from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from torch import Tensor

# No "nnan", "ninf" and "reassoc": NaN must stay NaN, and rounding by a large constant must not be simplified away.
_FAST = {"contract", "arcp", "nsz"}
_WIDEST = 512
"""Channels of a job at most: wide jobs read memory in longer runs, and their state still fits the first cache."""
_NARROWEST = 64
"""Channels of a job at least, where there are as many: 256 bytes, four cache lines."""

_LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts, the first with few bits, so that n * ln 2 is exact in float32 arithmetic.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(math.log(2) - 0.693359375)
_ROUND = np.float32(1.5 * 2**23)  # adding it rounds a float32 to an integer, which then stands in the low bits
_ROUND_BITS = np.int32(0x4B400000)
_LIMIT = np.float32(87.0)  # e^±87 is still a normal float32
_T2, _T3, _T4, _T5, _T6, _T7 = (np.float32(1 / math.factorial(k)) for k in range(2, 8))
_ONE, _HALF, _ZERO = np.float32(1), np.float32(0.5), np.float32(0)
_SHIFT, _BIAS = np.int32(23), np.int32(127)


@intrinsic
def _bits(typing_context: Any, value: Any) -> Any:
    """The bits of a float32 as an int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def _from_bits(typing_context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _smaller(typing_context: Any, bound: Any, value: Any) -> Any:
    """min(bound, value), and NaN if the value is: a compare and a select, which become one instruction."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", *arguments), *arguments)

    return types.float32(types.float32, types.float32), generate


@intrinsic
def _larger(typing_context: Any, bound: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)

    return types.float32(types.float32, types.float32), generate


def _exp(x: Any) -> Any:
    """e^x of a float32 (relative error 2e-7, x within ±87) or a float64 (within ±700); bounds keep it finite."""
    return math.exp(min(max(x, -700.0), 700.0))


@overload(_exp, inline="always", jit_options={"fastmath": _FAST})
def _exp_compiled(x: Any) -> Any:
    if x == types.float32:

        def exp32(x: Any) -> Any:
            x = _larger(-_LIMIT, _smaller(_LIMIT, x))
            shifted = x * _LOG2_E + _ROUND
            n = shifted - _ROUND
            r = x - n * _LN2_HIGH - n * _LN2_LOW
            series = ((((((_T7 * r + _T6) * r + _T5) * r + _T4) * r + _T3) * r + _T2) * r + _ONE) * r + _ONE
            return series * _from_bits(np.int32(((_bits(shifted) - _ROUND_BITS) + _BIAS) << _SHIFT))

        return exp32

    def exp64(x: Any) -> Any:
        return math.exp(min(max(x, -700.0), 700.0))

    return exp64


def _compiled(function: Callable[..., None]) -> Any:
    options: dict[str, Any] = {"nogil": True, "fastmath": _FAST, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to write the cache: every process compiles then
        return njit(**options)(function)


# Arrays are flat. Row (n, t, g) of h has `channels` numbers; the same row of pq has as many p, then as many q.


@_compiled
def _mingru_forward(first, last, width, pq, h, h0, ends, length, groups, channels, reverse):  # type: ignore[no-untyped-def]
    one, half, zero = h0.dtype.type(1), h0.dtype.type(0.5), h0.dtype.type(0)
    blocks = (channels + width - 1) // width
    state = np.empty(width, h0.dtype)
    for job in range(first, last):
        n, g, low = job // (groups * blocks), job // blocks % groups, job % blocks * width
        size = min(width, channels - low)
        at = (n * groups + g) * channels + low
        state[:size] = h0[at : at + size]
        for i in range(length):
            t = length - 1 - i if reverse[g] else i
            row = ((n * length + t) * groups + g) * channels + low
            start = 2 * row - low
            p, q = pq[start : start + size], pq[start + channels : start + channels + size]
            out = h[row : row + size]
            for c in range(size):
                e = _exp(-q[c])
                z = one / (one + e)
                g_p = p[c] + half if p[c] >= zero else one / (one + _exp(-p[c]))
                value = e * z * state[c] + z * g_p
                state[c] = value
                out[c] = value
        ends[at : at + size] = state[:size]


@_compiled
def _mingru_backward(  # type: ignore[no-untyped-def]
    first, last, width, pq, h, h0, dh, dlast, dpq, dh0, length, groups, channels, reverse
):
    one, half, zero = h0.dtype.type(1), h0.dtype.type(0.5), h0.dtype.type(0)
    blocks = (channels + width - 1) // width
    carry = np.empty(width, h0.dtype)
    for job in range(first, last):
        n, g, low = job // (groups * blocks), job // blocks % groups, job % blocks * width
        size = min(width, channels - low)
        at = (n * groups + g) * channels + low
        carry[:size] = dlast[at : at + size]
        for i in range(length):
            t = i if reverse[g] else length - 1 - i
            row = ((n * length + t) * groups + g) * channels + low
            start = 2 * row - low
            p, q = pq[start : start + size], pq[start + channels : start + channels + size]
            dp, dq = dpq[start : start + size], dpq[start + channels : start + channels + size]
            d = dh[row : row + size]
            if i == length - 1:
                before = h0[at : at + size]
            else:
                above = row + groups * channels if reverse[g] else row - groups * channels
                before = h[above : above + size]
            for c in range(size):
                e = _exp(-q[c])
                z = one / (one + e)
                a = e * z
                low_g = one / (one + _exp(-p[c]))
                g_p = p[c] + half if p[c] >= zero else low_g
                slope = one if p[c] >= zero else low_g * (one - low_g)
                adjoint = d[c] + carry[c]
                dp[c] = adjoint * z * slope
                dq[c] = adjoint * (g_p - before[c]) * z * a
                carry[c] = a * adjoint
        dh0[at : at + size] = carry[:size]


@_compiled
def _linear_forward(first, last, width, a, b, h, h0, ends, length, groups, channels, reverse):  # type: ignore[no-untyped-def]
    blocks = (channels + width - 1) // width
    state = np.empty(width, h0.dtype)
    for job in range(first, last):
        n, g, low = job // (groups * blocks), job // blocks % groups, job % blocks * width
        size = min(width, channels - low)
        at = (n * groups + g) * channels + low
        state[:size] = h0[at : at + size]
        for i in range(length):
            t = length - 1 - i if reverse[g] else i
            row = ((n * length + t) * groups + g) * channels + low
            factor, new, out = a[row : row + size], b[row : row + size], h[row : row + size]
            for c in range(size):
                value = factor[c] * state[c] + new[c]
                state[c] = value
                out[c] = value
        ends[at : at + size] = state[:size]


@_compiled
def _linear_backward(  # type: ignore[no-untyped-def]
    first, last, width, a, h, h0, dh, dlast, da, db, dh0, length, groups, channels, reverse
):
    blocks = (channels + width - 1) // width
    carry = np.empty(width, h0.dtype)
    for job in range(first, last):
        n, g, low = job // (groups * blocks), job // blocks % groups, job % blocks * width
        size = min(width, channels - low)
        at = (n * groups + g) * channels + low
        carry[:size] = dlast[at : at + size]
        for i in range(length):
            t = i if reverse[g] else length - 1 - i
            row = ((n * length + t) * groups + g) * channels + low
            factor, d = a[row : row + size], dh[row : row + size]
            to_a, to_b = da[row : row + size], db[row : row + size]
            if i == length - 1:
                before = h0[at : at + size]
            else:
                above = row + groups * channels if reverse[g] else row - groups * channels
                before = h[above : above + size]
            for c in range(size):
                adjoint = d[c] + carry[c]
                to_a[c] = adjoint * before[c]
                to_b[c] = adjoint
                carry[c] = factor[c] * adjoint
        dh0[at : at + size] = carry[:size]


# ---------------------------------------------------------------- threads

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    """A forked child has none of its parent's threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _run(kernel: Any, h: Tensor, reverse: Sequence[bool], arrays: Sequence[np.ndarray]) -> None:
    """Calls a kernel for all jobs, shared out evenly to as many threads as torch uses."""
    global _pool
    batch, length, groups, channels = h.shape
    threads = torch.get_num_threads()
    blocks = -(-threads // (batch * groups))  # so many blocks of channels keep every thread busy
    width = max(-(-channels // blocks), _NARROWEST)
    width = min(-(-width // 16) * 16, _WIDEST)
    jobs = batch * groups * -(-channels // width)
    threads = min(threads, jobs)
    rest = (width, *arrays, length, groups, channels, np.array(reverse))
    if threads == 1:
        kernel(0, jobs, *rest)
        return
    if _pool is None or _pool._max_workers < threads:
        _pool = ThreadPoolExecutor(threads, "foveate-scan")
    bounds = [jobs * k // threads for k in range(threads + 1)]
    work = [_pool.submit(kernel, bounds[k], bounds[k + 1], *rest) for k in range(threads)]
    for part in work:
        part.result()


def _flat(value: Tensor, dtype: torch.dtype) -> np.ndarray:
    return value.detach().to(dtype).contiguous().view(-1).numpy()


# ---------------------------------------------------------------- the backend


def forward(x: Tensor, y: Tensor | None, h0: Tensor, reverse: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """See `operators.scan`."""
    dtype = h0.dtype
    h = x.new_empty((*x.shape[:3], x.shape[-1]), dtype=dtype)
    last = torch.empty_like(h0)
    results = (h.view(-1).numpy(), _flat(h0, dtype), last.view(-1).numpy())
    if y is None:
        _run(_mingru_forward, h, reverse, (_flat(x, dtype), *results))
    else:
        _run(_linear_forward, h, reverse, (_flat(x, dtype), _flat(y, dtype), *results))
    return h.to(x.dtype), last


def backward(
    x: Tensor, y: Tensor | None, h: Tensor, h0: Tensor, dh: Tensor, dlast: Tensor, reverse: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `operators.scan_backward`."""
    dtype = h0.dtype
    dx = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    dy = None if y is None else torch.empty_like(dx)
    dh0 = torch.empty_like(h0)
    given = [_flat(value, dtype) for value in (x, h, h0, dh, dlast)]
    if dy is None:
        results = [value.view(-1).numpy() for value in (dx, dh0)]
        _run(_mingru_backward, h, reverse, (*given, *results))
    else:
        results = [value.view(-1).numpy() for value in (dx, dy, dh0)]
        _run(_linear_backward, h, reverse, (*given, *results))
    return dx.to(x.dtype), None if dy is None else dy.to(x.dtype), dh0
