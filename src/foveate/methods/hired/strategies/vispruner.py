"""VisPruner: half of the tokens by the class token's attention, the rest by being unlike each other (spec 4.4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..allocation import allocate_exactly
from ..configuration import check_share
from .base import PictureTokens, Selection, Strategy, TowerFacts

REMOVED_AT_ONCE = 8


def diverse_tokens(features: Tensor, count: int) -> Tensor:
    """Numbers of `count` tokens that are left when, again and again, those of the even places that are most similar to
    one of the odd places are removed.

    Args:
        features: (n, C), the most important first.
        count: at most n.

    Returns:
        (count,), ascending.
    """
    unit = normalize(features.float(), dim=-1)
    similarity = unit @ unit.T
    left = torch.arange(len(features), device=features.device)
    if count == 0:
        return left[:0]
    while len(left) > count:
        even, odd = left[::2], left[1::2]
        closest = similarity[even[:, None], odd].amax(dim=1)
        removed = closest.topk(min(REMOVED_AT_ONCE, len(left) - count, len(even))).indices * 2
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[removed] = False
        left = left[stays]
    return left


class VisPruner(Strategy):
    """VisPruner, each partition by itself with an equal part of the budget; padding is never chosen.

    The published form keeps all newline tokens, beside the budget: `newline="all"`.

    Args:
        important: share of the budget that is chosen by attention.
    """

    def __init__(self, budget: float, *, important: float = 0.5, **options: Any) -> None:
        super().__init__(budget, **options)
        self.important = check_share(important, "important")

    def layers(self, tower: TowerFacts) -> tuple[int, ...]:
        return (tower.feature_layer,)

    def select(self, picture: PictureTokens) -> Selection:
        layout = picture.layout
        rows = picture.taps[picture.tower.feature_layer].head_sum()
        valid = layout.valid.to(rows.device)
        counts = allocate_exactly(
            [1.0] * (layout.count - 1), self.budget_tokens(layout), 1 / layout.count, layout.valid.sum(dim=1).tolist()
        )
        keep = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
        for number, count in enumerate(counts):
            cells = valid[number].nonzero()[:, 0]
            cells = cells[rows[number, cells].argsort(descending=True, stable=True)]
            first = int(count * self.important)
            rest = cells[first:]
            keep[number, cells[:first]] = True
            keep[number, rest[diverse_tokens(picture.features[number, rest], count - first)]] = True
        return Selection(keep)
