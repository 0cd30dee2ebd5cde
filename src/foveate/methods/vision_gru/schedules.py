"""Learning rates and the averaging of weights as the published training has them (spec 3)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def classification_factor(step: int, warmup: int, total: int) -> float:
    """Factor on the learning rate at optimiser step 0..total: linear from 0, then half a cosine to 0 (spec 3.1)."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(total - warmup, 1), 1.0)))


def segmentation_factor(step: int, warmup: int = 1500, total: int = 160_000, start: float = 1e-6) -> float:
    """Factor on the learning rate at iteration 0..total: linear from `start` to 1, then linear to 0 (spec 3.2)."""
    if step < warmup:
        return start + (1 - start) * step / warmup
    return max(0.0, 1 - (step - warmup) / max(total - warmup, 1))


def ema_decay(update: int, decay: float = 0.9999) -> float:
    """Share of the old average that update 1, 2, ... keeps: (1 + n) / (10 + n), at most `decay` (spec 3.1)."""
    return min(decay, (1 + update) / (10 + update))


class MovingAverage:
    """The exponential moving average of a model's parameters, in float32.

    Args:
        parameters: in the order in which they are averaged and given back.
        decay: the highest share of the old average that an update keeps.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float = 0.9999) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.updates = 0
        self.averages = [value.detach().float().clone() for value in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the parameters as they are now."""
        self.updates += 1
        share = 1 - ema_decay(self.updates, self.decay)
        for average, value in zip(self.averages, self.parameters, strict=True):
            average.lerp_(value.float(), share)

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        """Writes the averages into parameters of the same order and shapes."""
        for average, value in zip(self.averages, list(parameters), strict=True):
            value.copy_(average)

    def state_dict(self) -> dict[str, float | int | list[Tensor]]:
        return {"decay": self.decay, "updates": self.updates, "averages": self.averages}

    def load_state_dict(self, state: dict[str, float | int | list[Tensor]]) -> None:
        averages = state["averages"]
        assert isinstance(averages, list)
        for average, value in zip(self.averages, averages, strict=True):
            average.copy_(value)
        self.decay, self.updates = float(state["decay"]), int(state["updates"])  # type: ignore[arg-type]
