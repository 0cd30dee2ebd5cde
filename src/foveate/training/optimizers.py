"""Muon for the matrices of linear layers, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

_MOMENTUM, _STEPS, _EPS = 0.95, 5, 1e-7
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrices: Tensor) -> Tensor:
    """About U V^T of the singular value decompositions U S V^T of matrices (N, A, B): five Newton-Schulz steps.

    Computed in the type of the matrices: bfloat16, which is enough, takes fifty times as long on a CPU without it.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = x / x.flatten(1).norm(dim=1).clamp(min=_EPS)[:, None, None]
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


class Muon(Optimizer):
    """Momentum whose steps are orthogonalised (Jordan et al. 2024), for matrices.

    What `torch.optim.Muon` does with its defaults, for all matrices of a shape at once and in their own type.
    """

    def __init__(self, params: Sequence[Tensor], *, lr: float, weight_decay: float) -> None:
        super().__init__(list(params), {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            shapes: dict[Any, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault((parameter.shape, parameter.device), []).append(parameter)
            for (shape, _), members in shapes.items():
                updates = []
                for parameter in members:
                    state, gradient = self.state[parameter], cast(Tensor, parameter.grad)
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                    state["momentum_buffer"].lerp_(gradient, 1 - _MOMENTUM)
                    updates.append(gradient.lerp(state["momentum_buffer"], _MOMENTUM))
                steps = orthogonalised(torch.stack(updates)) * max(1, shape[0] / shape[1]) ** 0.5
                for parameter, step in zip(members, steps, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step, alpha=group["lr"])


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
        self.parts: Sequence[Optimizer] = [
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
