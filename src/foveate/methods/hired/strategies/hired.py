"""HiRED: the early class row divides the budget over the partitions, the late one chooses in each (spec 2.3, 2.4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.errors import InputError

from ..allocation import allocate, allocate_exactly, keep_highest, sub_image_scores, token_budget
from ..configuration import HiredConfig
from ..partitions import Partitions
from .base import PictureTokens, Selection, Strategy, TowerFacts


def select_tokens(early: Tensor, late: Tensor, layout: Partitions, config: HiredConfig) -> Tensor:
    """The paper's algorithm as a function of attention alone; needs no model.

    Args:
        early: (N,) the class token's attention to the full picture in layer `init_layer`, summed over heads.
        late: (P, N) its attention in layer `final_layer`, of every partition.
        layout: grid and padding of the partitions.

    Returns:
        (P, N) bool, the tokens that are kept. Without `pad_aware` some may lie in padding, which the packer cuts off.

    Raises:
        InputError: shapes that do not fit the layout.
    """
    if early.shape != (layout.cells,) or late.shape != (layout.count, layout.cells):
        raise InputError(
            f"attention of {tuple(early.shape)} and {tuple(late.shape)} does not fit {layout.count} partitions of "
            f"{layout.cells} tokens; give ({layout.cells},) and ({layout.count}, {layout.cells})."
        )
    counts = allocated(early, layout, config)
    if config.pad_aware:
        late = late.masked_fill(~layout.valid.to(late.device), -torch.inf)
    return keep_highest(late, counts)


def allocated(early: Tensor, layout: Partitions, config: HiredConfig) -> list[int]:
    """Tokens that each of the P partitions may keep; arguments as in `select_tokens`."""
    budget = _budget(layout, config)
    caps = layout.valid.sum(dim=1).tolist() if config.pad_aware else [layout.cells] * layout.count
    if config.budget >= 1:  # which switches the method off: nothing is lost to truncation
        return caps
    if config.exact_budget and config.newline == "all":
        budget = max(1, budget - layout.newline_count)
    if layout.count == 1:
        return [min(budget, caps[0])]
    scores = sub_image_scores(
        early,
        layout,
        config.allocation,
        alpha=config.alpha,
        top_cells=config.top_cells,
        geometry=config.geometry,
    )
    if config.exact_budget:
        return allocate_exactly(scores.tolist(), budget, config.alpha, caps)
    return allocate(scores, budget, config.alpha, caps)


def _budget(layout: Partitions, config: HiredConfig) -> int:
    of = layout.candidates if config.rate_of == "candidates" else int(layout.valid.sum())
    return token_budget(of, config.budget)


class Hired(Strategy):
    """HiRED as a strategy.

    Args:
        budget: share of the tokens that is kept.
        preset: one of `configuration.PRESETS`.
        options: of `HiredConfig`.
    """

    def __init__(self, budget: float, *, preset: str = "exact", **options: Any) -> None:
        self.config = HiredConfig.preset(preset, budget=budget, **options)
        super().__init__(budget, newline=self.config.newline, positions=self.config.positions)
        self.same_count = self.config.exact_budget
        self.grid_swapped, self.unpad_rounding = self.config.swapped_grid, self.config.unpad_rounding

    @property
    def off(self) -> bool:
        return super().off and not self.config.official_full

    def layers(self, tower: TowerFacts) -> tuple[int, ...]:
        if not tower.has_cls:
            raise InputError(
                "HiRED reads the attention of the vision tower's class token, and this tower (as SigLIP's) "
                "has none; use strategy 'random' or 'spatial', or a model with a CLIP tower."
            )
        final = tower.feature_layer if self.config.final_layer is None else self.config.final_layer
        for name, layer in (("init_layer", self.config.init_layer), ("final_layer", final)):
            if not 0 <= layer <= tower.feature_layer:
                raise InputError(
                    f"{name} {layer} is not among the layers 0 to {tower.feature_layer} that the features come from."
                )
        return self.config.init_layer, final

    def budget_tokens(self, layout: Partitions) -> int:
        return _budget(layout, self.config)

    def select(self, picture: PictureTokens) -> Selection:
        init, final = self.layers(picture.tower)
        early = picture.taps[init][:1].head_sum()[0]
        return Selection(select_tokens(early, picture.taps[final].head_sum(), picture.layout, self.config))

    def describe(self) -> dict[str, Any]:
        return {"strategy": "hired", **self.config.to_dict()}
