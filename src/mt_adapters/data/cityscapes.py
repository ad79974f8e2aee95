"""Cityscapes: street scenes with fine class labels, and depth from stereo.

    leftImg8bit/{train,val}/CITY/CITY_SEQUENCE_FRAME_leftImg8bit.png     8-bit RGB, 2048 x 1024
    gtFine/{train,val}/CITY/..._gtFine_labelIds.png                      8-bit grey, ids 0 to 33
    gtFine/{train,val}/CITY/..._gtFine_instanceIds.png                   16-bit grey, read for derived edges only
    disparity/{train,val}/CITY/..._disparity.png                         16-bit grey
    camera/{train,val}/CITY/..._camera.json                              needed for depth

Splits: "train" is the official train (2,975 frames), "validation" the official val (500). The test labels are secret.

Units. A disparity code p > 0 is (p - 1) / 256 pixels, p = 0 no measurement; planar depth is
`extrinsic.baseline` [m] * `intrinsic.fx` [pixels] / disparity. The origin of (u0, v0) is the top left pixel itself, so
half a pixel lies between it and our corner of the image.

Quirks. Disparities are measured by stereo matching: they have holes, and normals derived from them are rough. Depth
makes no derived edges, as its noise far away exceeds the step of an edge. A disparity near 0 would be kilometres:
below `MIN_DISPARITY` there is no depth. Licence plates have the id -1 in the table and are not drawn, so no picture
holds it.

Not verified: that the car itself, at the bottom of each picture, has sound disparities (they are kept), and that the
7 classes are to the last id those of MTAN (https://arxiv.org/abs/1803.10704). DenseMTL's `cls07` has fewer ids.

Sources: README.md (layout, disparity, splits), helpers/labels.py (ids, names, categories), docs/csCalibration.pdf
(camera), preparation/json2labelImg.py and json2instanceImg.py (bit depths, instances) of
https://github.com/mcordts/cityscapesScripts. The json keys were seen in published copies of camera files.
Licence: the set's own: not for commercial use, no redistribution (https://www.cityscapes-dataset.com/license).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mt_adapters.data.derived import Intrinsics
from mt_adapters.data.frames import FolderDataset
from mt_adapters.data.pictures import (
    IDS_8_BIT,
    SEMSEG_NO_LABEL,
    BadSampleError,
    StoredLabel,
    class_ids,
    grey_16_bit,
    id_table,
    read_file,
    read_picture,
)

# Class name -> ids in the pictures, in the order of the train ids. Source: helpers/labels.py, columns id and trainId.
TRAIN_CLASSES: dict[str, tuple[int, ...]] = {
    "road": (7,),
    "sidewalk": (8,),
    "building": (11,),
    "wall": (12,),
    "fence": (13,),
    "pole": (17,),
    "traffic light": (19,),
    "traffic sign": (20,),
    "vegetation": (21,),
    "terrain": (22,),
    "sky": (23,),
    "person": (24,),
    "rider": (25,),
    "car": (26,),
    "truck": (27,),
    "bus": (28,),
    "train": (31,),
    "motorcycle": (32,),
    "bicycle": (33,),
}
# The classes that Synthia has too. Source: `cls16` in dataset/semseg/mappings.py of
# https://github.com/astra-vision/DenseMTL (WACV 2023), the same in https://github.com/susaha/ctrl-uda (CVPR 2021).
NOT_IN_SYNTHIA = ("terrain", "truck", "train")
# The classes shared with Virtual KITTI 2. Source: `cls08` in the same file of DenseMTL.
# As there, trucks have no label.
SHARED_WITH_VKITTI2: dict[str, tuple[int, ...]] = {
    "road": (7,),
    "building": (11,),
    "pole": (17,),
    "traffic light": (19,),
    "traffic sign": (20,),
    "vegetation": (21,),
    "sky": (23,),
    "vehicle": (26, 28),
}
# The categories of helpers/labels.py. Source of what counts: ctrl/dataset/cityscapes_list/info7class.json of ctrl-uda.
CATEGORIES: dict[str, tuple[int, ...]] = {
    "flat": (7, 8),
    "construction": (11, 12, 13),
    "object": (17, 19, 20),
    "nature": (21, 22),
    "sky": (23,),
    "human": (24, 25),
    "vehicle": (26, 27, 28, 29, 30, 31, 32, 33),
}
CLASS_SETS: dict[int, dict[str, tuple[int, ...]]] = {
    19: TRAIN_CLASSES,
    16: {name: ids for name, ids in TRAIN_CLASSES.items() if name not in NOT_IN_SYNTHIA},
    8: SHARED_WITH_VKITTI2,
    7: CATEGORIES,
}
ALL_IDS = range(34)
VOID_IDS = range(7)
# instanceIds: where instances are told apart (person 24 to bicycle 33), 1000 * id + number, else the id.
INSTANCES_PER_ID = 1000
INSTANCE_IDS = range(24 * INSTANCES_PER_ID, 34 * INSTANCES_PER_ID)

DISPARITY_16_BIT = grey_16_bit("disparities, 256 * pixels + 1")
INSTANCES_16_BIT = grey_16_bit("instance ids")
DISPARITIES_PER_PIXEL = 256
# Ours: a pixel, about 480 m. What is farther away is noise of the matching.
MIN_DISPARITY = 1.0


class CityscapesDataset(FolderDataset):
    """Frames of Cityscapes with `semseg` and `depth`; "normals" and "edges" (of instances) can be derived.

    Args:
        split: "train" or "validation".
        data_dir: the folder with `leftImg8bit`, `gtFine`, `disparity` and `camera`; without `gtFine` or `disparity`,
            frames have no `semseg` or `depth`.
        derive: see `FolderDataset`.
        num_classes: 19 (train ids), 16 (those of Synthia), 8 (those of Virtual KITTI 2) or 7 (categories).

    Raises:
        ValueError: see `FolderDataset`; for another number of classes.
    """

    labels: Mapping[str, tuple[str, ...] | None] = {"semseg": tuple(TRAIN_CLASSES), "depth": None}
    set_name = "cityscapes"
    summary = (
        "Cityscapes (fine labels, depth from stereo), from https://www.cityscapes-dataset.com after registration. "
        "Licence: its own, for non-commercial use only, without redistribution"
    )
    layout: ClassVar[str] = (
        "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png, gtFine/.../*_gtFine_labelIds.png, "
        "disparity/.../*_disparity.png and camera/.../*_camera.json"
    )
    derivable: ClassVar[tuple[str, ...]] = ("normals", "edges")
    derived_from: ClassVar[Mapping[str, tuple[str, ...]]] = {"normals": ("depth",), "edges": ("semseg",)}
    # Up to 655 m, and finer than the measurement.
    depth_unit = 1 / 100

    def __init__(
        self, split: str, data_dir: str | Path | None, derive: Sequence[str] = (), num_classes: int = 19
    ) -> None:
        if num_classes not in CLASS_SETS:
            raise ValueError(f"num_classes is {num_classes}; Cityscapes has sets of {sorted(CLASS_SETS)} classes")
        classes = CLASS_SETS[num_classes]
        self.labels = {**self.labels, "semseg": tuple(classes)}
        self._ids = class_table(classes, ALL_IDS)
        super().__init__(split, data_dir, derive)

    def _find_frames(self) -> list[str]:
        ending = "_leftImg8bit.png"
        pictures = (self.root / "leftImg8bit" / self._folder).glob(f"*/[!.]*{ending}")
        return sorted(path.name.removesuffix(ending) for path in pictures)

    @property
    def _folder(self) -> str:
        return {"train": "train", "validation": "val"}[self.split]

    def _label_folders(self) -> dict[str, Path]:
        return {"semseg": self.root / "gtFine", "depth": self.root / "disparity"}

    def _path(self, kind: str, frame: str, ending: str) -> Path:
        return self.root / kind / self._folder / frame.split("_")[0] / f"{frame}_{ending}"

    def _image_path(self, frame: str) -> Path:
        return self._path("leftImg8bit", frame, "leftImg8bit.png")

    def _stored_label(self, frame: str, label: str) -> StoredLabel | Tensor:
        if label == "semseg":
            path = self._path("gtFine", frame, "gtFine_labelIds.png")
            return StoredLabel(
                read_picture(path, IDS_8_BIT), partial(class_ids, table=self._ids, name=repr(str(path)))
            )
        codes = read_picture(self._path("disparity", frame, "disparity.png"), DISPARITY_16_BIT).astype(np.float32)
        camera = self._camera(frame)
        disparity = (codes - 1) / DISPARITIES_PER_PIXEL
        is_near = disparity >= MIN_DISPARITY
        depth = np.zeros_like(disparity)
        np.divide(camera["baseline"] * camera["fx"], disparity, out=depth, where=is_near)
        return torch.from_numpy(depth)

    def _regions(self, frame: str) -> Tensor:
        path = self._path("gtFine", frame, "gtFine_instanceIds.png")
        ids = read_picture(path, INSTANCES_16_BIT).astype(np.int64)
        is_known = (ids < ALL_IDS.stop) | ((ids >= INSTANCE_IDS.start) & (ids < INSTANCE_IDS.stop))
        if not is_known.all():
            raise BadSampleError(
                f"{str(path)!r}: holds instance id {ids[~is_known][0]}; ids are 0 to {ALL_IDS.stop - 1} and "
                f"{INSTANCE_IDS.start} to {INSTANCE_IDS.stop - 1}."
            )
        return torch.from_numpy(np.where(ids < VOID_IDS.stop, SEMSEG_NO_LABEL, ids))

    def _intrinsics(self, frame: str, height: int, width: int) -> Intrinsics:
        camera = self._camera(frame)
        return Intrinsics(camera["fx"], camera["fy"], camera["u0"] + 0.5, camera["v0"] + 0.5)

    def _camera(self, frame: str) -> dict[str, float]:
        path = self._path("camera", frame, "camera.json")
        try:
            stored: Any = json.loads(read_file(path))
            camera = {name: float(stored["intrinsic"][name]) for name in ("fx", "fy", "u0", "v0")}
            camera["baseline"] = float(stored["extrinsic"]["baseline"])
        except BadSampleError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise BadSampleError(
                f"{str(path)!r}: is no camera file ({error!r}); it must be JSON with extrinsic.baseline in metres and "
                "intrinsic.fx, fy, u0, v0 in pixels."
            ) from error
        if not min(camera["baseline"], camera["fx"], camera["fy"]) > 0:
            raise BadSampleError(f"{str(path)!r}: baseline, fx and fy must be positive, but it holds {camera}.")
        return camera


def class_table(classes: Mapping[str, tuple[int, ...]], codes: Iterable[int]) -> np.ndarray:
    """A table for `class_ids`: codes of a class to its place among the classes, all other codes to no label."""
    ids = {code: place for place, name in enumerate(classes) for code in classes[name]}
    return id_table(ids, no_label=[code for code in codes if code not in ids])
