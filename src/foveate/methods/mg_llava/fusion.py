"""Two resolutions into one row of image tokens: Conv-Gate fusion (spec 2.3) and the ablations' alternatives (2.6).

Shapes: B pictures, N = g * g tokens, l and h channels of the low- and high-resolution features.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class ConvRefinement(nn.Module):
    """Refines the low-resolution tokens with a residual, and brings the high-resolution map to their width."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.slow_conv = nn.Conv2d(high, high, 1)
        self.slow_proj = nn.Conv2d(high, low, 1)
        self.fast_conv = nn.Conv2d(low, low, 7, padding=3, groups=low)
        self.fast_proj = nn.Conv2d(low, low, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero projections: a fresh module leaves the low-resolution tokens exactly as they are."""
        for conv in (self.slow_conv, self.fast_conv):
            nn.init.xavier_uniform_(conv.weight)
        for projection in (self.slow_proj, self.fast_proj):
            nn.init.zeros_(projection.weight)
        for conv in (self.slow_conv, self.fast_conv, self.slow_proj, self.fast_proj):
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def refine(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, l) tokens and (B, h, g, g) map -> L' and H', both (B, N, l)."""
        grid = rearrange(low, "b (y x) c -> b c y x", y=high.shape[-2])
        refined = grid + self.fast_proj(F.gelu(self.fast_conv(grid)))
        projected = self.slow_proj(F.gelu(self.slow_conv(high)))
        return rearrange(refined, "b c y x -> b (y x) c"), rearrange(projected, "b c y x -> b (y x) c")


class ConvConcat(ConvRefinement):
    """L' and H' side by side: (B, N, 2l)."""

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return torch.cat(self.refine(low, high), dim=-1)


class TokenConcat(ConvRefinement):
    """L' and H' one after the other: (B, 2N, l). What the resampler looks at."""

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return torch.cat(self.refine(low, high), dim=1)


class ConvGate(ConvRefinement):
    """F = L' + tanh(a) H', with one scalar a for a picture (spec 2.3); the released fusion."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__(low, high)
        self.gate = nn.Sequential(nn.Linear(2 * low, low // 2), nn.GELU(), nn.Linear(low // 2, 1))

    def gate_logit(self, refined: Tensor, projected: Tensor) -> Tensor:
        """(B, 1), a, of the mean token of L' and H'."""
        return self.gate(torch.cat([refined, projected], dim=-1).mean(dim=1))

    def gated(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L' (B, N, l), tanh(a) H' (B, N, l) and a (B, 1)."""
        refined, projected = self.refine(low, high)
        logit = self.gate_logit(refined, projected)
        return refined, torch.tanh(logit)[:, :, None] * projected, logit

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Fused tokens (B, N, l) and a (B, 1)."""
        refined, gated, logit = self.gated(low, high)
        return refined + gated, logit


class GateConcat(ConvGate):
    """L' and tanh(a) H' side by side: (B, N, 2l), and a (B, 1)."""

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        refined, gated, logit = self.gated(low, high)
        return torch.cat([refined, gated], dim=-1), logit


class ChannelConcat(nn.Module):
    """The features as they are side by side: (B, N, l + h), without parameters."""

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return torch.cat([low, rearrange(high, "b c y x -> b (y x) c")], dim=-1)


class CrossAttention(nn.Module):
    """query + softmax(q k^T / sqrt(w)) v, single-headed, without an output projection; LayerNorm and Linear before
    each of q, k and v, all of the query's width w."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.key = nn.Sequential(nn.LayerNorm(context), nn.Linear(context, width))
        self.value = nn.Sequential(nn.LayerNorm(context), nn.Linear(context, width))

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """(..., Q, w) queries and (..., M, c) context, real where `mask` (..., M) is True -> (..., Q, w)."""
        context = context.to(queries.dtype)
        allowed = None if mask is None else mask[..., None, :]
        attended = F.scaled_dot_product_attention(
            self.query(queries), self.key(context), self.value(context), attn_mask=allowed
        )
        return queries + attended


class PatchInfoMining(CrossAttention):
    """Each token looks at the high-resolution cells of its own patch (Mini-Gemini; spec 2.6)."""

    def forward(self, low: Tensor, high: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(B, N, l) tokens and (B, c, g * p, g * p) map -> (B, N, l), with p * p cells for a token."""
        grid = math.isqrt(low.shape[1])
        patches = rearrange(high, "b c (y p) (x q) -> b (y x) (p q) c", y=grid, x=grid)
        return super().forward(low[:, :, None], patches)[:, :, 0]


class Resampler(nn.Module):
    """Learned queries attend to the tokens of both resolutions (Qwen-VL; spec 2.6). Replaces the image projector.

    Args:
        low: channels of the tokens.
        width: C, of the language model.
        grid: g; there are g * g queries.
        heads: of the attention.
    """

    def __init__(self, low: int, width: int, grid: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(grid * grid, width))
        self.kv_proj = nn.Linear(low, width, bias=False)
        self.ln_kv = nn.LayerNorm(width, eps=1e-6)
        self.ln_q = nn.LayerNorm(width, eps=1e-6)
        self.ln_post = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.proj = nn.Parameter(torch.empty(width, width))
        self.grid = grid
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.normal_(self.proj, std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, 2N, l) -> (B, N, C)."""
        values = self.ln_kv(self.kv_proj(tokens))
        positions = position_table(self.grid, values.shape[-1]).to(values)
        keys = values + positions.repeat(values.shape[1] // len(positions), 1)
        queries = (self.ln_q(self.query) + positions).expand(len(tokens), -1, -1)
        attended, _ = self.attn(queries, keys, values, need_weights=False)
        return self.ln_post(attended) @ self.proj


def position_table(grid: int, width: int) -> Tensor:
    """(grid * grid, width) of sines and cosines: the first half of the channels of x, the second of y (spec 2.6)."""
    quarter = width // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width / 2)
    table = torch.cat([axis[None].expand(grid, -1, -1), axis[:, None].expand(-1, grid, -1)], dim=-1)
    return table.flatten(0, 1).float()
