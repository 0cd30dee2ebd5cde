"""DivPrune: tokens that are as far from each other as can be, by what the language model would read (spec 4.4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .base import PictureTokens, Selection, Strategy


def farthest_tokens(features: Tensor, count: int) -> Tensor:
    """Numbers of `count` tokens, chosen one by one: first that whose nearest neighbour is farthest, then always that
    which is farthest from those chosen so far. The distance is 1 - cosine.

    Args:
        features: (n, C).
        count: 1 to n.

    Returns:
        (count,), in the order of choice.
    """
    unit = normalize(features.float(), dim=-1)
    distance = 1 - unit @ unit.T
    # No token is its own neighbour; where there is but one, it is chosen.
    nearest = distance.clone().fill_diagonal_(torch.inf).amin(dim=1)
    chosen = torch.empty(count, dtype=torch.long, device=features.device)
    chosen[0] = nearest.argmax()
    gap = distance[chosen[0]].clone()
    taken = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    for place in range(1, count):
        taken[chosen[place - 1]] = True
        chosen[place] = gap.masked_fill(taken, -torch.inf).argmax()
        gap = torch.minimum(gap, distance[chosen[place]])
    return chosen


class DivPrune(Strategy):
    """DivPrune over all partitions together; padding is never chosen."""

    def select(self, picture: PictureTokens) -> Selection:
        layout = picture.layout
        numbers = picture.ordered()
        features = picture.features.flatten(0, 1)[numbers]
        if picture.project is not None:
            features = picture.project(features)
        keep = torch.zeros(layout.candidates, dtype=torch.bool, device=picture.device)
        keep[numbers[farthest_tokens(features, min(self.budget_tokens(layout), len(numbers)))]] = True
        return Selection(keep.view(layout.count, -1))
