"""Synthia: SYNTHIA-RAND-CITYSCAPES, rendered street scenes with the classes of Cityscapes.

    RGB/NNNNNNN.png              8-bit RGB, 1280 x 760, 9,400 frames from 0000000
    GT/LABELS/NNNNNNN.png        16-bit RGB: class id, instance id, nothing
    Depth/Depth/NNNNNNN.png      16-bit RGB: depth in centimetres, three times; also read from Depth/NNNNNNN.png

Splits: the set has none. Work on domain adaptation trains on all frames (`train_on_all=True`); DenseMTL, supervised,
splits them at random, 80 to 20. Ours: every fifth frame, those of number 4 modulo 5, is validation, the others train.
The frames are single views, no video.

Units. Depth code / 100 is metres, taken for planar z as all users of the set do; the README does not say. 65535, the
end of the range, has no label, nor has 0.

Quirks. Pillow keeps the upper 8 of the 16 bits only, so that all class ids read as 0. `read_rgb_16_bit` has it decode
the file a second time for the lower 8: no other dependency, and the speed of its C code. Of the 23 ids, parking-slot,
terrain, truck and train do not occur (https://github.com/m-birke/automotive-segmentation-datasets). Files that others
publish with 8-bit ids ("parsed_LABELS") are not read.

Not verified: that the sky is 65535, and the focal length for derived normals. The latter is that of Synthia's video
sequences, which have the same size; DenseMTL uses it for this set.

Sources: README.txt of the archive (folders, sizes, channels, ids, unit); dataset/synthia.py of
https://github.com/astra-vision/DenseMTL and dataloaders/synthia/dataset_synthia.py of
https://github.com/BenBausch/Depth-Semantic-UDA (file names, Depth/Depth, 16 bits in each channel, camera).
Get it from https://synthia-dataset.net/downloads. Licence: CC BY-NC-SA 3.0 (by the list of m-birke, above).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mt_adapters.data.cityscapes import CLASS_SETS, class_table
from mt_adapters.data.derived import Intrinsics
from mt_adapters.data.frames import FolderDataset
from mt_adapters.data.pictures import (
    SEMSEG_NO_LABEL,
    BadSampleError,
    PictureRule,
    StoredLabel,
    class_ids,
    decode_picture,
    metres,
    read_file,
)

# Names and order of Cityscapes' 16, so that one head serves both sets. Source of the ids: README.txt; of what matches
# what: `cls16` in dataset/semseg/mappings.py of DenseMTL, and ctrl/dataset/synthia.py of ctrl-uda.
CLASSES: dict[str, tuple[int, ...]] = {
    "road": (3,),
    "sidewalk": (4,),
    "building": (2,),
    "wall": (21,),
    "fence": (5,),
    "pole": (7,),
    "traffic light": (15,),
    "traffic sign": (9,),
    "vegetation": (6,),
    "sky": (1,),
    "person": (10,),
    "rider": (17,),
    "car": (8,),
    "bus": (19,),
    "motorcycle": (12,),
    "bicycle": (11,),
}
assert tuple(CLASSES) == tuple(CLASS_SETS[16])
# The others, without a label: void 0, parking-slot 13, road-work 14, terrain 16, truck 18, train 20, lanemarking 22.
ALL_IDS = range(23)
VOID_ID = 0
IDS = class_table(CLASSES, ALL_IDS)

CENTIMETRE = 1 / 100
NO_DEPTH = (0, 65535)
# Pixels, of a picture 1280 wide with its principal point in the middle.
FOCAL_LENGTH, FOCAL_WIDTH = 532.740352, 1280
FRAMES_PER_VALIDATION_FRAME = 5
# Keeps the instances of a class apart from all other ids.
IDS_PER_INSTANCE = 1000
# Where the header of a PNG says how many bits a channel has.
PNG_BIT_DEPTH = 24


class SynthiaDataset(FolderDataset):
    """Frames of SYNTHIA-RAND-CITYSCAPES with `semseg` (16 classes) and `depth`; "normals" and "edges" can be derived.

    Args:
        split: "train" or "validation"; the set has no official ones, see above.
        data_dir: the folder with `RGB`, `GT/LABELS` and `Depth`; without one of the last two, frames lack its label.
        derive: see `FolderDataset`; edges are borders of classes and instances, and steps in depth.
        train_on_all: "train" holds all frames, those of "validation" too.

    Raises:
        ValueError: see `FolderDataset`.
    """

    labels: Mapping[str, tuple[str, ...] | None] = {"semseg": tuple(CLASSES), "depth": None}
    set_name = "synthia"
    summary = (
        "Synthia (SYNTHIA-RAND-CITYSCAPES: 9,400 rendered street scenes), from https://synthia-dataset.net. "
        "Licence: CC BY-NC-SA 3.0"
    )
    layout: ClassVar[str] = "RGB/*.png, GT/LABELS/*.png and Depth/Depth/*.png (the folder RAND_CITYSCAPES)"
    derivable: ClassVar[tuple[str, ...]] = ("normals", "edges")
    depth_unit = CENTIMETRE

    def __init__(
        self, split: str, data_dir: str | Path | None, derive: Sequence[str] = (), train_on_all: bool = False
    ) -> None:
        self.train_on_all = train_on_all
        super().__init__(split, data_dir, derive)

    def _find_frames(self) -> list[str]:
        frames = sorted(path.stem for path in (self.root / "RGB").glob("[0-9]*.png"))
        if self.split == "train" and self.train_on_all:
            return frames
        return [frame for frame in frames if is_validation_frame(frame) == (self.split == "validation")]

    def _label_folders(self) -> dict[str, Path]:
        return {"semseg": self.root / "GT" / "LABELS", "depth": self._depth_folder}

    @property
    def _depth_folder(self) -> Path:
        folder = self.root / "Depth"
        return folder / "Depth" if (folder / "Depth").is_dir() else folder

    def _image_path(self, frame: str) -> Path:
        return self.root / "RGB" / f"{frame}.png"

    def _label_path(self, frame: str) -> Path:
        return self.root / "GT" / "LABELS" / f"{frame}.png"

    def _stored_label(self, frame: str, label: str) -> StoredLabel:
        if label == "semseg":
            path = self._label_path(frame)
            ids = read_rgb_16_bit(path, "class and instance ids")[..., 0]
            return StoredLabel(ids, partial(class_ids, table=IDS, name=repr(str(path))))
        codes = read_rgb_16_bit(self._depth_folder / f"{frame}.png", "centimetres")[..., 0]
        return StoredLabel(codes, partial(metres, metres_per_code=CENTIMETRE, no_label=NO_DEPTH))

    def _regions(self, frame: str) -> Tensor:
        codes = read_rgb_16_bit(self._label_path(frame), "class and instance ids").astype(np.int64)
        regions = codes[..., 0] + IDS_PER_INSTANCE * codes[..., 1]
        return torch.from_numpy(np.where(codes[..., 0] == VOID_ID, SEMSEG_NO_LABEL, regions))

    def _intrinsics(self, frame: str, height: int, width: int) -> Intrinsics:
        focal = FOCAL_LENGTH * width / FOCAL_WIDTH
        return Intrinsics(focal, focal, width / 2, height / 2)


def is_validation_frame(frame: str) -> bool:
    return int(frame) % FRAMES_PER_VALIDATION_FRAME == FRAMES_PER_VALIDATION_FRAME - 1


def read_rgb_16_bit(path: Path, content: str) -> np.ndarray:
    """The picture of a PNG of three times 16 bits as an array (H,W,3) uint16.

    Raises:
        BadSampleError: if the file is missing, damaged or stored in another way.
    """
    stored, name = read_file(path), repr(str(path))
    rule = PictureRule(("RGB",), f"a 16-bit RGB PNG of {content}")
    high = decode_picture(stored, rule, name)
    if stored[PNG_BIT_DEPTH] != 16:
        raise BadSampleError(f"{name}: has {stored[PNG_BIT_DEPTH]} bits in a channel, but must be {rule.words}.")
    with Image.open(io.BytesIO(stored)) as picture:
        # PNG is big-endian; read as if it were little-endian, the upper bytes are its lower ones.
        picture.tile = [tile._replace(args="RGB;16L") for tile in picture.tile]
        low = np.array(picture)
    return (high.astype(np.uint16) << 8) | low
