"""Which sample comes when, and with which randomness: a function of seed, epoch and index alone.

Nothing has to be remembered to go on in the middle of an epoch, and neither the number of worker processes nor that of
training processes changes the order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from mt_adapters.data.pictures import BadSampleError

# Frames are shuffled over so many files at a time, which a worker process keeps open.
SHARDS_AT_ONCE = 8


class StepSampler(Sampler[tuple[int, int]]):
    """Yields `(epoch, index)` for a training that is counted in steps, running on over the ends of epochs.

    In every epoch of a source each of its frames comes once. The sequence is given by seed and sizes, so it is the
    same in every process and after every restart, and a longer training begins with the sequence of a shorter one.
    Several sources take turns so that at any moment their shares are those of the weights, to one frame.

    Frames that lie in one file are drawn near each other: the files are shuffled, then the frames of eight files at a
    time. A source in one file is shuffled as a whole.

    Args:
        shard_lengths: per source the numbers of frames in its files; indices run through all files of all sources.
        num_samples: number of draws, usually steps times batch size.
        seed: not negative.
        weights: of the sources; default: their sizes.

    Raises:
        ValueError: an empty source, or weights that are not positive numbers, one per source.

    Example:
        >>> [epoch for epoch, index in StepSampler([[3]], num_samples=5)]
        [0, 0, 0, 1, 1]
    """

    def __init__(
        self,
        shard_lengths: Sequence[Sequence[int]],
        num_samples: int,
        seed: int = 0,
        weights: Sequence[float] | None = None,
    ) -> None:
        sizes = [sum(lengths) for lengths in shard_lengths]
        if not sizes or min(sizes) < 1:
            raise ValueError("The data set is empty; there is nothing to draw from.")
        self.shard_lengths = [list(lengths) for lengths in shard_lengths]
        self.weights = [float(weight) for weight in (sizes if weights is None else weights)]
        if len(self.weights) != len(sizes) or not all(0 < weight < float("inf") for weight in self.weights):
            raise ValueError(f"weights are {weights}; {len(sizes)} sources need as many positive numbers")
        self.num_samples = num_samples
        self.seed = seed

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        starts = [0, *accumulate(sum(lengths) for lengths in self.shard_lengths)]
        streams = [self._frames(source, start) for source, start in enumerate(starts[:-1])]
        shares = [weight / sum(self.weights) for weight in self.weights]
        drawn = [0] * len(streams)
        for number in range(1, self.num_samples + 1):
            # The source that is furthest behind its share.
            source = max(range(len(streams)), key=lambda source: shares[source] * number - drawn[source])
            drawn[source] += 1
            yield next(streams[source])

    def _frames(self, source: int, start: int) -> Iterator[tuple[int, int]]:
        """(epoch, index) of one source without end."""
        lengths = self.shard_lengths[source]
        starts = [start + offset for offset in accumulate([0, *lengths])]
        epoch = 0
        while True:
            windows = range(0, len(lengths), SHARDS_AT_ONCE)
            shards = self._permutation(len(lengths), epoch, source, len(windows))
            for number, first in enumerate(windows):
                indices = torch.cat(
                    [torch.arange(starts[k], starts[k + 1]) for k in shards[first : first + SHARDS_AT_ONCE].tolist()]
                )
                for index in indices[self._permutation(len(indices), epoch, source, number)].tolist():
                    yield epoch, index
            epoch += 1

    def _permutation(self, size: int, *numbers: int) -> torch.Tensor:
        # Hashed and not added: epoch 1 of seed 0 must not be epoch 0 of seed 1.
        mixed_seed = np.random.SeedSequence((self.seed, *numbers)).generate_state(1, np.uint64).item()
        return torch.randperm(size, generator=torch.Generator().manual_seed(mixed_seed))


class AugmentedDataset(Dataset[dict[str, Any]]):
    """A data set seen through a random transform, indexed by the `(epoch, index)` pairs of `StepSampler`.

    The generator given to the transform is seeded with (seed, epoch, index): a sample is the same in any worker and
    process, in any order, resumed or not.

    Args:
        dataset: anything with `__len__` and `__getitem__(index)`.
        transform: called as `transform(sample, rng)`; its `size` is (height, width).
        seed: not negative.
        skip_bad: a frame that raises `BadSampleError` becomes a black image without any label, which changes no loss,
            gradient or metric; its "problem" says why.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Any,
        seed: int = 0,
        skip_bad: bool = False,
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.skip_bad = skip_bad

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> dict[str, Any]:
        epoch, index = epoch_and_index
        try:
            sample = self.dataset[index]
        except BadSampleError as error:
            if not self.skip_bad:
                raise
            sample = {"image": torch.zeros(3, *self.transform.size, dtype=torch.uint8), "labels": {}}
            return self.transform(sample, np.random.default_rng(0)) | {"problem": str(error)}
        return self.transform(sample, np.random.default_rng((self.seed, epoch, index)))
