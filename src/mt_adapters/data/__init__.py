"""Data sets, joint transforms, batches and the order of the samples."""

from .collate import MultitaskCollator
from .frames import FrameDataset
from .pictures import BadSampleError
from .prepared import PreparedDataset
from .rooms import ROOMS_CLASSES, RoomsDataset
from .sampling import AugmentedDataset, StepSampler
from .sources import Mixture, Source, open_sources
from .table import DATASETS, get_dataset
from .transforms import EvalTransform, TrainTransform

__all__ = [
    "DATASETS",
    "ROOMS_CLASSES",
    "AugmentedDataset",
    "BadSampleError",
    "EvalTransform",
    "FrameDataset",
    "Mixture",
    "MultitaskCollator",
    "PreparedDataset",
    "RoomsDataset",
    "Source",
    "StepSampler",
    "TrainTransform",
    "get_dataset",
    "open_sources",
]
