from __future__ import annotations

import pytest

from foveate.training.recipes import TrainingSettings
from foveate.training.schedules import learning_rate_factor


def factors(total: int, per_epoch: int = 10, **settings) -> list[float]:
    factor = learning_rate_factor(TrainingSettings(max_steps=total, **settings), total, per_epoch)
    return [factor(step) for step in range(total)]


def test_per_epoch_cosine_of_the_specification():
    values = factors(20, per_epoch=4, schedule="cosine_per_epoch")
    assert values[::4] == pytest.approx([1, 0.905, 0.655, 0.345, 0.095], abs=5e-4)
    assert values[0:4] == [values[0]] * 4
    assert values[8:12] == [values[8]] * 4


def test_cosine():
    assert factors(4, schedule="cosine") == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert factors(4, schedule="cosine", min_lr_ratio=0.1) == pytest.approx([1, 0.868198, 0.55, 0.231802], abs=1e-6)


def test_linear():
    assert factors(5, schedule="linear", min_lr_ratio=0.5) == pytest.approx([1, 0.9, 0.8, 0.7, 0.6])


def test_warm_up_comes_first_and_the_decay_spans_the_rest():
    assert factors(6, schedule="linear", warmup_steps=2) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    assert factors(4, schedule="constant", warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1])


def test_a_warm_up_longer_than_the_run_is_defined():
    assert factors(2, schedule="cosine", warmup_steps=4) == pytest.approx([0.25, 0.5])


def test_a_warm_up_that_is_configured_without_effect():
    """As in DynRefer's published training."""
    settings = {"schedule": "cosine_per_epoch", "warmup_steps": 3}
    assert factors(20, 4, true_warmup=False, **settings) == factors(20, 4, schedule="cosine_per_epoch")
    assert factors(20, 4, **settings)[:5] == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.904508], abs=1e-6)
