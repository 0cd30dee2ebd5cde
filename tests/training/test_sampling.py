from __future__ import annotations

import numpy as np
import pytest
import torch

from foveate.training.sampling import EpochSampler, LengthGroupedSampler, SampleKey, SampleRandom


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


def grouped(lengths: list[int], kinds: list[int], batch_size: int, epoch: int = 0, seed: int = 0) -> list[int]:
    sampler = LengthGroupedSampler(list(lengths), seed, lengths=lengths, kinds=kinds, batch_size=batch_size)  # type: ignore[arg-type]
    sampler.set_epoch(epoch)
    return list(sampler)


def test_batches_are_of_one_kind_and_of_similar_lengths():
    draw = np.random.default_rng(0)
    lengths, kinds = draw.integers(1, 1000, 2003).tolist(), draw.integers(0, 3, 2003).tolist()
    order = grouped(lengths, kinds, 8)
    assert sorted(order) == list(range(2003))
    whole = sum(kinds.count(kind) // 8 for kind in range(3))
    batches = [order[start : start + 8] for start in range(0, 8 * whole, 8)]
    assert all(len({kinds[index] for index in batch}) == 1 for batch in batches)
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert np.mean(spread) < 60  # 778 for batches at random; 400 sorted samples span 1000
    longest = {max(lengths[i] for i in range(2003) if kinds[i] == kind) for kind in range(3)}
    assert lengths[order[0]] == max(longest & {max(lengths[i] for i in batch) for batch in batches})
    # The order of batches tells nothing of their lengths: no curriculum.
    means = [np.mean([lengths[i] for i in batch]) for batch in batches[1:]]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.2


def test_mega_batches_by_hand():
    """Batches of two: 100 samples are one mega-batch, sorted whole; what is left over of each kind comes last."""
    lengths = [*range(100), 7, 5, 3]
    order = grouped(lengths, [1] * 100 + [0] * 3, 2)
    pairs = {tuple(order[start : start + 2]) for start in range(0, 102, 2)}
    assert {(k + 1, k) for k in range(0, 100, 2)} <= pairs
    (text,) = pairs - {(k + 1, k) for k in range(0, 100, 2)}
    assert set(text) | {order[-1]} == {100, 101, 102}
    assert order[:2] == [99, 98]


def test_groups_change_with_the_epoch_and_repeat_with_the_seed():
    lengths = list(np.random.default_rng(1).integers(1, 50, 300))
    first = grouped(lengths, [0] * 300, 4)
    assert first == grouped(lengths, [0] * 300, 4)
    assert first != grouped(lengths, [0] * 300, 4, epoch=1)
    assert first != grouped(lengths, [0] * 300, 4, seed=1)
    assert grouped([3, 9], [0, 1], 4) == [1, 0]  # less than a batch


def test_lengths_of_other_data_are_an_error():
    with pytest.raises(ValueError, match="2 lengths and 3 kinds for 3 samples"):
        LengthGroupedSampler([0, 1, 2], 0, lengths=[1, 2], kinds=[0, 0, 0], batch_size=1)  # type: ignore[arg-type]
