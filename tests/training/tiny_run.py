"""A small real training task, for the tests beside it; as a program it trains in a process of its own.

    python tiny_run.py OUTPUT KILL_AT

KILL_AT is the step in whose forward pass the process kills itself, as `kill -9` would.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import ModelOutput

from foveate.training.recipes import TrainingSettings
from foveate.training.sampling import SampleRandom, SeededDataset
from foveate.training.trainer import TrainingTask, run

SEED = 3


class NoisyLine(SeededDataset):
    """y = index / 100, seen through noise that is drawn anew in each epoch."""

    def __init__(self, length: int = 101) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, random: SampleRandom) -> dict[str, torch.Tensor]:
        x = torch.randn(8, generator=random.torch) * 0.1 + index / 100
        return {"x": x, "y": torch.tensor(index / 100 + 0.01 * random.numpy.random(), dtype=torch.float32)}


class Regressor(nn.Module):
    def __init__(self, dropout: float = 0.2, kill_at: int = 0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Dropout(dropout), nn.BatchNorm1d(32), nn.Linear(32, 1)
        )
        self.kill_at, self.calls = kill_at, 0

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> ModelOutput:
        self.calls += 1
        if self.calls == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        error = ((self.layers(x)[:, 0] - y) ** 2).mean()
        size = 0.1 * self.get_parameter("layers.0.weight").abs().mean()
        return ModelOutput(loss=error + size, losses={"error": error, "size": size})


def make_task(kill_at: int = 0) -> TrainingTask:
    torch.manual_seed(SEED)
    return TrainingTask(Regressor(kill_at=kill_at), NoisyLine())


def make_settings(**changes: Any) -> TrainingSettings:
    # 101 samples in batches of 8 are 12 steps an epoch: checkpoints at 16, 32 fall inside epochs 1 and 2.
    defaults: dict[str, Any] = {
        "max_steps": 40,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "warmup_steps": 5,
        "precision": "fp32",
        "log_every": 3,
        "save_every": 16,
        "progress": False,
    }
    return TrainingSettings(**{**defaults, **changes})


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(make_task(int(sys.argv[2])), make_settings(), Path(sys.argv[1]), SEED)
