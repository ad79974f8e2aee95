"""NYU Depth V2: 1,449 Kinect frames of rooms, densely labelled, as the authors' single file or as folders of pictures.

The authors' file, which has classes, instances and depth; "normals" and "edges" can be derived:

    nyu_depth_v2_labeled.mat     MATLAB 7.3, so HDF5, whose axes are MATLAB's in reverse order: images (N,3,W,H) uint8,
                                 depths and rawDepths (N,W,H) float32, labels (N,W,H) uint16, instances (N,W,H) uint8
    splits.mat                   trainNdxs (795) and testNdxs (654), counted from 1
    classMapping40.mat           mapClass: for each of 894 names, counted from 1, one of 40 classes, counted from 1

Folders as multitask papers use them (ASTMT; MTI-Net; ATRC, InvPT), which have all labels:

    images/NAME.jpg or .png            8-bit RGB, 560 x 425: the inner part of the frames
    segmentation/NAME.png or .mat      8-bit grey, or `segmentation`: 0 no label, 1 to 40 classes
    depth/NAME.npy or .mat             float (H,W), or `depth`: metres
    normals/NAME.npy, .png or .jpg     float (H,W,3), or 8-bit RGB of n * 0.5 + 0.5
    edge/NAME.npy or .png              float (H,W) in [0,1], or 8-bit grey, 255 being an edge
    gt_sets/train.txt, val.txt         a NAME a line

Splits: "train" is the official train (795 frames), "validation" the official test (654).

Units. Depth is metres of planar z, 0 being no measurement. In `depths` holes are filled by colorization; `rawDepths`
has them (`raw_depth=True`). Normals are stored with x LEFT, y up, z towards the camera, zeros being no label. ASTMT's
own figure shows it (doc/qual.png: on each face red is 170 to 190 at the left edge and 105 to 120 at the right one),
its rotation of normals fits no other x, and of the 40 mean directions that ATRC ships (nyu_centroids.npy) none points
away from the camera and most that are upright point up (floors).

Quirks. Label 0 is "unlabelled", so ids are shifted by one. The full frames have a white border where no depth was
projected; outside the authors' region (rows 45 to 471, columns 41 to 601, counted from 1) `depths` is invented, and
has no label here. The folders hold rows 46 to 470, columns 41 to 600 (Gupta et al.). Where there are several endings,
all frames are taken to be stored as the first one is. Normals as JPEG are not of unit length: they are made so, and
what is shorter than half is no label.

Not verified on true files: bit depths and value ranges in the folders (only what their readers do with them), that the
normals of NYU and of PASCAL, which the figure shows, have the same axes (one reader and one augmentation serve both),
and the licence: the set's page could not be read.

Sources: https://cs.nyu.edu/~silberman/datasets/nyu_depth_v2.html as repeated by users (variables, 0 = unlabelled,
metres); camera_params.m, rgb_plane2rgb_world.m and get_projection_mask.m of the authors' toolbox (camera, pixels
counted from 1, border); splits.mat, classMapping40.mat and class13Mapping.mat of
https://github.com/ankurhanda/nyuv2-meta-data; fblib/dataloaders/nyud.py and custom_transforms.py of
https://github.com/facebookresearch/astmt; data/nyud.py of
https://github.com/SimonVandenhende/Multi-Task-Learning-PyTorch, of https://github.com/brdav/atrc and of
https://github.com/prismformore/Multi-Task-Transformer (folders). 40 classes: Gupta et al., CVPR 2013; 13: Couprie et
al., ICLR 2013.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mt_adapters.data.arrays import Hdf5File, class_codes, depth_map, edge_map, normal_map, read_array
from mt_adapters.data.derived import Intrinsics
from mt_adapters.data.frames import FolderDataset
from mt_adapters.data.pictures import (
    IDS_8_BIT,
    RGB,
    SEMSEG_NO_LABEL,
    PictureRule,
    StoredLabel,
    class_ids,
    encode_png,
    id_table,
    read_picture,
)

# Source: className in classMapping40.mat.
NYU40_CLASSES: tuple[str, ...] = tuple(
    "wall|floor|cabinet|bed|chair|sofa|table|door|window|bookshelf|picture|counter|blinds|desk|shelves|curtain|dresser|"
    "pillow|mirror|floor mat|clothes|ceiling|books|refrigerator|television|paper|towel|shower curtain|box|whiteboard|"
    "person|night stand|toilet|sink|lamp|bathtub|bag|other structure|other furniture|other prop".split("|")
)
# Source: classMapping13 in class13Mapping.mat, classNames and labels13 (which counts from 1).
NYU13_CLASSES: tuple[str, ...] = tuple(
    "bed|books|ceiling|chair|floor|furniture|objects|picture|sofa|table|tv|wall|window".split("|")
)
NYU13_OF_40 = [12, 5, 6, 1, 4, 9, 10, 12, 13, 6, 8, 6, 13, 10, 6, 13, 6, 7, 7, 5]
NYU13_OF_40 += [7, 3, 2, 6, 11, 7, 7, 7, 7, 7, 7, 6, 7, 7, 7, 7, 7, 7, 6, 7]
# Number of classes -> their names, and the class (from 0) of each of the 40.
CLASS_SETS: dict[int, tuple[tuple[str, ...], tuple[int, ...]]] = {
    40: (NYU40_CLASSES, tuple(range(40))),
    13: (NYU13_CLASSES, tuple(place - 1 for place in NYU13_OF_40)),
}
NUM_NAMES, NUM_FRAMES = 894, 1449
UNLABELLED = 0

MAT_FILE = "nyu_depth_v2_labeled.mat"
# Split -> its variable in splits.mat, and its file in gt_sets.
SPLIT_NAMES = {"train": ("trainNdxs", "train.txt"), "validation": ("testNdxs", "val.txt")}
# Folder -> the endings that its files may have.
ENDINGS: dict[str, tuple[str, ...]] = {
    "images": (".jpg", ".png"),
    "segmentation": (".png", ".mat"),
    "depth": (".npy", ".mat"),
    "normals": (".npy", ".png", ".jpg"),
    "edge": (".npy", ".png"),
}
LABEL_FOLDERS = {"semseg": "segmentation", "depth": "depth", "normals": "normals", "edges": "edge"}
EDGES_8_BIT = PictureRule(("L",), "an 8-bit grey PNG of edges")
# x left, y up, z towards the camera: see above.
NORMAL_AXES = (-1, 1, 1)

# Source: get_projection_mask.m, here from 0.
FULL_SIZE = (480, 640)
INNER = (slice(44, 471), slice(40, 601))
# Source: camera_params.m (RGB), whose pixels are counted from 1: half a pixel before our corner.
CAMERA = Intrinsics(518.85790117450188, 519.46961112127485, 325.58244941119034 - 0.5, 253.73616633400465 - 0.5)


class NyuV2Dataset(FolderDataset):
    """Frames of NYU Depth V2 with `semseg` and `depth`, and in folders `normals` and `edges`.

    From the authors' file, "normals" (of depth) and "edges" (borders of instances, and steps in depth) can be derived.

    Args:
        split: "train" or "validation".
        data_dir: a folder in one of the forms above; in folders, labels whose folder is not there are left out.
        derive: see `FolderDataset`; only with the authors' file.
        num_classes: 40 or 13.
        raw_depth: the depth as measured, with holes; only with the authors' file.

    Raises:
        ValueError: see `FolderDataset`; for another number of classes, an option of the other form, or a wrong
            splits.mat or classMapping40.mat.
        ImportError: if h5py or scipy is needed and not installed.
    """

    labels: Mapping[str, tuple[str, ...] | None] = {"semseg": NYU40_CLASSES, "depth": None}
    set_name = "nyuv2"
    summary = (
        "NYU Depth V2 (1,449 labelled Kinect frames of rooms), from "
        "https://cs.nyu.edu/~silberman/datasets/nyu_depth_v2.html. Licence: see that page; made for research"
    )
    layout: ClassVar[str] = (
        f"{MAT_FILE}, splits.mat and classMapping40.mat, or with images/, segmentation/, depth/, normals/, edge/ and "
        "gt_sets/{train,val}.txt"
    )
    derivable: ClassVar[tuple[str, ...]] = ("normals", "edges")
    # Up to 16 m (the sensor ends at 10), in steps that floating point holds exactly.
    depth_unit = 1 / 4096

    def __init__(
        self,
        split: str,
        data_dir: str | Path | None,
        derive: Sequence[str] = (),
        num_classes: int = 40,
        raw_depth: bool = False,
    ) -> None:
        if num_classes not in CLASS_SETS:
            raise ValueError(f"num_classes is {num_classes}; NYU Depth V2 has sets of {sorted(CLASS_SETS)} classes")
        path = None if data_dir is None else Path(data_dir) / MAT_FILE
        self._mat = Hdf5File(path) if path is not None and path.is_file() else None
        if path is not None and path.parent.is_dir() and self._mat is None and (derive or raw_depth):
            raise ValueError(
                f"derive and raw_depth are for {MAT_FILE}, which is not in {str(data_dir)!r}: folders of pictures "
                "hold normals, edges and one kind of depth"
            )
        classes, self._of_40 = CLASS_SETS[num_classes]
        self.labels = {"semseg": classes, "depth": None} | ({} if self._mat else {"normals": None, "edges": None})
        self._depths = "rawDepths" if raw_depth else "depths"
        super().__init__(split, data_dir, derive)

    def _find_frames(self) -> list[str]:
        if self._mat:
            of_names = whole_numbers(self.root / "classMapping40.mat", "mapClass", len(NYU40_CLASSES))
            if len(of_names) != NUM_NAMES:
                raise ValueError(f"classMapping40.mat maps {len(of_names)} names; NYU Depth V2 has {NUM_NAMES}")
            self._set_ids(of_names)
            frames = whole_numbers(self.root / "splits.mat", SPLIT_NAMES[self.split][0], NUM_FRAMES)
            return [f"{frame:04d}" for frame in sorted(frames)]
        self._set_ids(range(1, len(NYU40_CLASSES) + 1))
        names = self.root / "gt_sets" / SPLIT_NAMES[self.split][1]
        found = sorted(names.read_text(encoding="utf-8").split()) if names.is_file() else []
        self._endings = {folder: self._ending(folder, found) for folder in ENDINGS}
        return found

    def _ending(self, folder: str, names: list[str]) -> str:
        """The one of the first frame: all are taken to be stored alike."""
        endings = ENDINGS[folder]
        found = [end for end in endings if names and (self.root / folder / f"{names[0]}{end}").is_file()]
        return (found or endings)[0]

    def _set_ids(self, of_codes: Sequence[int]) -> None:
        """For each code from 1, one of the 40 classes, from 1."""
        ids = {code: self._of_40[number - 1] for code, number in enumerate(of_codes, start=1)}
        self._ids = id_table(ids, no_label=[UNLABELLED], size=len(ids) + 1)

    def _path(self, folder: str, frame: str) -> Path:
        return self.root / folder / f"{frame}{self._endings[folder]}"

    def _label_folders(self) -> dict[str, Path]:
        return {} if self._mat else {label: self.root / folder for label, folder in LABEL_FOLDERS.items()}

    def _image_path(self, frame: str) -> Path:
        return self.root / MAT_FILE if self._mat else self._path("images", frame)

    def _image(self, frame: str) -> Image.Image:
        if not self._mat:
            return super()._image(frame)
        return Image.fromarray(np.ascontiguousarray(self._mat_array(frame, "images", np.uint8, 3)))

    def _image_bytes(self, frame: str) -> bytes:
        return encode_png(np.asarray(self._image(frame))) if self._mat else super()._image_bytes(frame)

    def _mat_array(self, frame: str, variable: str, dtype: type[np.generic], num_dims: int = 2) -> np.ndarray:
        """(H,W) or (H,W,3): all axes are turned round."""
        assert self._mat is not None
        return self._mat.read(variable, int(frame) - 1, dtype, num_dims).T

    def _stored_label(self, frame: str, label: str) -> StoredLabel | Tensor:
        if self._mat:
            name = f"{str(self._mat.path)!r}, frame {frame}"
            if label == "semseg":
                codes = self._mat_array(frame, "labels", np.uint16)
                return StoredLabel(codes, partial(class_ids, table=self._ids, name=name))
            depth = depth_map(self._mat_array(frame, self._depths, np.float32), name)
            if depth.shape == FULL_SIZE:
                is_outside = torch.ones(FULL_SIZE, dtype=torch.bool)
                is_outside[INNER] = False
                depth[is_outside] = 0
            return depth
        path = self._path(LABEL_FOLDERS[label], frame)
        name = repr(str(path))
        if label == "semseg":
            is_mat = path.suffix == ".mat"
            codes = class_codes(read_array(path, "segmentation"), name) if is_mat else read_picture(path, IDS_8_BIT)
            return StoredLabel(codes, partial(class_ids, table=self._ids, name=name))
        if label == "depth":
            return depth_map(read_array(path, "depth"), name)
        if label == "normals":
            if path.suffix == ".npy":
                return normal_map(read_array(path, "normals"), name, NORMAL_AXES)
            codes = read_picture(path, RGB).astype(np.float32)
            # Black is what an empty picture holds.
            codes[~codes.any(axis=2)] = 127.5
            return normal_map(codes / 127.5 - 1, name, NORMAL_AXES)
        if path.suffix == ".npy":
            return edge_map(read_array(path, "edge"), name)
        return edge_map(read_picture(path, EDGES_8_BIT).astype(np.float32) / 255, name)

    def _regions(self, frame: str) -> Tensor:
        """Instances of all names."""
        names = self._mat_array(frame, "labels", np.uint16).astype(np.int64)
        instances = self._mat_array(frame, "instances", np.uint8)
        # At least 256, so none is the code of no label.
        return torch.from_numpy(np.where(names == UNLABELLED, SEMSEG_NO_LABEL, names * 256 + instances))

    def _intrinsics(self, frame: str, height: int, width: int) -> Intrinsics:
        y, x = height / FULL_SIZE[0], width / FULL_SIZE[1]
        return Intrinsics(CAMERA.focal_x * x, CAMERA.focal_y * y, CAMERA.center_x * x, CAMERA.center_y * y)


def whole_numbers(path: Path, variable: str, largest: int) -> list[int]:
    """The numbers 1 to `largest` of a small MATLAB file, in their order.

    Raises:
        ValueError: if they are others, or the file is missing or damaged.
    """
    numbers = read_array(path, variable).ravel()
    if numbers.dtype.kind not in "iuf" or not ((numbers >= 1) & (numbers <= largest) & (numbers % 1 == 0)).all():
        raise ValueError(f"{str(path)!r}: {variable} must hold whole numbers from 1 to {largest}")
    return [int(number) for number in numbers]
