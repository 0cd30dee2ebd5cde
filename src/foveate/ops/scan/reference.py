"""Scans to compare with, in plain differentiable operators: a float64 loop, and minGRU's original log-space form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def candidate(p: Tensor) -> Tensor:
    """g(p) = p + 0.5 for p >= 0, else sigmoid(p): positive, continuous at 0 (arXiv 2410.01201, appendix B)."""
    return torch.where(p >= 0, p + 0.5, torch.sigmoid(p))


def linear_sequential(a: Tensor, b: Tensor, h0: Tensor | None, dim: int, reverse: bool) -> Tensor:
    """h_t = a_t h_{t-1} + b_t along `dim`, one element after the other in float64; the dtype of b comes back."""
    state = torch.zeros_like(b.select(dim, 0), dtype=torch.float64) if h0 is None and b.shape[dim] else h0
    steps = range(b.shape[dim] - 1, -1, -1) if reverse else range(b.shape[dim])
    found: list[Tensor] = []
    for t in steps:
        assert state is not None
        state = a.select(dim, t).double() * state.double() + b.select(dim, t).double()
        found.append(state)
    if not found:
        return torch.zeros_like(b)
    return torch.stack(found[::-1] if reverse else found, dim).to(b.dtype)


def mingru_sequential(p: Tensor, q: Tensor, h0: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """p, q (N, L, C), h0 (N, C) -> h (N, L, C) in their dtype and the last state (N, C) in float64."""
    wide_p, wide_q = p.double(), q.double()
    a, b = torch.sigmoid(-wide_q), torch.sigmoid(wide_q) * candidate(wide_p)
    start = torch.zeros_like(wide_p[:, 0]) if h0 is None and p.shape[1] else h0
    if start is None:
        start = wide_p.new_zeros(p.shape[0], p.shape[2])
    h = linear_sequential(a, b, start, 1, reverse)
    last = h[:, 0 if reverse else -1] if p.shape[1] else start.double()
    return h.to(p.dtype), last


def mingru_logspace(p: Tensor, q: Tensor, h0: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """The original evaluation: h = exp(A* + logcumsumexp(log z + log g - A*)), A* = cumsum(log(1 - z)).

    Shapes as in `mingru_sequential`; computed in the dtype of p. h0 must be positive: its logarithm is taken.
    """
    if reverse:
        p, q = p.flip(1), q.flip(1)
    log_keep = -F.softplus(q)
    log_g = torch.where(p >= 0, (F.relu(p) + 0.5).log(), -F.softplus(-p))
    log_new = -F.softplus(-q) + log_g
    if h0 is not None:
        log_new = torch.cat([h0[:, None].to(p.dtype).log(), log_new], 1)
        log_keep = F.pad(log_keep, (0, 0, 1, 0))
    decay = log_keep.cumsum(1)
    h = torch.exp(decay + (log_new - decay).logcumsumexp(1))
    if h0 is not None:
        last, h = h[:, -1], h[:, 1:]
    else:
        last = h[:, -1] if p.shape[1] else p.new_zeros(p.shape[0], p.shape[2])
    last = last.to(torch.promote_types(last.dtype, torch.float32))
    return (h.flip(1) if reverse else h), last
