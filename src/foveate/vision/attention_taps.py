"""Attention taps: what the class token of a vision tower looks at, read off while the tower runs as it always does.

A tap keeps what a layer's `q_proj` and `k_proj` give anyway: the class token's query and all keys. One softmax row of
each head follows from them, so that attention stays on SDPA or flash and no N x N map is ever made (HiRED spec 2.2).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.vision.towers import VisionTower


@dataclass(frozen=True)
class AttentionTap:
    """The class token's query and all keys of one layer, for B pictures (or pieces of them) of N patches.

    Attributes:
        query: (B, H * d) of the class token, before it is scaled.
        keys: (B, 1 + N, H * d), the class token's first.
        num_heads: H.
        scale: factor of the layer's q.k, 1 / sqrt(d).
    """

    query: Tensor
    keys: Tensor
    num_heads: int
    scale: float

    def __getitem__(self, rows: slice) -> AttentionTap:
        """The tap of some of the pictures."""
        return AttentionTap(self.query[rows], self.keys[rows], self.num_heads, self.scale)

    def rows(self) -> Tensor:
        """(B, H, N) float32: how much the class token attends to each patch.

        The softmax is over all 1 + N keys; the class token's own column is left out after it, so a row adds up to less
        than 1.
        """
        query = self.query.unflatten(-1, (self.num_heads, -1))
        keys = self.keys.unflatten(-1, (self.num_heads, -1))
        scores = torch.einsum("bhd,bnhd->bhn", query, keys).float() * self.scale
        return scores.softmax(dim=-1)[..., 1:]

    def head_sum(self) -> Tensor:
        """(B, N) float32: `rows` summed over the heads."""
        return self.rows().sum(dim=1)

    def full_width_row(self) -> Tensor:
        """(B, N) float32: one softmax of q.k / sqrt(H * d) for all heads together, as PruMerge has it (spec 4.4)."""
        scores = torch.einsum("bc,bnc->bn", self.query, self.keys).float() / self.query.shape[-1] ** 0.5
        return scores.softmax(dim=-1)[..., 1:]

    @property
    def patch_keys(self) -> Tensor:
        """(B, N, H * d); a view."""
        return self.keys[:, 1:]


@contextmanager
def tap_attention(tower: VisionTower, layers: Sequence[int]) -> Iterator[dict[int, AttentionTap]]:
    """Taps layers of a tower while it runs in the body of the `with`.

    Nothing stays on the tower: hooks go when the body ends, also by an exception, and several threads may tap one tower
    at the same time, each its own calls.

    Args:
        tower: with a class token.
        layers: indices of blocks, 0 the first; none for nothing to tap.

    Yields:
        layer -> tap, filled while the tower runs; a later call of the tower takes the place of an earlier one.

    Raises:
        InputError: a tower without class token, a layer that does not exist, or one that did not run in the body.
    """
    taps: dict[int, AttentionTap] = {}
    if not layers:
        yield taps
        return
    if not tower.has_cls:
        raise InputError(
            f"{type(tower.model).__name__} has no class token, so there is no row of attention to read; use a strategy "
            "that needs none (random, spatial), or a CLIP tower."
        )
    modules = {layer: _attention(tower, layer) for layer in dict.fromkeys(layers)}
    owner = threading.get_ident()
    parts: dict[tuple[int, str], Tensor] = {}
    handles = []

    def listen(layer: int, module: Any) -> None:
        heads = int(module.num_heads if hasattr(module, "num_heads") else module.num_attention_heads)

        def keep(part: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
                if threading.get_ident() != owner:
                    return
                # A copy of the one row, lest the queries of all patches stay in memory.
                parts[layer, part] = output[:, 0].clone() if part == "query" else output
                if (layer, "query") in parts and (layer, "keys") in parts:
                    query = parts.pop((layer, "query"))
                    taps[layer] = AttentionTap(
                        query, parts.pop((layer, "keys")), heads, (query.shape[-1] // heads) ** -0.5
                    )

            return hook

        handles.append(module.q_proj.register_forward_hook(keep("query")))
        handles.append(module.k_proj.register_forward_hook(keep("keys")))

    try:
        for layer, module in modules.items():
            listen(layer, module)
        yield taps
    finally:
        for handle in handles:
            handle.remove()
    missing = [layer for layer in modules if layer not in taps]
    if missing:
        raise InputError(
            f"the tower did not run layer {missing[0]} while it was tapped; ask it for a deeper layer, or tap another."
        )


def _attention(tower: VisionTower, layer: int) -> Any:
    """The attention module of a block: the one with separate projections of queries and keys."""
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < tower.num_layers:
        raise InputError(f"there is no layer {layer!r} to tap; the tower has layers 0 to {tower.num_layers - 1}.")
    for module in tower.blocks[layer].modules():
        if hasattr(module, "q_proj") and hasattr(module, "k_proj"):
            return module
    raise InputError(f"{type(tower.model).__name__} does not project queries and keys apart, so it cannot be tapped.")
