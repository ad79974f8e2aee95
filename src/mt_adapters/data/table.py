"""The data sets that recipes can name."""

from collections.abc import Callable

from mt_adapters.data.cityscapes import CityscapesDataset
from mt_adapters.data.frames import FrameDataset
from mt_adapters.data.nyuv2 import NyuV2Dataset
from mt_adapters.data.omnidata import OmnidataDataset
from mt_adapters.data.pascal_context import PascalContextDataset
from mt_adapters.data.prepared import PreparedDataset
from mt_adapters.data.rooms import RoomsDataset
from mt_adapters.data.synthia import SynthiaDataset
from mt_adapters.data.taskonomy import TaskonomyDataset
from mt_adapters.data.vkitti2 import VirtualKitti2Dataset

# Each is called with (split, data_dir, **options).
DATASETS: dict[str, Callable[..., FrameDataset]] = {
    "cityscapes": CityscapesDataset,
    "nyuv2": NyuV2Dataset,
    "omnidata": OmnidataDataset,
    "pascal_context": PascalContextDataset,
    "prepared": PreparedDataset,
    "rooms": RoomsDataset,
    "synthia": SynthiaDataset,
    "taskonomy": TaskonomyDataset,
    "vkitti2": VirtualKitti2Dataset,
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
