"""Strategies of the second kind: they drop visual tokens between layers of the language model (spec 2.8, 4.4).

Tokens are scored by the attention that some rows of the text, the raters, pay to them in one layer. Of the queries only
these rows are read, so that no N x N map is made. What is dropped is gone for the layers that follow, with its keys
and values; what is kept keeps its position.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..configuration import check_budget


@dataclass(frozen=True)
class LanguageTokens:
    """What a strategy sees of one text after a layer: n tokens, C channels, without padding.

    Attributes:
        layer: which layer has run, 0 the first.
        num_layers: layers of the language model.
        states: (n, C) what the layer gives.
        visual: (n,) bool.
        scores: (n,) float32, what `LanguageStrategy.score` gave.
        total: visual tokens before any was dropped.
        budget: T, how many may stay.
    """

    layer: int
    num_layers: int
    states: Tensor
    visual: Tensor
    scores: Tensor
    total: int
    budget: int


@dataclass(frozen=True)
class LanguageSelection:
    """What stays of the visual tokens of one text.

    Attributes:
        keep: (n,) bool; text stays whatever it says.
        merged: (e, C) tokens that are put behind the last visual token; None for none.
        places: (e,) of the n tokens, those whose positions the merged ones take.
    """

    keep: Tensor
    merged: Tensor | None = None
    places: Tensor | None = None


def attention_rows(query: Tensor, keys: Tensor, visible: Tensor, scale: float) -> Tensor:
    """(R, H, n) float32: how much rows of the text attend to each token, in each head.

    Args:
        query: (R, H, d), rotated to their positions.
        keys: (G, n, d), rotated; H is a multiple of the G groups.
        visible: (R, n) bool: what each row may attend to.
        scale: factor of q.k.
    """
    grouped = query.unflatten(1, (len(keys), -1))
    scores = torch.einsum("rgmd,gnd->rgmn", grouped, keys).float() * scale
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    return scores.softmax(dim=-1).flatten(1, 2)


class LanguageStrategy(ABC):
    """A way to choose visual tokens inside the language model. One object serves any number of texts and threads.

    Args:
        budget: share of the visual tokens that is kept, above 0 and at most 1.

    Raises:
        InputError: a value out of range.
    """

    def __init__(self, budget: float) -> None:
        self.budget = check_budget(budget)

    @property
    def off(self) -> bool:
        """Whether nothing is dropped, so that the host runs as if there were no strategy."""
        return self.budget >= 1

    @abstractmethod
    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers after which tokens are dropped, ascending.

        Raises:
            InputError: the language model has too few.
        """

    def raters(self, embeds: Tensor, visual: Tensor) -> Tensor:
        """(r,) places of the text whose attention says what matters; here the last token of the prompt.

        Args:
            embeds: (n, C) what the language model reads.
            visual: (n,) bool.
        """
        return torch.tensor([len(visual) - 1], device=visual.device)

    def score(self, layer: int, query: Tensor, keys: Tensor, visible: Tensor, scale: float) -> Tensor:
        """(n,) float32, the higher the more worth keeping; here the mean of the raters' attention over the heads.

        Args:
            layer: in which this is attention.
            query, keys, visible, scale: as `attention_rows` takes them.
        """
        return attention_rows(query, keys, visible, scale).mean(dim=(0, 1))

    @abstractmethod
    def select(self, tokens: LanguageTokens) -> LanguageSelection:
        """Which visual tokens of a text stay after a layer."""

    def describe(self) -> dict[str, Any]:
        """The options by name, as JSON takes them."""
        return {"strategy": type(self).__name__, **vars(self)}


def keep_best(tokens: LanguageTokens, count: int) -> Tensor:
    """(n,) bool: the `count` visual tokens with the highest scores."""
    scores = tokens.scores.masked_fill(~tokens.visual, -torch.inf)
    best = scores.topk(min(count, int(tokens.visual.sum()))).indices
    return torch.zeros_like(tokens.visual).index_fill(0, best, True)
