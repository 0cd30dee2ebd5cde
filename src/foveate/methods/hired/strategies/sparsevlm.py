"""SparseVLM: words that the picture answers to rate its tokens, in three steps; what is dropped is partly recycled as
means of clusters (spec 4.4).

The spec gives the numbers of tokens for three budgets of 576, in 32 layers. Other budgets lie on straight lines between
these, other depths in proportion. "At layers 2, 6, 15" is read as after so many layers, and the share that is recycled
as one of the dropped tokens: so the mean over the layers comes to 192.0, 128.6 and 64.8 tokens.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from foveate.errors import InputError

from .language import LanguageSelection, LanguageStrategy, LanguageTokens, keep_best

_STEPS = (2, 6, 15)
_DEPTH = 32
_CELLS = 576
_KEPT = ((0, (0, 0, 0)), (64, (66, 30, 17)), (128, (303, 110, 36)), (192, (300, 200, 110)), (576, (576, 576, 576)))
_RECYCLED = 0.3
_PER_CLUSTER = 10
_NEIGHBOURS = 5


def kept_in_steps(budget: int, total: int) -> tuple[int, ...]:
    """How many visual tokens stay after each step, at least 1, for a mean of about `budget` of `total` over the layers.

    Args:
        budget: at most `total`.
    """
    wanted = budget * _CELLS / total
    for (low, fewer), (high, more) in pairwise(_KEPT):
        if wanted <= high:
            part = (wanted - low) / (high - low)
            kept = (a + part * (b - a) for a, b in zip(fewer, more, strict=True))
            return tuple(min(total, max(1, round(share * total / _CELLS))) for share in kept)
    return (total,) * len(_STEPS)


def density_peaks(points: Tensor, count: int) -> Tensor:
    """(count,) numbers of points that have many others near and are far from any with more near (DPC-KNN).

    The density is exp(-mean squared distance to the 5 nearest others), distances are divided by sqrt(C).

    Args:
        points: (m, C).
        count: 1 to m.
    """
    distance = torch.cdist(points.float(), points.float()) / points.shape[1] ** 0.5
    others = min(_NEIGHBOURS, len(points) - 1)
    nearest = distance.topk(others + 1, largest=False).values[:, 1:] if others else distance
    density = (-nearest.square().mean(dim=1)).exp()
    # The earlier of two equally dense points counts as denser, lest neither be far from the other.
    number = torch.arange(len(points), device=points.device)
    same = (density[None] == density[:, None]) & (number[None] < number[:, None])
    denser = (density[None] > density[:, None]) | same
    gap = distance.masked_fill(~denser, torch.inf).amin(dim=1)
    gap = torch.where(denser.any(dim=1), gap, distance.amax())
    return (density * gap).topk(count).indices


class SparseVLM(LanguageStrategy):
    """SparseVLM.

    Args:
        budget: share of the visual tokens: of their mean number over the layers.
        recycle: put the means of clusters of dropped tokens behind the visual tokens; each has the position of its
            cluster's centre.
    """

    def __init__(self, budget: float, *, recycle: bool = True) -> None:
        super().__init__(budget)
        if not isinstance(recycle, bool):
            raise InputError(f"recycle must be true or false, not {recycle!r}.")
        self.recycle = recycle

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        if num_layers < len(_STEPS) + 1:
            raise InputError(
                f"SparseVLM drops tokens in {len(_STEPS)} steps, and this language model has {num_layers} layers; it "
                f"needs {len(_STEPS) + 1}."
            )
        layers: list[int] = []
        for number, step in enumerate(_STEPS):
            wanted = max(round(step * num_layers / _DEPTH) - 1, layers[-1] + 1 if layers else 0)
            # No later than leaves a layer for each step to come, and one behind the last.
            layers.append(min(wanted, num_layers - 1 - len(_STEPS) + number))
        return tuple(layers)

    def raters(self, embeds: Tensor, visual: Tensor) -> Tensor:
        """Words behind the first visual token which these, on average, are more like than the mean word is.

        What stands before the picture cannot look at it. Without such a word it is the last one.
        """
        first = int(visual.int().argmax())
        words = (~visual).nonzero()[:, 0]
        words = words[words > first]
        if not len(words):
            return super().raters(embeds, visual)
        alike = (embeds[visual].float() @ embeds[words].float().T).softmax(dim=1).mean(dim=0)
        chosen = words[alike > alike.mean()]
        return chosen if len(chosen) else super().raters(embeds, visual)

    def select(self, tokens: LanguageTokens) -> LanguageSelection:
        step = self.prune_layers(tokens.num_layers).index(tokens.layer)
        keep = keep_best(tokens, kept_in_steps(min(tokens.budget, tokens.total), tokens.total)[step])
        dropped = (tokens.visual & ~keep).nonzero()[:, 0]
        if not self.recycle or not len(dropped):
            return LanguageSelection(keep)
        some = min(int(_RECYCLED * len(dropped)) + 1, len(dropped))
        recycled = dropped[tokens.scores[dropped].topk(some).indices]
        states = tokens.states[recycled].float()
        centres = density_peaks(states, some // _PER_CLUSTER + 1)
        nearest = torch.cdist(states, states[centres]).argmin(dim=1)
        means = torch.zeros(len(centres), states.shape[1], device=states.device).index_add_(0, nearest, states)
        means /= torch.bincount(nearest, minlength=len(centres)).clamp(min=1)[:, None]
        return LanguageSelection(keep, means.to(tokens.states.dtype), recycled[centres])
