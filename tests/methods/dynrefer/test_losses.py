"""The objectives, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.methods.dynrefer.losses import asymmetric_loss, prompt_loss, region_text_contrast


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


class TestAsymmetricLoss:
    def test_by_hand(self) -> None:
        # Present at p = 0.5: -log 0.5, not focused. Absent at p = 0.5: q = 0.55, -0.45^7 log 0.55.
        loss = asymmetric_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[1, 0]]))
        assert loss.item() == pytest.approx(math.log(2) - 0.45**7 * math.log(0.55), rel=1e-6)
        # Gammas 4 and 1: the present one is weighted by 1 - p.
        loss = asymmetric_loss(torch.tensor([1.0, 1.0]), torch.tensor([1, 0]), gamma_negative=4, gamma_positive=1)
        p = sigmoid(1.0)
        expected = -(1 - p) * math.log(p) - (p - 0.05) ** 4 * math.log(1 - p + 0.05)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        # Without the clip: absent at p gives -p^7 log(1 - p).
        loss = asymmetric_loss(torch.tensor([1.0]), torch.tensor([0]), clip=0)
        assert loss.item() == pytest.approx(-(p**7) * math.log(1 - p), rel=1e-5)

    def test_is_a_sum_and_not_a_mean(self) -> None:
        logits, targets = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.eye(3, 5)
        one = asymmetric_loss(logits, targets)
        assert asymmetric_loss(logits.repeat(2, 1), targets.repeat(2, 1)).item() == pytest.approx(2 * one.item())
        parts = [asymmetric_loss(z, y).item() for z, y in zip(logits.flatten(), targets.flatten(), strict=True)]
        assert sum(parts) == pytest.approx(one.item())

    def test_no_gradient_through_the_focus(self) -> None:
        logits = torch.tensor([0.0, 0.0], requires_grad=True)
        asymmetric_loss(logits, torch.tensor([1, 0])).backward()
        # d/dz -log p = p - 1, d/dz -f log q = f p (1 - p) / q with f = 0.45^7 held fixed.
        assert logits.grad is not None
        assert logits.grad.tolist() == pytest.approx([-0.5, 0.45**7 * 0.25 / 0.55], rel=1e-6)

    def test_sure_absence_costs_nothing(self) -> None:
        """Below p = 0.05 a negative is clipped away, gradient and all."""
        logits = torch.tensor([-3.0, -20.0], requires_grad=True)
        loss = asymmetric_loss(logits, torch.zeros(2))
        loss.backward()
        assert loss.item() == 0
        assert logits.grad is not None
        assert logits.grad.tolist() == [0, 0]

    def test_extreme_logits_are_finite(self) -> None:
        logits = torch.tensor([-200.0, 200.0], requires_grad=True)
        loss = asymmetric_loss(logits, torch.tensor([1.0, 0.0]))
        loss.backward()
        # log clamped at 1e-8; the absent one at p = 1 keeps q = 0.05.
        assert loss.item() == pytest.approx(8 * math.log(10) - 0.95**7 * math.log(0.05), rel=1e-5)
        assert logits.grad is not None
        assert logits.grad.isfinite().all()

    @given(st.lists(st.floats(-30, 30), min_size=1, max_size=8), st.data())
    def test_never_negative_and_better_for_the_truth(self, values: list[float], data: st.DataObject) -> None:
        logits = torch.tensor(values)
        targets = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=len(values), max_size=len(values))))
        loss = asymmetric_loss(logits, targets)
        assert loss >= 0
        assert asymmetric_loss(logits + (2 * targets - 1), targets) <= loss + 1e-6


class TestContrast:
    def by_hand(self, similarity: torch.Tensor, scale: float, bias: float, offset: int) -> float:
        """One direction: - sum log sigmoid(label (e^scale s + bias)) / rows."""
        total = 0.0
        for row, values in enumerate(similarity.tolist()):
            for column, value in enumerate(values):
                label = 1 if column == row + offset else -1
                total -= math.log(sigmoid(label * (math.exp(scale) * value + bias)))
        return total / len(similarity)

    @pytest.mark.parametrize("offset", [0, 2])
    def test_by_hand(self, offset: int) -> None:
        generator = torch.Generator().manual_seed(1)
        there, back = torch.randn(2, 4, generator=generator), torch.randn(2, 4, generator=generator)
        scale, bias = torch.tensor(0.5), torch.tensor(-1.5)
        loss = region_text_contrast(there, back, scale, bias, offset=offset)
        expected = (self.by_hand(there, 0.5, -1.5, offset) + self.by_hand(back, 0.5, -1.5, offset)) / 2
        assert loss.item() == pytest.approx(expected, rel=1e-5)

    def test_the_offset_says_where_the_pairs_are(self) -> None:
        similarity = torch.full((2, 4), -1.0)
        similarity[0, 2] = similarity[1, 3] = 1.0
        scale, bias = torch.tensor(math.log(10.0)), torch.tensor(0.0)
        right = region_text_contrast(similarity, similarity, scale, bias, offset=2)
        wrong = region_text_contrast(similarity, similarity, scale, bias, offset=0)
        assert right < 1e-3
        assert wrong > 10


class TestPromptLoss:
    def test_by_hand(self) -> None:
        logits, labels = torch.tensor([[0.0, 2.0, 5.0], [1.0, -1.0, 0.0]]), torch.tensor([[1, 0, -1], [-1, 0, -1]])
        expected = (math.log(2) - math.log(1 - sigmoid(2.0)) - math.log(1 - sigmoid(-1.0))) / 2
        assert prompt_loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)

    def test_unknown_prompts_have_no_say(self) -> None:
        labels = torch.tensor([[1, -1], [-1, -1]])
        logits = torch.tensor([[0.3, 50.0], [-50.0, 7.0]], requires_grad=True)
        loss = prompt_loss(logits, labels)
        loss.backward()
        assert loss.item() == pytest.approx(-math.log(sigmoid(0.3)) / 2, rel=1e-6)
        assert logits.grad is not None
        assert logits.grad.flatten()[1:].tolist() == [0, 0, 0]
        assert prompt_loss(logits, torch.full((2, 2), -1)).item() == 0
        assert prompt_loss(torch.zeros(0, 3), torch.zeros(0, 3)).item() == 0
