"""Which sample comes when, and with which randomness: a function of seed, epoch and index alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler


class StepSampler(Sampler[tuple[int, int]]):
    """Yields `(epoch, index)` for a training that is counted in steps, running on over the ends of epochs.

    Every epoch is a permutation of the data set given by seed and epoch, so the sequence is the same in every process
    and after every restart, and a longer training begins with the sequence of a shorter one.

    Args:
        dataset_size: number of samples of the data set.
        num_samples: number of draws, usually steps times batch size.
        seed: not negative.

    Raises:
        ValueError: an empty data set.

    Example:
        >>> [epoch for epoch, index in StepSampler(dataset_size=3, num_samples=5)]
        [0, 0, 0, 1, 1]
    """

    def __init__(self, dataset_size: int, num_samples: int, seed: int = 0) -> None:
        if dataset_size < 1:
            raise ValueError("The data set is empty; there is nothing to draw from.")
        self.dataset_size = dataset_size
        self.num_samples = num_samples
        self.seed = seed

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.num_samples, self.dataset_size):
            epoch = start // self.dataset_size
            # Hashed and not added: epoch 1 of seed 0 must not be epoch 0 of seed 1.
            mixed_seed = np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64).item()
            order = torch.randperm(self.dataset_size, generator=torch.Generator().manual_seed(mixed_seed))
            for index in order[: self.num_samples - start].tolist():
                yield epoch, index


class AugmentedDataset(Dataset[dict[str, Any]]):
    """A data set seen through a random transform, indexed by the `(epoch, index)` pairs of `StepSampler`.

    The generator given to the transform is seeded with (seed, epoch, index): a sample is the same in any worker and
    process, in any order, resumed or not.

    Args:
        dataset: anything with `__len__` and `__getitem__(index)`.
        transform: called as `transform(sample, rng)`.
        seed: not negative.
    """

    def __init__(
        self, dataset: Any, transform: Callable[[Any, np.random.Generator], dict[str, Any]], seed: int = 0
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> dict[str, Any]:
        epoch, index = epoch_and_index
        return self.transform(self.dataset[index], np.random.default_rng((self.seed, epoch, index)))
