"""VisionZip: the tokens that the class token looks at stay, and the others are merged around evenly spaced centres
(spec 4.4)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.errors import InputError

from ..partitions import Partitions
from .base import PictureTokens, Selection, Strategy, TowerFacts

CONTEXTUAL = 10 / 64
"""Contextual tokens of a budget: 30 of 192, 20 of 128, 10 of 64."""


def split_budget(tokens: int) -> tuple[int, int]:
    """How many dominant tokens, the class token among them, and how many contextual ones; none of these for 1 token."""
    contextual = min(max(1, round(tokens * CONTEXTUAL)), tokens - 1)
    return tokens - contextual, contextual


def contextual_tokens(features: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Evenly spaced tokens, to each of which the mean of those is added that are most similar to it.

    Args:
        features: (n, C) tokens that are not dominant, in raster order.
        keys: (n, d) keys, the mean of the heads; their cosine is the similarity.
        count: at most n.

    Returns:
        (count,) numbers of the centres among the n, and (count, C).
    """
    if count == 0:
        return torch.empty(0, dtype=torch.long, device=features.device), features[:0]
    centres = torch.arange(count, device=features.device) * (len(features) // count)
    others = torch.ones(len(features), dtype=torch.bool, device=features.device)
    others[centres] = False
    unit = normalize(keys.float(), dim=-1)
    nearest = (unit[others] @ unit[centres].T).argmax(dim=1)
    members = torch.zeros(count, features.shape[1], device=features.device)
    members.index_add_(0, nearest, features[others].float())
    sizes = torch.bincount(nearest, minlength=count).clamp(min=1)
    return centres, (features[centres].float() + members / sizes[:, None]).to(features.dtype)


class VisionZip(Strategy):
    """VisionZip, each partition by itself with an equal part of the budget.

    The language model reads the full picture's class token, dominant and contextual tokens; then the sub-images'
    dominant tokens as the mosaic has them, their class tokens, their contextual tokens. Padding is not cut off, and
    there are no newlines. Where the host has no class token to give (an MG-LLaVA fuses patches only), another dominant
    token takes its place.
    """

    merges = True

    def layers(self, tower: TowerFacts) -> tuple[int, ...]:
        return (tower.feature_layer,)

    def select(self, picture: PictureTokens) -> Selection:
        layout = picture.layout
        tap = picture.taps[picture.tower.feature_layer]
        rows = tap.head_sum()
        keys = tap.patch_keys.unflatten(-1, (tap.num_heads, -1)).mean(dim=2)
        each, more = divmod(self.budget_tokens(layout), layout.count)
        if each < 1:
            raise InputError(
                f"a budget of {self.budget} is less than a token for each of the {layout.count} partitions of "
                f"{layout.cells}; give a larger one."
            )
        dominant = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
        keep = dominant.clone()
        contextual = []
        for number, row in enumerate(rows):
            first, last = split_budget(each + (number < more))
            chosen = first if picture.class_features is None else first - 1
            dominant[number, row.topk(chosen).indices] = True
            rest = (~dominant[number]).nonzero()[:, 0]
            centres, merged = contextual_tokens(
                picture.features[number, rest], keys[number, rest], min(last, len(rest))
            )
            keep[number, rest[centres]] = True
            contextual.append(merged)
        keep |= dominant
        order = _whole_mosaic(layout).sequence(dominant)[0].to(rows.device)
        base, subs = (order[order < layout.cells], order[order >= layout.cells])
        tokens = picture.features.flatten(0, 1)
        none = tokens[:0]
        classes = none if picture.class_features is None else picture.class_features
        return Selection(
            keep,
            torch.cat([classes[:1], tokens[base], contextual[0], tokens[subs], classes[1:], *contextual[1:]]),
        )


def _whole_mosaic(layout: Partitions) -> Partitions:
    """The layout of a picture that needs no padding."""
    return dataclasses.replace(layout, size=layout.grid) if layout.count > 1 else layout
