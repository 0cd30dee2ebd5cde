"""Strategies by name: one line each. A new one is a file beside these with a class of `base.Strategy`, or of
`language.LanguageStrategy` where tokens are dropped inside the language model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from foveate.checkpoints import suggestion
from foveate.errors import InputError

from .base import PictureTokens, Selection, Strategy, TowerFacts
from .divprune import DivPrune
from .fastv import FastV
from .hired import Hired, select_tokens
from .language import LanguageSelection, LanguageStrategy, LanguageTokens
from .plain import Random, Spatial
from .prumerge import PruMerge
from .sparsevlm import SparseVLM
from .visionzip import VisionZip
from .vispruner import VisPruner

__all__ = [
    "STRATEGIES",
    "LanguageSelection",
    "LanguageStrategy",
    "LanguageTokens",
    "PictureTokens",
    "Selection",
    "Strategy",
    "TowerFacts",
    "make_strategy",
    "select_tokens",
]

STRATEGIES: dict[str, Callable[..., Strategy | LanguageStrategy]] = {
    "hired": Hired,
    "random": Random,
    "spatial": Spatial,
    "prumerge": PruMerge,
    "prumerge+": partial(PruMerge, plus=True),
    "visionzip": VisionZip,
    "vispruner": VisPruner,
    "divprune": DivPrune,
    "fastv": FastV,
    "sparsevlm": SparseVLM,
}


def make_strategy(strategy: str | Strategy | LanguageStrategy, budget: float, **options: Any) -> Any:
    """The strategy of this name with its options, or the one that is given: a `Strategy` or a `LanguageStrategy`.

    Raises:
        InputError: no such strategy or option, or a value out of range.
    """
    if isinstance(strategy, Strategy | LanguageStrategy):
        if options:
            raise InputError(f"options ({', '.join(options)}) go to the strategy where it is made, not beside it.")
        return strategy
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        near = suggestion(str(strategy), STRATEGIES)
        raise InputError(f"there is no strategy {strategy!r}{near}; use one of: {', '.join(STRATEGIES)}.")
    maker = STRATEGIES[strategy]
    known = set(inspect.signature(maker).parameters)
    if "options" in known:
        known |= set(inspect.signature(Strategy).parameters)
    known -= {"budget", "options"}
    if strategy != "hired":  # which names its own options, with the nearest
        for option in options:
            if option not in known:
                raise InputError(
                    f"the strategy {strategy!r} has no option {option!r}{suggestion(option, known)}; it has "
                    f"{', '.join(sorted(known))}."
                )
    return maker(budget, **options)
