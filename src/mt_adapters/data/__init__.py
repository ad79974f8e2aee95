"""Data sets, joint transforms, batches and the order of the samples."""

from __future__ import annotations

from collections.abc import Callable

from .collate import MultitaskCollator
from .frames import FrameDataset
from .pictures import BadSampleError
from .rooms import ROOMS_CLASSES, RoomsDataset
from .sampling import AugmentedDataset, StepSampler
from .transforms import EvalTransform, TrainTransform

# Each is called with (split, data_dir).
DATASETS: dict[str, Callable[..., FrameDataset]] = {
    "rooms": RoomsDataset,
}


def get_dataset(name: str) -> Callable[..., FrameDataset]:
    """The data set class of that name.

    Raises:
        ValueError: unknown name.

    Example:
        >>> len(get_dataset("rooms")("validation"))
        56
    """
    if name not in DATASETS:
        raise ValueError(f"Unknown data set {name!r}; known are: {', '.join(DATASETS)}.")
    return DATASETS[name]


__all__ = [
    "DATASETS",
    "ROOMS_CLASSES",
    "AugmentedDataset",
    "BadSampleError",
    "EvalTransform",
    "FrameDataset",
    "MultitaskCollator",
    "RoomsDataset",
    "StepSampler",
    "TrainTransform",
    "get_dataset",
]
