from __future__ import annotations

import numpy as np
import pytest
import torch

from foveate.training.sampling import EpochSampler, SampleKey, SampleRandom


def draws(*key: int) -> tuple[float, float]:
    random = SampleRandom(SampleKey(*key))
    return float(random.numpy.random()), float(torch.rand((), generator=random.torch))


def test_same_key_same_numbers_and_any_other_key_other_numbers():
    assert draws(1, 2, 3) == draws(1, 2, 3)
    keys = [(seed, epoch, index) for seed in range(5) for epoch in range(5) for index in range(5)]
    numpy_values, torch_values = zip(*[draws(*key) for key in keys], strict=True)
    assert len(set(numpy_values)) == len(keys)
    assert len(set(torch_values)) == len(keys)


def test_numbers_of_neighbouring_samples_are_independent():
    values = np.array([draws(0, 0, index) for index in range(2000)])
    assert np.abs(values.mean(0) - 0.5).max() < 0.03
    assert abs(np.corrcoef(values[:, 0], values[:, 1])[0, 1]) < 0.07
    assert abs(np.corrcoef(values[:-1, 1], values[1:, 1])[0, 1]) < 0.07


def test_the_global_generators_have_no_say(tiny):
    dataset = tiny.NoisyLine()
    torch.manual_seed(1)
    first = dataset[SampleKey(0, 1, 5)]
    torch.manual_seed(2)
    np.random.seed(7)
    again = dataset[SampleKey(0, 1, 5)]
    assert torch.equal(first["x"], again["x"])
    assert not torch.equal(first["x"], dataset[SampleKey(0, 2, 5)]["x"])
    assert torch.equal(dataset[5]["x"], dataset[SampleKey(0, 0, 5)]["x"])


def test_index_out_of_range(tiny):
    with pytest.raises(IndexError, match="sample 101 of 101"):
        tiny.NoisyLine()[101]


def test_epoch_sampler_is_a_new_permutation_in_each_epoch(tiny):
    sampler = EpochSampler(tiny.NoisyLine(50), seed=4)
    first = list(sampler)
    assert all(key.seed == 4 and key.epoch == 0 for key in first)
    assert sorted(key.index for key in first) == list(range(50))
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(key.index for key in second) == list(range(50))
    assert [key.index for key in second] != [key.index for key in first]


def test_epoch_sampler_gives_plain_indices_to_plain_datasets():
    dataset = torch.utils.data.TensorDataset(torch.zeros(6))
    assert sorted(EpochSampler(dataset, 0)) == list(range(6))
