"""Muon for the matrices of linear layers, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """Orthogonalised momentum (Muon, Jordan et al. 2024) on the weights of `nn.Linear`, AdamW on the rest.

    Small transformers that are trained from nothing learn from a third of the samples that AdamW alone needs; the
    stand-ins of the rendered world are trained with it. Embeddings, convolutions, norms and biases are AdamW's.

    Args:
        model: its trainable parameters are optimised.
        learning_rate: of AdamW.
        matrix_learning_rate: of Muon.
        weight_decay: of everything with two or more dimensions.
        betas: of AdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float,
        matrix_learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trainable if id(parameter) in linear]
        rest = [parameter for parameter in trainable if id(parameter) not in linear]
        adamw_groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.parts: list[Optimizer] = [
            Muon(matrices, lr=matrix_learning_rate, weight_decay=weight_decay),
            AdamW([group for group in adamw_groups if group["params"]], lr=learning_rate, betas=betas),
        ]
        super().__init__([{"params": trainable}], {})
        # The groups of the parts themselves, so that a scheduler that sets "lr" here sets it there.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
