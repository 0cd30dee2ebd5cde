"""Options of HiRED, validated, and its presets (spec 2.6)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foveate.checkpoints import suggestion
from foveate.errors import InputError

ALLOCATIONS = ("mass", "count", "legacy_chunks", "even")
"""How the budget of the sub-images is divided between them (spec 2.3)."""
NEWLINES = ("none", "rows", "all")
"""Which of the host's newline tokens stay: none, those of mosaic rows that kept a token, all (spec 2.6)."""
POSITIONS = ("contiguous", "original")
"""Position ids of what is kept: without gaps, or as in the sequence that nothing was dropped from (spec 2.6)."""
ROUNDINGS = ("current", "legacy")
"""Of the unpadded mosaic: of transformers since 4.45, or that of 4.42 (spec 2.5)."""
RATES = ("candidates", "unpadded")


@dataclass(frozen=True)
class HiredConfig:
    """Options of HiRED. The defaults are the preset "exact".

    Args:
        budget: share r of the tokens that is kept, above 0 and at most 1.
        alpha: share of the budget that goes to the full picture.
        allocation: one of `ALLOCATIONS`.
        top_cells: K of "count"; by default 100 of 576, in proportion for other grids.
        init_layer: tower layer whose class row divides the budget, 0 the first.
        final_layer: tower layer whose class rows choose the tokens; by default the one that gives the features.
        pad_aware: cells that lie in padding are not chosen.
        exact_budget: exactly the budget is used, rather than at most.
        geometry: sub-images are scored by the part of the full picture that they show, rather than by equal blocks.
        rate_of: "candidates" counts padding into what the share is of, "unpadded" does not.
        newline: one of `NEWLINES`.
        positions: one of `POSITIONS`.
        swapped_grid: rows and columns of sub-images swapped, as in transformers 4.42, by a fault, in published numbers.
        unpad_rounding: one of `ROUNDINGS`.
        official_full: at a budget of 1, drop the newline tokens as the official script's "Full" row does; otherwise a
            budget of 1 leaves the model as it is.

    Raises:
        InputError: a value out of range, or two that cannot be combined.
    """

    budget: float = 0.2
    alpha: float = 0.5
    allocation: str = "mass"
    top_cells: int | None = None
    init_layer: int = 0
    final_layer: int | None = None
    pad_aware: bool = True
    exact_budget: bool = True
    geometry: bool = True
    rate_of: str = "candidates"
    newline: str = "none"
    positions: str = "contiguous"
    swapped_grid: bool = False
    unpad_rounding: str = "current"
    official_full: bool = False

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_share(self.alpha, "alpha")
        for name, choices in _CHOICES.items():
            check_choice(getattr(self, name), choices, name)
        for name in ("pad_aware", "exact_budget", "geometry", "swapped_grid", "official_full"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be true or false, not {getattr(self, name)!r}.")
        for name, least in (("top_cells", 1), ("init_layer", 0), ("final_layer", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if not whole and (value is not None or name == "init_layer"):
                raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}.")
        if self.exact_budget and self.newline == "rows":
            raise InputError(
                "newline 'rows' and exact_budget cannot be combined: how many rows keep a token is known only "
                "after the choice; use newline 'all' or 'none', or the preset 'paper'."
            )

    @classmethod
    def preset(cls, name: str = "exact", **changes: Any) -> HiredConfig:
        """One of `PRESETS`, with changes.

        Raises:
            InputError: no such preset or option, or a value out of range.
        """
        check_choice(name, tuple(PRESETS), "preset")
        known = [field.name for field in dataclasses.fields(cls)]
        for option in changes:
            if option not in known:
                raise InputError(
                    f"HiRED has no option {option!r}{suggestion(option, known)}; it has preset, {', '.join(known)}."
                )
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_official(cls, settings: Mapping[str, Any]) -> HiredConfig:
        """From the dictionary `hired_config` of the official code; keys that it lacks are 1.0 there (spec 6).

        Raises:
            InputError: a spatial budget, which is the strategy "spatial" here, or a value out of range.
        """
        if settings.get("spatial_budget"):
            raise InputError(
                f"spatial_budget {settings['spatial_budget']!r} is not an option of HiRED here; use the strategy "
                "'spatial' with that budget and form 'stride'."
            )
        rate, alpha = settings.get("token_budget_rate", 1.0), settings.get("alpha", 1.0)
        return cls.preset("official", budget=rate, alpha=alpha)

    def to_dict(self) -> dict[str, Any]:
        """The options by name, as JSON takes them."""
        return dataclasses.asdict(self)


_AS_PUBLISHED: dict[str, Any] = {"pad_aware": False, "exact_budget": False, "geometry": False}
_OLD_LAYOUT: dict[str, Any] = {"swapped_grid": True, "unpad_rounding": "legacy"}
PRESETS: dict[str, dict[str, Any]] = {
    "exact": {},
    "paper": {**_AS_PUBLISHED},
    "official": {**_AS_PUBLISHED, "allocation": "count"},
    "official_4_42": {**_AS_PUBLISHED, "allocation": "count", **_OLD_LAYOUT},
    "legacy_2024": {**_AS_PUBLISHED, "allocation": "legacy_chunks", **_OLD_LAYOUT},
}
"""Options by preset: "official" is the accepted code with the grid mended, "paper" has the paper's attention mass,
"exact" adds what servers and `ask` want; the last two are the official code on transformers 4.42 (spec 2.6)."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "allocation": ALLOCATIONS,
    "newline": NEWLINES,
    "positions": POSITIONS,
    "unpad_rounding": ROUNDINGS,
    "rate_of": RATES,
}


def check_budget(budget: Any) -> float:
    """The share of tokens that is kept.

    Raises:
        InputError: it is not above 0 and at most 1.
    """
    if not _is_number(budget) or not 0 < budget <= 1:
        raise InputError(
            f"the budget must be a share above 0 and at most 1, not {budget!r}; 0.2 keeps a fifth of the visual tokens."
        )
    return float(budget)


def check_share(value: Any, name: str) -> float:
    """A number from 0 to 1.

    Raises:
        InputError: it is none.
    """
    if not _is_number(value) or not 0 <= value <= 1:
        raise InputError(f"{name} must be a number from 0 to 1, not {value!r}.")
    return float(value)


def check_choice(value: Any, choices: tuple[str, ...], name: str) -> str:
    """One of some words.

    Raises:
        InputError: it is none of them; the sentence suggests the nearest.
    """
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, not {value!r}{suggestion(str(value), choices)}.")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
