"""Learning rates and the averaging of weights as the published training has them (spec 3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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


class AveragedTraining(nn.Module):
    """A network in training and the moving average of its weights, which resumes with it.

    The average follows when the weights have changed since the last look, that is, once for each optimiser step.

    Args:
        network: it is trained, and its last parameter in every step.
        decay: of the average; 0 for none.
    """

    seen: Tensor

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.network = network
        self.average = MovingAverage(network.parameters(), decay) if decay else None
        # What the weights were when the average last followed; part of the state, so that a resumed run goes on so.
        self.register_buffer("seen", self._last().clone())

    def _last(self) -> Tensor:
        return list(self.network.parameters())[-1].detach()

    def follow(self) -> None:
        """Moves the average towards the weights if these are others than before."""
        if self.average is not None and not torch.equal(self.seen, self._last()):
            self.average.update(self.network.parameters())
            self.seen.copy_(self._last())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the network has the averages as its weights, if there are any."""
        self.follow()
        if self.average is None or not int(self.average.updates):
            yield
            return
        kept = [value.detach().clone() for value in self.network.parameters()]
        self.average.copy_to(self.network.parameters())
        try:
            yield
        finally:
            with torch.no_grad():
                for value, before in zip(self.network.parameters(), kept, strict=True):
                    value.copy_(before)
