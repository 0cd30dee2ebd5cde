"""The fused scan for CUDA, in Triton (spec 2.6). A program owns 64 channels of one sequence and walks along it.

Where batch and channels alone fill the GPU, one program walks a whole sequence: every number is read and written once.
Else sequences are cut into chunks: (1) each chunk's aggregate (product of a, end state from zero), (2) the state is
carried from chunk to chunk, (3) each chunk is walked again from the state that it inherits.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 64
_SHORTEST_CHUNK = 32
_WARPS_PER_SM = 4
"""With so many one-warp programs on every multiprocessor, chunks would only read everything twice."""


@triton.jit
def _gates(x, y, where, mask, FUSED: tl.constexpr, STATE: tl.constexpr):  # type: ignore[no-untyped-def]
    """a and b of a step: as they are, or from a minGRU's candidate p (x) and gate q (y)."""
    first = tl.load(x + where, mask=mask, other=0.0).to(STATE)
    second = tl.load(y + where, mask=mask, other=0.0).to(STATE)
    if FUSED:
        a = 1.0 / (1.0 + tl.exp(second))
        z = 1.0 / (1.0 + tl.exp(-second))
        second = z * tl.where(first >= 0, first + 0.5, 1.0 / (1.0 + tl.exp(-first)))
        first = a
    return first, second


@triton.jit
def _forward_aggregates(  # type: ignore[no-untyped-def]
    x, y, decays, ends, sn, sl, sg, length, groups, channels, chunk, chunks, reverse_mask,
    FUSED: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence, k = tl.program_id(0), tl.program_id(1)
    n, g = sequence // groups, sequence % groups
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = c < channels
    backwards = (reverse_mask >> g) & 1
    base = n.to(tl.int64) * sn + g * sg
    decay = tl.full((BLOCK,), 1.0, STATE)
    state = tl.zeros((BLOCK,), STATE)
    for i in range(k * chunk, tl.minimum((k + 1) * chunk, length)):
        t = tl.where(backwards == 1, length - 1 - i, i)
        a, b = _gates(x, y, base + t.to(tl.int64) * sl + c, mask, FUSED, STATE)
        state = a * state + b
        decay = a * decay
    at = (sequence.to(tl.int64) * chunks + k) * channels + c
    tl.store(decays + at, decay, mask=mask)
    tl.store(ends + at, state, mask=mask)


@triton.jit
def _carry(decays, ends, start, inherited, channels, chunks, STATE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    sequence = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < channels
    state = tl.load(start + sequence * channels + c, mask=mask, other=0.0).to(STATE)
    for k in range(chunks):
        at = (sequence * chunks + k) * channels + c
        tl.store(inherited + at, state, mask=mask)
        decay = tl.load(decays + at, mask=mask, other=0.0)
        state = decay * state + tl.load(ends + at, mask=mask, other=0.0)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x, y, inherited, h, last, sn, sl, sg, length, groups, channels, chunk, chunks, reverse_mask,
    FUSED: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence, k = tl.program_id(0), tl.program_id(1)
    n, g = sequence // groups, sequence % groups
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = c < channels
    backwards = (reverse_mask >> g) & 1
    base = n.to(tl.int64) * sn + g * sg
    state = tl.load(inherited + (sequence.to(tl.int64) * chunks + k) * channels + c, mask=mask, other=0.0)
    for i in range(k * chunk, tl.minimum((k + 1) * chunk, length)):
        t = tl.where(backwards == 1, length - 1 - i, i).to(tl.int64)
        a, b = _gates(x, y, base + t * sl + c, mask, FUSED, STATE)
        state = a * state + b
        tl.store(h + ((n.to(tl.int64) * length + t) * groups + g) * channels + c, state, mask=mask)
    if k == chunks - 1:
        tl.store(last + sequence.to(tl.int64) * channels + c, state, mask=mask)


@triton.jit
def _backward_aggregates(  # type: ignore[no-untyped-def]
    x, y, dh, decays, ends, sn, sl, sg, length, groups, channels, chunk, chunks, reverse_mask,
    FUSED: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence, k = tl.program_id(0), tl.program_id(1)
    n, g = sequence // groups, sequence % groups
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = c < channels
    backwards = (reverse_mask >> g) & 1
    base = n.to(tl.int64) * sn + g * sg
    decay = tl.full((BLOCK,), 1.0, STATE)
    carry = tl.zeros((BLOCK,), STATE)
    for i in range(k * chunk, tl.minimum((k + 1) * chunk, length)):
        t = tl.where(backwards == 1, i, length - 1 - i).to(tl.int64)
        a, _ = _gates(x, y, base + t * sl + c, mask, FUSED, STATE)
        row = ((n.to(tl.int64) * length + t) * groups + g) * channels + c
        carry = a * (tl.load(dh + row, mask=mask, other=0.0).to(STATE) + carry)
        decay = a * decay
    at = (sequence.to(tl.int64) * chunks + k) * channels + c
    tl.store(decays + at, decay, mask=mask)
    tl.store(ends + at, carry, mask=mask)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    x, y, h, h0, dh, inherited, dx, dy, dh0, sn, sl, sg, dn, dl, dg,
    length, groups, channels, chunk, chunks, reverse_mask,
    FUSED: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence, k = tl.program_id(0), tl.program_id(1)
    n, g = sequence // groups, sequence % groups
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = c < channels
    backwards = (reverse_mask >> g) & 1
    base, to = n.to(tl.int64) * sn + g * sg, n.to(tl.int64) * dn + g * dg
    at = sequence.to(tl.int64) * channels + c
    start = tl.load(h0 + at, mask=mask, other=0.0)
    carry = tl.load(inherited + (sequence.to(tl.int64) * chunks + k) * channels + c, mask=mask, other=0.0)
    step = tl.where(backwards == 1, groups, -groups).to(tl.int64) * channels  # to the element before, in scan order
    for i in range(k * chunk, tl.minimum((k + 1) * chunk, length)):
        t = tl.where(backwards == 1, i, length - 1 - i).to(tl.int64)
        where = base + t * sl + c
        row = ((n.to(tl.int64) * length + t) * groups + g) * channels + c
        inner = (c * 0 + i) < length - 1
        before = tl.load(h + row + step, mask=mask & inner, other=0.0).to(STATE)
        before = tl.where(inner, before, start)
        adjoint = tl.load(dh + row, mask=mask, other=0.0).to(STATE) + carry
        first = tl.load(x + where, mask=mask, other=0.0).to(STATE)
        if FUSED:
            q = tl.load(y + where, mask=mask, other=0.0).to(STATE)
            a, z = 1.0 / (1.0 + tl.exp(q)), 1.0 / (1.0 + tl.exp(-q))
            low = 1.0 / (1.0 + tl.exp(-first))
            g_p = tl.where(first >= 0, first + 0.5, low)
            slope = tl.where(first >= 0, 1.0, low * (1.0 - low))
            tl.store(dx + to + t * dl + c, adjoint * z * slope, mask=mask)
            tl.store(dy + to + t * dl + c, adjoint * (g_p - before) * z * a, mask=mask)
        else:
            a = first
            tl.store(dx + to + t * dl + c, adjoint * before, mask=mask)
            tl.store(dy + to + t * dl + c, adjoint, mask=mask)
        carry = a * adjoint
    if k == chunks - 1:
        tl.store(dh0 + at, carry, mask=mask)


def _chunks(h: Tensor) -> tuple[int, int]:
    """Length and number of the chunks."""
    batch, length, groups, channels = h.shape
    programs = batch * groups * triton.cdiv(channels, _BLOCK)
    processors = torch.cuda.get_device_properties(h.device).multi_processor_count if h.is_cuda else 1
    enough = _WARPS_PER_SM * processors
    if programs >= enough or length <= 2 * _SHORTEST_CHUNK:
        return length, 1
    chunk = max(_SHORTEST_CHUNK, triton.cdiv(length, triton.cdiv(2 * enough, programs)))
    return chunk, triton.cdiv(length, chunk)


def _parts(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """The two operands as views of equal strides with neighbouring channels."""
    if y is None:
        x = x if x.stride(-1) == 1 else x.contiguous()
        return x[:, :, :, 0], x[:, :, :, 1]
    return x.contiguous(), y.contiguous()


def _settings(h0: Tensor, fused: bool) -> dict[str, Any]:
    state = tl.float64 if h0.dtype == torch.float64 else tl.float32
    return {"FUSED": fused, "STATE": state, "BLOCK": _BLOCK, "num_warps": 1}


def forward(x: Tensor, y: Tensor | None, h0: Tensor, reverse: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """See `operators.scan`."""
    first, second = _parts(x, y)
    batch, length, groups, channels = first.shape
    h, last = x.new_empty(first.shape), torch.empty_like(h0)
    chunk, chunks = _chunks(h)
    sizes = (*first.stride()[:3], length, groups, channels, chunk, chunks, sum(b << g for g, b in enumerate(reverse)))
    blocks, options = triton.cdiv(channels, _BLOCK), _settings(h0, y is None)
    grid = (batch * groups, chunks, blocks)
    inherited = h0
    if chunks > 1:
        decays, ends, inherited = (h0.new_empty(batch * groups, chunks, channels) for _ in range(3))
        _forward_aggregates[grid](first, second, decays, ends, *sizes, **options)
        _carry[(batch * groups, blocks)](
            decays, ends, h0, inherited, channels, chunks, STATE=options["STATE"], BLOCK=_BLOCK, num_warps=1
        )
    _forward[grid](first, second, inherited, h, last, *sizes, **options)
    return h, last


def backward(
    x: Tensor, y: Tensor | None, h: Tensor, h0: Tensor, dh: Tensor, dlast: Tensor, reverse: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `operators.scan_backward`."""
    first, second = _parts(x, y)
    batch, length, groups, channels = first.shape
    h = h.contiguous()
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dy = None if y is None else torch.empty_like(dx)
    to_first, to_second = _parts(dx, dy)
    dh0 = torch.empty_like(h0)
    chunk, chunks = _chunks(h)
    sizes = (length, groups, channels, chunk, chunks, sum(b << g for g, b in enumerate(reverse)))
    blocks, options = triton.cdiv(channels, _BLOCK), _settings(h0, y is None)
    grid = (batch * groups, chunks, blocks)
    inherited = dlast
    if chunks > 1:
        decays, ends, inherited = (h0.new_empty(batch * groups, chunks, channels) for _ in range(3))
        _backward_aggregates[grid](first, second, dh, decays, ends, *first.stride()[:3], *sizes, **options)
        _carry[(batch * groups, blocks)](
            decays, ends, dlast, inherited, channels, chunks, STATE=options["STATE"], BLOCK=_BLOCK, num_warps=1
        )
    _backward[grid](
        first, second, h, h0, dh, inherited, to_first, to_second, dh0,
        *first.stride()[:3], *to_first.stride()[:3], *sizes, **options,
    )  # fmt: skip
    return dx, dy, dh0
