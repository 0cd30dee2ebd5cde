"""Baselines that look at nothing: random and evenly spaced tokens (spec 4.4)."""

from __future__ import annotations

from typing import Any

import torch

from foveate.errors import InputError

from ..configuration import check_choice
from .base import PictureTokens, Selection, Strategy


class Random(Strategy):
    """T tokens at random, of all that are not padding; the same of every picture of one layout.

    Args:
        seed: of the choice.
    """

    def __init__(self, budget: float, *, seed: int = 0, **options: Any) -> None:
        super().__init__(budget, **options)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise InputError(f"seed must be a whole number of at least 0, not {seed!r}.")
        self.seed = seed

    def select(self, picture: PictureTokens) -> Selection:
        keep = torch.zeros(picture.layout.candidates, dtype=torch.bool)
        numbers = picture.ordered().cpu()
        order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(self.seed))
        keep[numbers[order[: self.budget_tokens(picture.layout)]]] = True
        return Selection(keep.view(picture.layout.count, -1).to(picture.device))


class Spatial(Strategy):
    """Evenly spaced tokens.

    Args:
        form: "even": exactly T of those that are not padding, evenly spaced in the order of the language model;
            "stride": every (N // int(N * budget))-th of each partition's N - 1 first, as the official baseline, which
            may be more than the budget, and less where some lie in padding.
    """

    def __init__(self, budget: float, *, form: str = "even", **options: Any) -> None:
        super().__init__(budget, **options)
        self.form = check_choice(form, ("even", "stride"), "form")

    def select(self, picture: PictureTokens) -> Selection:
        layout = picture.layout
        keep = torch.zeros(layout.count, layout.cells, dtype=torch.bool)
        if self.form == "stride":
            keep[:, : layout.cells - 1 : layout.cells // int(layout.cells * self.budget)] = True
        else:
            numbers = picture.ordered().cpu()
            count = min(self.budget_tokens(layout), len(numbers))
            # The middle of each of `count` equal stretches: no corner of the picture is favoured.
            keep.view(-1)[numbers[(torch.arange(count) * 2 + 1) * len(numbers) // (2 * count)]] = True
        return Selection(keep.to(picture.device))
