"""PruMerge and PruMerge+: outliers of the class row stay, and the others are merged into them (spec 4.4).

The row and the keys are those of the tower's last layer, the features those that the host uses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.errors import InputError

from ..configuration import check_choice
from .base import PictureTokens, Selection, Strategy, TowerFacts

NEIGHBOURS = 32
"""Tokens that are merged into a kept one."""


def outlier_ratio(row: Tensor) -> float:
    """Share of the tokens whose attention (N,) lies above the third quartile by 1.5 interquartile ranges."""
    low, high = torch.quantile(row.float(), torch.tensor([0.25, 0.75], device=row.device)).tolist()
    return float((row > high + 1.5 * (high - low)).float().mean(dtype=torch.float64))


def outliers(row: Tensor, *, plus: bool = False) -> Tensor:
    """Numbers of the tokens that the official code keeps: as many as there are outliers, the highest first; with `plus`
    also evenly spaced others. At least one.

    Args:
        row: (N,) attention.
    """
    cells = len(row)
    # Without outliers, and with very many, the official code divides by zero.
    ratio = max(outlier_ratio(row), 1 / cells)
    kept = row.topk(max(1, int(cells * ratio))).indices
    if not plus:
        return kept
    spaced = torch.arange(0, cells - 1, max(1, int(1 / ratio) // 3), device=row.device)
    return torch.cat([kept, spaced[~torch.isin(spaced, kept)]])


def merge(features: Tensor, row: Tensor, keys: Tensor, kept: Tensor) -> Tensor:
    """(K + 1, C): each kept token with its nearest neighbours added, weighted by their attention; then one token of all
    that were not kept, weighted so too.

    Args:
        features: (N, C).
        row: (N,) attention.
        keys: (N, C'), of which the cosine says how near tokens are.
        kept: (K,) numbers.
    """
    keys = torch.nn.functional.normalize(keys.float(), dim=-1)
    near = keys[kept] @ keys.T
    near[torch.arange(len(kept), device=near.device), kept] = -torch.inf
    neighbours = near.topk(min(NEIGHBOURS, len(row) - 1), dim=1).indices
    weighted = row[:, None] * features.float()
    centres = features[kept].float() + weighted[neighbours].sum(dim=1)
    others = torch.ones(len(row), dtype=torch.bool, device=row.device)
    others[kept] = False
    return torch.cat([centres, weighted[others].sum(dim=0, keepdim=True)]).to(features.dtype)


class PruMerge(Strategy):
    """PruMerge, each partition by itself.

    Args:
        plus: PruMerge+, which keeps evenly spaced tokens besides the outliers.
        count: "budget": every partition gets its equal part of the budget, the token of what was not kept among it;
            "adaptive": as many tokens as there are outliers, whatever the budget, as the official code.
    """

    merges = True

    def __init__(self, budget: float, *, plus: bool = False, count: str = "budget", **options: Any) -> None:
        super().__init__(budget, **options)
        if not isinstance(plus, bool):
            raise InputError(f"plus must be true or false, not {plus!r}.")
        self.plus = plus
        self.count = check_choice(count, ("budget", "adaptive"), "count")
        self.same_count = count == "budget"

    def layers(self, tower: TowerFacts) -> tuple[int, ...]:
        return (tower.num_layers - 1,)

    def select(self, picture: PictureTokens) -> Selection:
        tap = picture.taps[picture.tower.num_layers - 1]
        rows, keys = tap.full_width_row(), tap.patch_keys
        each, more = divmod(self.budget_tokens(picture.layout), picture.layout.count)
        keep = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
        if self.count == "budget" and each < 2:
            raise InputError(
                f"a budget of {self.budget} leaves {each} tokens to each partition of {picture.layout.cells}, and "
                "PruMerge needs at least 2; give a larger one."
            )
        merged = []
        for number, row in enumerate(rows):
            if self.count == "adaptive":
                kept = outliers(row, plus=self.plus)
            else:
                kept = self._within(row, each + (number < more) - 1)
            keep[number, kept] = True
            merged.append(merge(picture.features[number], row, keys[number], kept))
        return Selection(keep, torch.cat(merged))

    def _within(self, row: Tensor, count: int) -> Tensor:
        """Numbers of `count` tokens: the highest; with `plus` the outliers among them, then evenly spaced others."""
        if not self.plus:
            return row.topk(count).indices
        kept = outliers(row)[:count]
        others = torch.ones(len(row), dtype=torch.bool, device=row.device)
        others[kept] = False
        free = others.nonzero()[:, 0]
        missing = count - len(kept)
        spaced = (torch.arange(missing, device=row.device) * 2 + 1) * len(free) // max(1, 2 * missing)
        return torch.cat([kept, free[spaced]])
