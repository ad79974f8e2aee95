"""Virtual KITTI 2: five rendered driving videos, each in ten variations of weather, light and direction, in stereo.

    SceneXX/VARIATION/frames/rgb/Camera_{0,1}/rgb_NNNNN.jpg                          8-bit RGB, 1242 x 375
    SceneXX/VARIATION/frames/depth/Camera_{0,1}/depth_NNNNN.png                      16-bit grey
    SceneXX/VARIATION/frames/classSegmentation/Camera_{0,1}/classgt_NNNNN.png        8-bit RGB, colours of classes
    SceneXX/VARIATION/intrinsic.txt     `frame cameraID K[0,0] K[1,1] K[0,2] K[1,2]`; read for derived normals only
    SceneXX/VARIATION/colors.txt        `Category r g b`; the same everywhere, and not read

Unpack the archives vkitti_2.0.3_{rgb,depth,classSegmentation}.tar and vkitti_2.0.3_textgt.tar.gz into one folder.

Splits: the set has none. DenseMTL takes Camera_0 of the variation 15-deg-left and splits it at random, 80 to 20: then
neighbouring frames of one video are in both splits, and results look better than they are. Ours: Scene02 (233 of
2,126 frames of each variation: a road into a town and a busy crossing) is validation, the others train;
`validation_scenes` changes it. For domain adaptation DenseMTL trains on all scenes of that variation:
`variations=("15-deg-left",), validation_scenes=()`.

Units. A depth code is centimetres of planar z. The far plane is 655.35 m: 65535 is sky and has no label. The principal
point (620.5, 187) counts from the middle of the first pixel, so half a pixel lies between it and our corner.

Quirks. The set's page writes "classsegmentation"; the archive has "classSegmentation". Black pixels are "Undefined"
and have no label. Not verified: a depth of 0, which is taken for no label, does not seem to occur.

Sources: the text of https://europe.naverlabs.com/research/computer-vision/proxy-virtual-worlds-vkitti-2 as repeated by
users of the set (folders, file names, depth, colours, number of frames), and dataset/vkitti2.py and
dataset/semseg/{labels,mappings}.py of https://github.com/astra-vision/DenseMTL (folders, camera, split, 8 classes).
Licence: CC BY-NC-SA 3.0, by the README of Virtual KITTI 1.3.1; that of version 2 could not be read: see its page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
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
    grey_16_bit,
    metres,
    read_file,
    read_picture,
)

SCENES = ("Scene01", "Scene02", "Scene06", "Scene18", "Scene20")
VARIATIONS = (
    "15-deg-left",
    "15-deg-right",
    "30-deg-left",
    "30-deg-right",
    "clone",
    "fog",
    "morning",
    "overcast",
    "rain",
    "sunset",
)
CAMERAS = (0, 1)

# In the order of colors.txt, where an id is the place in it.
COLORS: dict[str, tuple[int, int, int]] = {
    "Terrain": (210, 0, 200),
    "Sky": (90, 200, 255),
    "Tree": (0, 199, 0),
    "Vegetation": (90, 240, 0),
    "Building": (140, 140, 140),
    "Road": (100, 60, 100),
    "GuardRail": (250, 100, 255),
    "TrafficSign": (255, 255, 0),
    "TrafficLight": (200, 200, 0),
    "Pole": (255, 130, 0),
    "Misc": (80, 80, 80),
    "Truck": (160, 60, 60),
    "Car": (255, 127, 80),
    "Van": (0, 139, 139),
    "Undefined": (0, 0, 0),
}
ID_OF = {name: place for place, name in enumerate(COLORS)}
# The classes shared with Cityscapes, as named there. Source: `cls08` in dataset/semseg/mappings.py of DenseMTL.
SHARED_WITH_CITYSCAPES: dict[str, tuple[int, ...]] = {
    "road": (ID_OF["Road"],),
    "building": (ID_OF["Building"],),
    "pole": (ID_OF["Pole"],),
    "traffic light": (ID_OF["TrafficLight"],),
    "traffic sign": (ID_OF["TrafficSign"],),
    "vegetation": (ID_OF["Tree"], ID_OF["Vegetation"]),
    "sky": (ID_OF["Sky"],),
    "vehicle": (ID_OF["Truck"], ID_OF["Car"], ID_OF["Van"]),
}
assert tuple(SHARED_WITH_CITYSCAPES) == tuple(CLASS_SETS[8])
OWN_CLASSES: dict[str, tuple[int, ...]] = {name: (place,) for name, place in ID_OF.items() if name != "Undefined"}
VKITTI2_CLASS_SETS: dict[int, dict[str, tuple[int, ...]]] = {8: SHARED_WITH_CITYSCAPES, 14: OWN_CLASSES}

COLORS_8_BIT = PictureRule(("RGB",), "an 8-bit RGB PNG of the colours of classes")
DEPTH_16_BIT = grey_16_bit("centimetres")
CENTIMETRE = 1 / 100
NO_DEPTH = (0, 65535)


class VirtualKitti2Dataset(FolderDataset):
    """Frames of Virtual KITTI 2 with `semseg` and `depth`; "normals" and "edges" can be derived.

    Args:
        split: "train" or "validation"; the set has no official ones, see above.
        data_dir: the folder with `Scene01` to `Scene20`; without `frames/depth` or `frames/classSegmentation` in them,
            frames lack that label.
        derive: see `FolderDataset`; edges are borders of all 14 classes, and steps in depth.
        num_classes: 8 (those shared with Cityscapes) or 14 (all of its own).
        variations: which of the ten.
        cameras: 0 (left), 1 (right) or both.
        validation_scenes: the scenes of "validation"; all others are "train".

    Raises:
        ValueError: see `FolderDataset`; for an unknown number of classes, variation, camera or scene.
    """

    labels: Mapping[str, tuple[str, ...] | None] = {"semseg": tuple(SHARED_WITH_CITYSCAPES), "depth": None}
    set_name = "vkitti2"
    summary = (
        "Virtual KITTI 2 (rendered driving videos), from "
        "https://europe.naverlabs.com/research/computer-vision/proxy-virtual-worlds-vkitti-2. "
        "Licence: for non-commercial use only (CC BY-NC-SA 3.0 for its first version)"
    )
    layout: ClassVar[str] = (
        "SceneXX/VARIATION/frames/rgb/Camera_0/rgb_*.jpg, .../depth/Camera_0/depth_*.png and "
        ".../classSegmentation/Camera_0/classgt_*.png"
    )
    derivable: ClassVar[tuple[str, ...]] = ("normals", "edges")
    depth_unit = CENTIMETRE

    def __init__(
        self,
        split: str,
        data_dir: str | Path | None,
        derive: Sequence[str] = (),
        num_classes: int = 8,
        variations: Sequence[str] = VARIATIONS,
        cameras: Sequence[int] = (0,),
        validation_scenes: Sequence[str] = ("Scene02",),
    ) -> None:
        chosen: list[tuple[str, Sequence[int | str], Sequence[int | str]]] = [
            ("num_classes", [num_classes], list(VKITTI2_CLASS_SETS)),
            ("variations", variations, VARIATIONS),
            ("cameras", cameras, CAMERAS),
            ("validation_scenes", validation_scenes, SCENES),
        ]
        for option, values, known in chosen:
            unknown = [value for value in values if value not in known]
            if unknown:
                raise ValueError(f"{option} names {unknown}; Virtual KITTI 2 has {list(known)}")
        self.variations, self.cameras, self.validation_scenes = variations, cameras, validation_scenes
        classes = VKITTI2_CLASS_SETS[num_classes]
        self.labels = {**self.labels, "semseg": tuple(classes)}
        self._ids = class_table(classes, ID_OF.values())
        super().__init__(split, data_dir, derive)

    def _find_frames(self) -> list[str]:
        frames = []
        for folder in self._variation_folders():
            for camera in self.cameras:
                pictures = (folder / "frames" / "rgb" / f"Camera_{camera}").glob("rgb_*.jpg")
                numbers = sorted(path.stem.removeprefix("rgb_") for path in pictures)
                frames += [f"{folder.parent.name}/{folder.name}/Camera_{camera}/{number}" for number in numbers]
        return frames

    def _variation_folders(self) -> list[Path]:
        is_validation = self.split == "validation"
        scenes = [scene for scene in SCENES if (scene in self.validation_scenes) == is_validation]
        return [self.root / scene / variation for scene in scenes for variation in self.variations]

    def _label_folders(self) -> dict[str, Path]:
        folders = {}
        for label, kind in (("semseg", "classSegmentation"), ("depth", "depth")):
            # Of one variation that has it: the others must have it, too.
            candidates = [folder / "frames" / kind for folder in self._variation_folders()]
            folders[label] = next((folder for folder in candidates if folder.is_dir()), candidates[0])
        return folders

    def _path(self, frame: str, kind: str, name: str) -> Path:
        scene, variation, camera, number = frame.split("/")
        return self.root / scene / variation / "frames" / kind / camera / name.format(number)

    def _image_path(self, frame: str) -> Path:
        return self._path(frame, "rgb", "rgb_{}.jpg")

    def _stored_label(self, frame: str, label: str) -> StoredLabel:
        if label == "semseg":
            path = self._path(frame, "classSegmentation", "classgt_{}.png")
            return StoredLabel(self._color_ids(path), partial(class_ids, table=self._ids, name=repr(str(path))))
        codes = read_picture(self._path(frame, "depth", "depth_{}.png"), DEPTH_16_BIT)
        return StoredLabel(codes, partial(metres, metres_per_code=CENTIMETRE, no_label=NO_DEPTH))

    def _regions(self, frame: str) -> Tensor:
        ids = self._color_ids(self._path(frame, "classSegmentation", "classgt_{}.png"))
        return torch.from_numpy(np.where(ids == ID_OF["Undefined"], SEMSEG_NO_LABEL, ids))

    def _color_ids(self, path: Path) -> np.ndarray:
        """The places of a picture's colours in `COLORS`, int64 (H,W)."""
        known = _numbers(np.array(list(COLORS.values())))
        order = np.argsort(known)
        numbers = _numbers(read_picture(path, COLORS_8_BIT))
        ids = order[np.searchsorted(known, numbers, sorter=order).clip(max=len(known) - 1)]
        is_known = known[ids] == numbers
        if not is_known.all():
            number = int(numbers[~is_known][0])
            raise BadSampleError(
                f"{str(path)!r}: holds the colour {(number >> 16, number >> 8 & 255, number & 255)}, which is of no "
                f"class; they are {COLORS}."
            )
        return ids

    def _intrinsics(self, frame: str, height: int, width: int) -> Intrinsics:
        scene, variation, camera, number = frame.split("/")
        path = self.root / scene / variation / "intrinsic.txt"
        key = [str(int(number)), camera.removeprefix("Camera_")]
        for line in read_file(path).decode(errors="replace").splitlines():
            words = line.split()
            if words[:2] == key:
                break
        else:
            raise BadSampleError(f"{str(path)!r}: has no line for frame {key[0]}, camera {key[1]}.")
        try:
            focal_x, focal_y, column, row = map(float, words[2:])
        except ValueError as error:
            raise BadSampleError(
                f"{str(path)!r}: the line {line!r} must be frame, camera, K[0,0], K[1,1], K[0,2], K[1,2]."
            ) from error
        return Intrinsics(focal_x, focal_y, column + 0.5, row + 0.5)


def _numbers(colors: np.ndarray) -> np.ndarray:
    """One number for each colour (..., 3)."""
    return colors.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
