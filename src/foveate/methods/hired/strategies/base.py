"""What every strategy of dropping visual tokens has: what it sees of a picture, what it gives, and how it is asked.

A strategy works between vision tower and language model. It is told a budget in tokens, so that strategies can be
compared at equal numbers, and says which tokens stay (spec 2.8).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.errors import InputError
from foveate.vision.attention_taps import AttentionTap

from ..allocation import token_budget
from ..configuration import NEWLINES, POSITIONS, check_budget, check_choice
from ..partitions import Partitions


@dataclass(frozen=True)
class TowerFacts:
    """What a strategy may know of the vision tower before it runs.

    Attributes:
        num_layers: blocks of the tower, numbered from 0.
        feature_layer: the block whose output the features are.
        has_cls: whether the tower has a class token, without which no layer can be tapped.
    """

    num_layers: int
    feature_layer: int
    has_cls: bool


@dataclass(frozen=True)
class PictureTokens:
    """What a strategy sees of one picture: P partitions of N tokens, C channels.

    Attributes:
        features: (P, N, C) before the projector, without class tokens.
        tower: the vision tower they come from.
        layout: grid and padding of the partitions; `layout.valid` (P, N) says which cells are not padding.
        taps: layer -> tap of the P partitions, of the layers that the strategy asked for.
        class_features: (P, C) class tokens of the layer that the features are of; None without one.
        project: the host's projector, (..., C) -> (..., width of the language model), for strategies that look at what
            the language model sees.
    """

    features: Tensor
    tower: TowerFacts
    layout: Partitions
    taps: Mapping[int, AttentionTap] = field(default_factory=dict)
    class_features: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self.features.device

    def ordered(self) -> Tensor:
        """(n,) numbers among the P * N of the cells that are not padding, as the language model reads them."""
        numbers, _ = self.layout.sequence(self.layout.valid)
        return numbers.to(self.device)


@dataclass(frozen=True)
class Selection:
    """What stays of one picture.

    Attributes:
        keep: (P, N) bool: tokens that stay. They reach the language model as `Partitions.sequence` orders them; those
            in padding do not.
        features: (n, C) before the projector, in the order in which they reach the language model, of strategies that
            merge tokens; None where those of `keep` go as they are.
    """

    keep: Tensor
    features: Tensor | None = None


class Strategy(ABC):
    """A way to choose visual tokens. One object serves any number of pictures and threads: `select` changes nothing.

    Args:
        budget: share of the tokens that is kept, above 0 and at most 1.
        newline: which of the host's newline tokens stay (spec 2.6).
        positions: position ids of what is kept (spec 2.6).

    Attributes:
        budget, newline, positions: as given.
        merges: whether `select` gives features of its own, which have no place in the original sequence.
        same_count: whether every picture of one layout keeps the same number of tokens.

    Raises:
        InputError: a value out of range.
    """

    merges = False
    same_count = True
    grid_swapped = False
    unpad_rounding = "current"

    def __init__(self, budget: float, *, newline: str = "none", positions: str = "contiguous") -> None:
        self.budget = check_budget(budget)
        self.newline = check_choice(newline, NEWLINES, "newline")
        self.positions = check_choice(positions, POSITIONS, "positions")
        if self.merges and positions == "original":
            raise InputError("a strategy that merges tokens has no original positions for them; use 'contiguous'.")

    @property
    def off(self) -> bool:
        """Whether nothing is dropped, so that the host runs as if there were no strategy."""
        return self.budget >= 1

    def layers(self, tower: TowerFacts) -> tuple[int, ...]:
        """Layers of the tower that `select` needs taps of.

        Raises:
            InputError: the strategy does not work with such a tower.
        """
        return ()

    def budget_tokens(self, layout: Partitions) -> int:
        """T: how many tokens of a picture may stay (spec 2.3)."""
        return token_budget(layout.candidates, self.budget)

    @abstractmethod
    def select(self, picture: PictureTokens) -> Selection:
        """Which tokens of a picture stay."""

    def describe(self) -> dict[str, Any]:
        """The options by name, as JSON takes them: part of a cache's key for pruned features (spec 4.3)."""
        return {"strategy": type(self).__name__, **vars(self)}
