"""FastV: after a few layers, what the last token of the prompt looks at least is dropped (spec 4.4)."""

from __future__ import annotations

from foveate.errors import InputError

from ..configuration import check_choice
from .language import LanguageSelection, LanguageStrategy, LanguageTokens, keep_best


class FastV(LanguageStrategy):
    """FastV.

    Args:
        budget: share of the visual tokens that is kept.
        after: layers that read all tokens; the attention of the last of them decides.
        rate_of: "candidates": as many tokens stay as of any other strategy with this budget; "read": round(L * budget)
            of the L visual tokens that the language model reads, newlines and all, as published.
    """

    def __init__(self, budget: float, *, after: int = 2, rate_of: str = "candidates") -> None:
        super().__init__(budget)
        if isinstance(after, bool) or not isinstance(after, int) or after < 1:
            raise InputError(f"after must be a whole number of layers of at least 1, not {after!r}.")
        self.after = after
        self.rate_of = check_choice(rate_of, ("candidates", "read"), "rate_of")

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        if self.after >= num_layers:
            raise InputError(
                f"FastV drops tokens after {self.after} layers, and this language model has {num_layers}; give a "
                "smaller after."
            )
        return (self.after - 1,)

    def select(self, tokens: LanguageTokens) -> LanguageSelection:
        count = tokens.budget if self.rate_of == "candidates" else max(1, round(tokens.total * self.budget))
        return LanguageSelection(keep_best(tokens, count))
