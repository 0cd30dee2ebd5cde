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


class MovingAverage(nn.Module):
    """The exponential moving average of parameters, in float32; part of a model's state, so that a run resumes with it.

    Args:
        parameters: in the order in which `update` and `copy_to` get them.
        decay: the highest share of the old average that an update keeps.
    """

    updates: Tensor

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float = 0.9999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        for index, value in enumerate(parameters):
            self.register_buffer(f"average{index}", value.detach().float().clone())

    def averages(self) -> list[Tensor]:
        """In the order of the parameters."""
        return [value for name, value in self.named_buffers() if name != "updates"]

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter]) -> None:
        """Moves the averages towards the parameters as they are now."""
        self.updates += 1
        share = 1 - ema_decay(int(self.updates), self.decay)
        for average, value in zip(self.averages(), parameters, strict=True):
            average.lerp_(value.float(), share)

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        """Writes the averages into the parameters."""
        for average, value in zip(self.averages(), parameters, strict=True):
            value.copy_(average)
