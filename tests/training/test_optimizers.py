"""Muon and AdamW as one optimizer: who optimises what, resuming, and schedules that reach both."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from foveate.training.optimizers import Muon, MuonAdamW, orthogonalised


def _model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def _optimizer(model: Any) -> MuonAdamW:
    return MuonAdamW(model, learning_rate=1e-2, matrix_learning_rate=2e-2, weight_decay=0.1, betas=(0.9, 0.95))


def _step(model: Any, optimizer: MuonAdamW, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 5, (6,), generator=generator)
    loss = nn.functional.cross_entropy(model(tokens), tokens % 3)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def test_linear_weights_are_muons_and_everything_else_adamws() -> None:
    model = _model()
    model[3].bias.requires_grad_(False)
    optimizer = _optimizer(model)
    muon, adamw = optimizer.parts
    assert {id(p) for g in muon.param_groups for p in g["params"]} == {id(model[1].weight), id(model[3].weight)}
    rest = {id(model[0].weight), id(model[1].bias), id(model[2].weight), id(model[2].bias)}
    assert {id(p) for g in adamw.param_groups for p in g["params"]} == rest
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays[id(model[2].weight)] == 0
    assert decays[id(model[0].weight)] == 0.1


def test_a_schedule_reaches_both_parts_and_zero_rate_changes_nothing() -> None:
    model = _model()
    optimizer = _optimizer(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)
    before = copy.deepcopy(model.state_dict())
    _step(model, optimizer, 0)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_muon_step_moves_along_an_orthogonal_direction() -> None:
    model = _model()
    optimizer = _optimizer(model)
    before = model[1].weight.detach().clone()
    _step(model, optimizer, 0)
    # Muon's update without decay is the orthogonalised gradient: all its singular values are about equal.
    update = (model[1].weight.detach() - before * (1 - 2e-2 * 0.1)) / 2e-2
    values = torch.linalg.svdvals(update)
    large = values[values > 0.3]
    assert len(large) >= 2
    assert large.max() / large.min() < 2.5


def test_a_restored_optimizer_goes_on_with_the_same_numbers() -> None:
    model = _model()
    optimizer = _optimizer(model)
    for seed in range(3):
        _step(model, optimizer, seed)
    twin = copy.deepcopy(model)
    restored = _optimizer(twin)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3, 6):
        assert _step(model, optimizer, seed) == _step(twin, restored, seed)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_training_lowers_the_loss() -> None:
    model = _model()
    optimizer = _optimizer(model)
    losses = [_step(model, optimizer, seed) for seed in range(60)]
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])


def test_the_steps_of_muon_are_those_of_torch() -> None:
    """All matrices of a shape at once give what torch.optim.Muon gives one by one, to the rounding of bfloat16."""
    torch.manual_seed(3)
    shapes = [(6, 6), (12, 6), (6, 12), (6, 6)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    optimizers = [Muon(ours, lr=0.1, weight_decay=0.2), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2)]
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    matrices = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalised(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3
    torch.testing.assert_close(orthogonalised(matrices.mT).mT, orthogonalised(matrices))
