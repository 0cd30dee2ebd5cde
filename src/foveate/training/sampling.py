"""Randomness of training samples that depends on (seed, epoch, index) and on nothing else.

A sample augmented from a global generator changes with the number of workers, with what was drawn before it, and after
a resume. Here the sampler hands the dataset a `SampleKey`, and the dataset draws from a generator made from that key.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
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
        for index in self.order(np.random.default_rng([self.seed, epoch, 0, 2])):
            yield SampleKey(self.seed, epoch, int(index)) if self.keyed else int(index)

    def order(self, draw: np.random.Generator) -> np.ndarray:
        """(length,) the indices of an epoch in their order."""
        return draw.permutation(self.length)


class LengthGroupedSampler(EpochSampler):
    """Every index once, in batches of one kind and of similar lengths, so that little is padded (MG-LLaVA spec 3.2).

    The samples of a kind are shuffled and cut into mega-batches of `MEGA` batches; each mega-batch is sorted by length
    and cut into batches. Batches are shuffled, but that with the longest sample comes first, where too little memory
    shows at once. What is too little of a kind for a batch comes last, mixed.

    Args:
        lengths: (N,) of the samples, in any unit.
        kinds: (N,) whole numbers; a batch is of one kind.
        batch_size: samples of a step on all processes together.
    """

    MEGA = 50

    def __init__(
        self, dataset: Dataset[Any], seed: int, *, lengths: Sequence[int], kinds: Sequence[int], batch_size: int
    ) -> None:
        super().__init__(dataset, seed)
        self.lengths, self.kinds = np.asarray(lengths, dtype=np.int64), np.asarray(kinds, dtype=np.int64)
        self.batch_size = batch_size
        if not len(self.lengths) == len(self.kinds) == self.length:
            raise ValueError(f"{len(self.lengths)} lengths and {len(self.kinds)} kinds for {self.length} samples")

    def order(self, draw: np.random.Generator) -> np.ndarray:
        batches: list[np.ndarray] = []
        left: list[np.ndarray] = []
        for kind in np.unique(self.kinds):
            own = draw.permutation(np.flatnonzero(self.kinds == kind))
            whole = len(own) // self.batch_size * self.batch_size
            left.append(own[whole:])
            for start in range(0, whole, self.MEGA * self.batch_size):
                mega = own[start : min(start + self.MEGA * self.batch_size, whole)]
                mega = mega[np.argsort(-self.lengths[mega], kind="stable")]
                batches += np.split(mega, len(mega) // self.batch_size)
        order = [batches[place] for place in draw.permutation(len(batches))]
        if order:
            longest = max(range(len(order)), key=lambda place: self.lengths[order[place][0]])
            order.insert(0, order.pop(longest))
        rest = np.concatenate(left)
        return np.concatenate([*order, rest[np.argsort(-self.lengths[rest], kind="stable")]])


class SampleLengths(NamedTuple):
    """What a `LengthGroupedSampler` needs to know of each sample."""

    lengths: Sequence[int]
    kinds: Sequence[int]
