"""Randomness of training samples that depends on (seed, epoch, index) and on nothing else.

A sample augmented from a global generator changes with the number of workers, with what was drawn before it, and after
a resume. Here the sampler hands the dataset a `SampleKey`, and the dataset draws from a generator made from that key.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler


class SampleKey(NamedTuple):
    """Which sample of which pass over the data."""

    seed: int
    epoch: int
    index: int


class SampleRandom:
    """The random generators of one sample, made from its key when first used.

    Same key, same numbers: on any worker, in any order, before and after a resume. The two generators are independent
    of each other.
    """

    def __init__(self, key: SampleKey) -> None:
        self.key = key

    @cached_property
    def numpy(self) -> np.random.Generator:
        return np.random.default_rng([*self.key, 0])

    @cached_property
    def torch(self) -> torch.Generator:
        words = np.random.SeedSequence([*self.key, 1]).generate_state(2, np.uint32)
        return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))


class SeededDataset(Dataset[Any], ABC):
    """A map-style dataset whose samples are drawn with a `SampleRandom`.

    Subclasses write `__len__` and `sample`; `dataset[i]` gives sample i of epoch 0 with seed 0, the trainer's sampler
    asks with full keys.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample(self, index: int, random: SampleRandom) -> Any:
        """Sample `index` (0 <= index < len), with every random choice taken from `random`."""

    def __getitem__(self, key: SampleKey | int) -> Any:
        key = key if isinstance(key, SampleKey) else SampleKey(0, 0, key)
        if not 0 <= key.index < len(self):
            raise IndexError(f"sample {key.index} of {len(self)}")
        return self.sample(key.index, SampleRandom(key))


class EpochSampler(Sampler[Any]):
    """Every index once, in an order that (seed, epoch) decides alone.

    Yields `SampleKey`s to a `SeededDataset` and plain indices to any other dataset.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.length = len(dataset)  # pyright: ignore[reportArgumentType] - map-style datasets have a length
        self.keyed = isinstance(dataset, SeededDataset)
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        epoch = self.epoch
        # The last word is 2 for orders, 0 and 1 for the two generators of a sample: a missing word counts as 0.
        order = np.random.default_rng([self.seed, epoch, 0, 2]).permutation(self.length)
        for index in order:
            yield SampleKey(self.seed, epoch, int(index)) if self.keyed else int(index)
