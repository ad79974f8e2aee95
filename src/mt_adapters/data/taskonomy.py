"""Taskonomy: pictures of about 500 scanned buildings, with labels rendered from the scans.

    rgb/BUILDING/point_P_view_V_domain_rgb.png                                8-bit RGB, 512 x 512
    segment_semantic/BUILDING/point_P_view_V_domain_segmentsemantic.png       8-bit grey, ids 0 to 17
    depth_zbuffer/BUILDING/point_P_view_V_domain_depth_zbuffer.png            16-bit grey
    normal/BUILDING/point_P_view_V_domain_normal.png                          8-bit RGB
    edge_texture/BUILDING/point_P_view_V_domain_edge_texture.png              16-bit grey; or edge_occlusion
    train_val_test_SUBSET.csv                                                 `id,train,val,test`; tiny needs none

or DOMAIN/taskonomy/BUILDING (what omnitools unpacks), BUILDING/DOMAIN (the published sample building), or
BUILDING_DOMAIN/DOMAIN (each archive BUILDING_DOMAIN.tar, which holds a folder DOMAIN, unpacked in a folder of its
name). Without depth_zbuffer, depth is worked out from depth_euclidean and point_info/.../..._domain_point_info.json.

Splits: the official ones of whole buildings: tiny, medium, full, fullplus and debug (one building, the same for train
and validation). Buildings that are not there are passed over, as one may have downloaded some.

Units. A depth code is 1/512 m of planar z (depth_euclidean: of distance along the ray); 65535 is a hole of the scan
and has no label. Normals are stored as n * 0.5 + 0.5 with x right, y DOWN and z AWAY from the camera, grey (128) being
no label. Their authors write that z points towards the camera, but in the pictures of theirs that we measured it does
not: against normals of their own depth, point_202_view_5 is 1.9 degrees off with (x, -y, -z), and 9.8 with (x, -y, z);
ceilings are green, floors purple, facing walls have no blue.

Edges. edge_texture is a Canny filter's response before thinning, edge_occlusion a Sobel filter on the root of depth;
both fill a small part of 16 bits. 1 is the value to which Taskonomy's own training maps its upper end. Ours: larger
ones are cut off. Where depth is a hole, edge_occlusion has no label.

Quirks. The classes are the guesses of a network (FCIS), not of people: 0 "uncertain" has no label, 1 is background.
Some frames have no class picture (3 of 9,464 in the sample building): they lack `semseg`. The domain is called
segment_semantic, but segmentsemantic in file names. The split files end their lines with a bare carriage return. The
buildings in `EXCLUDED` have no rgb or wrong views.

Not verified: bit depth and size of segment_semantic on a true file (its readers take one channel of 8 bits), and
BUILDING_DOMAIN/DOMAIN, which follows from the names alone. One user reports newfields/point_1070_view_8 as damaged.

Sources: data/README.md (domains, units, classes, splits), data/assets/splits_taskonomy.zip,
taskbank/assets/web_assets/pseudosemantics/coco_selected_classes.txt and
taskbank/experiments/final/edge{2d,3d}/config.py of https://github.com/StanfordVL/taskonomy; the file list of
https://github.com/alexsax/taskonomy-sample-model-1 and its issue 2 (65535); https://github.com/EPFL-VILAB/omnidata:
omnidata_annotator/scripts (how each domain is rendered) and assets/taskonomy (the pictures measured),
omnidata_tools/dataset (archives), and the readers' list of bad buildings. Licence: the set's own, data/LICENSE:
non-commercial research and education, no redistribution.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mt_adapters.data.derived import Intrinsics, points_from_depth
from mt_adapters.data.frames import FolderDataset, in_units
from mt_adapters.data.pictures import (
    IDS_8_BIT,
    NORMALS_8_BIT,
    BadSampleError,
    StoredLabel,
    class_ids,
    grey_16_bit,
    id_table,
    metres,
    read_file,
    read_picture,
    unit_vectors,
)

# Source: data/README.md and coco_selected_classes.txt. Code 0 is "uncertain", the first class has the code 1.
TASKONOMY_CLASSES: tuple[str, ...] = tuple(
    "background|bottle|chair|couch|potted plant|bed|dining table|toilet|tv|microwave|oven|toaster|sink|refrigerator|"
    "book|clock|vase".split("|")
)
UNCERTAIN = 0
IDS = id_table({place + 1: place for place in range(len(TASKONOMY_CLASSES))}, no_label=[UNCERTAIN])

SUBSETS = ("debug", "tiny", "medium", "full", "fullplus")
# Source: train_val_test_tiny.csv.
TINY: dict[str, tuple[str, ...]] = {
    "train": tuple(
        "allensville beechwood benevolence coffeen cosmos forkland hanson hiteman klickitat lakeville leonardo "
        "lindenwood marstons merom mifflinburg newfields onaga pinesdale pomaria ranchester shelbyville stockman "
        "tolstoy wainscott woodbine".split()
    ),
    "validation": ("collierville", "corozal", "darden", "markleeville", "wiconisco"),
}
SPLIT_COLUMNS = {"train": "train", "validation": "val"}
# Source: omnidata_tools/torch/dataloader/component_datasets/taskonomy/__init__.py of Omnidata.
EXCLUDED = ("brinnon", "darnestown", "mosquito", "rough", "tansboro", "tomkins")

# In the order in which they are tried.
FOLDERS = (
    "{domain}/taskonomy/{building}",
    "{domain}/{building}",
    "{building}/{domain}",
    "{building}_{domain}/{domain}",
)
IN_FILE_NAMES = {"segment_semantic": "segmentsemantic"}

DEPTH_16_BIT = grey_16_bit("depth in 1/512 m")
EDGES_16_BIT = grey_16_bit("edges")
METRES_PER_CODE = 1 / 512
NO_DEPTH = (0, 65535)
# x right, y down, z away from the camera: see above.
NORMAL_AXES = (1, -1, -1)
# Domain -> the share of 65535 that is an edge of 1. Source: `current_scale` in edge2d/config.py and edge3d/config.py.
EDGE_DOMAINS = {"edge_texture": 0.08, "edge_occlusion": 0.00625}


class TaskonomyDataset(FolderDataset):
    """Frames of Taskonomy with `semseg`, `depth`, `normals` and `edges`.

    Args:
        split: "train" or "validation".
        data_dir: the folder in one of the layouts above; labels whose domain is not there are left out.
        derive: nothing can be derived: the set has all labels.
        subset: "tiny" (default), "medium", "full", "fullplus" or "debug".
        edges: the domain of the label `edges`, "edge_texture" (default) or "edge_occlusion".

    Raises:
        ValueError: see `FolderDataset`; for an unknown subset or domain, or a missing or wrong split file.
    """

    labels: Mapping[str, tuple[str, ...] | None] = {
        "semseg": TASKONOMY_CLASSES,
        "depth": None,
        "normals": None,
        "edges": None,
    }
    set_name = "taskonomy"
    summary = (
        "Taskonomy (scanned buildings; classes are guesses of a network), from "
        "https://github.com/StanfordVL/taskonomy/tree/master/data with omnitools. "
        "Licence: its own, for non-commercial research and education only, without redistribution"
    )
    layout: ClassVar[str] = (
        "rgb/BUILDING/point_*_view_*_domain_rgb.png (or rgb/taskonomy/BUILDING, or BUILDING/rgb) of buildings of the "
        "split, and so for segment_semantic, depth_zbuffer, normal and edge_texture"
    )
    depth_unit = METRES_PER_CODE
    # Label -> the domains that hold it; the first one that is there is taken.
    domains: Mapping[str, tuple[str, ...]] = {
        "semseg": ("segment_semantic",),
        "depth": ("depth_zbuffer", "depth_euclidean"),
        "normals": ("normal",),
    }

    def __init__(
        self,
        split: str,
        data_dir: str | Path | None,
        derive: Sequence[str] = (),
        subset: str = "tiny",
        edges: str = "edge_texture",
    ) -> None:
        if subset not in SUBSETS:
            raise ValueError(f"unknown subset {subset!r}; Taskonomy has {list(SUBSETS)}")
        if edges not in EDGE_DOMAINS:
            raise ValueError(f"edges names {edges!r}; it may be one of {list(EDGE_DOMAINS)}")
        self.subset = subset
        self.domains = {**self.domains, "edges": (edges,)}
        super().__init__(split, data_dir, derive)

    def _find_frames(self) -> list[str]:
        frames = []
        ending = "_domain_rgb.png"
        self._buildings = self._find_buildings()
        for building in self._buildings:
            pictures = self._folder("rgb", building).glob(f"point_*_view_*{ending}")
            frames += sorted(f"{building}/{path.name.removesuffix(ending)}" for path in pictures)
        # Of one building that has it: the others must have it, too.
        self._domains = {
            label: next((name for name in names if self._folder_of_any(name).is_dir()), names[0])
            for label, names in self.domains.items()
        }
        return frames

    def _find_buildings(self) -> list[str]:
        names = self._split_names()
        for folders in FOLDERS:
            self._folders = folders
            found = self._existing(names)
            if found:
                return found
        return []

    def _existing(self, names: Sequence[str]) -> list[str]:
        return [name for name in sorted(set(names) - set(EXCLUDED)) if self._folder("rgb", name).is_dir()]

    def _split_names(self) -> Sequence[str]:
        """The buildings of the split."""
        name = f"train_val_test_{self.subset}.csv"
        files = [path for path in (self.root / name, self.root / "splits_taskonomy" / name) if path.is_file()]
        if files:
            return read_split(files[0], self.split)
        if self.subset == "tiny":
            return TINY[self.split]
        raise ValueError(
            f"there is no {name} in {str(self.root)!r}; it is in "
            "https://github.com/StanfordVL/taskonomy/raw/master/data/assets/splits_taskonomy.zip"
        )

    def _folder(self, domain: str, building: str) -> Path:
        return self.root / self._folders.format(domain=domain, building=building)

    def _folder_of_any(self, domain: str) -> Path:
        folders = [self._folder(domain, building) for building in self._buildings or ["BUILDING"]]
        return next((folder for folder in folders if folder.is_dir()), folders[0])

    def _label_folders(self) -> dict[str, Path]:
        return {label: self._folder_of_any(domain) for label, domain in self._domains.items()}

    def _path(self, frame: str, domain: str, ending: str = "png") -> Path:
        building, view = frame.split("/")
        return self._folder(domain, building) / f"{view}_domain_{IN_FILE_NAMES.get(domain, domain)}.{ending}"

    def _image_path(self, frame: str) -> Path:
        return self._path(frame, "rgb")

    def _stored_label(self, frame: str, label: str) -> StoredLabel | Tensor | None:
        path = self._path(frame, self._domains[label])
        if label == "semseg":
            return self._classes(path)
        if label == "normals":
            codes = read_picture(path, NORMALS_8_BIT)
            return StoredLabel(codes, partial(unit_vectors, name=repr(str(path)), axes=NORMAL_AXES))
        if label == "depth":
            decode = partial(metres, metres_per_code=METRES_PER_CODE, no_label=NO_DEPTH)
            stored = StoredLabel(read_picture(path, DEPTH_16_BIT), decode)
            return stored if self._domains["depth"] == "depth_zbuffer" else self._planar(frame, in_units(stored))
        domain = self._domains["edges"]
        codes = read_picture(path, EDGES_16_BIT)
        if domain == "edge_texture" or "depth" not in self.labels:
            return StoredLabel(codes, partial(edge_strengths, full_scale=EDGE_DOMAINS[domain]))
        holes = read_picture(self._path(frame, self._domains["depth"]), DEPTH_16_BIT)
        if holes.shape != codes.shape:
            raise BadSampleError(f"{str(path)!r}: is {codes.shape}, but depth, whose holes it has, is {holes.shape}.")
        strengths = edge_strengths(codes, EDGE_DOMAINS[domain])
        strengths[torch.from_numpy(np.isin(holes, NO_DEPTH))] = torch.nan
        return strengths

    def _classes(self, path: Path) -> StoredLabel | None:
        # The set is published without the class pictures of some frames.
        if path.parent.is_dir() and not path.exists():
            return None
        return StoredLabel(read_picture(path, IDS_8_BIT), partial(class_ids, table=IDS, name=repr(str(path))))

    def _planar(self, frame: str, distance: Tensor) -> Tensor:
        """Distance along the ray (H,W) to planar z."""
        rays = self._rays(frame, *distance.shape)
        return distance * (-rays[2] / rays.norm(dim=0))

    def _rays(self, frame: str, height: int, width: int) -> Tensor:
        """Where each pixel looks (3,H,W), of any length, in our axes."""
        path = self._path(frame, "point_info", "json")
        try:
            field_of_view = float(json.loads(read_file(path))["field_of_view_rads"])
        except BadSampleError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise BadSampleError(f"{str(path)!r}: is no JSON with field_of_view_rads ({error!r}).") from error
        if not 0 < field_of_view < math.pi:
            raise BadSampleError(f"{str(path)!r}: field_of_view_rads is {field_of_view}; it must be in (0, pi).")
        focal = width / 2 / math.tan(field_of_view / 2)
        return points_from_depth(torch.ones(height, width), Intrinsics(focal, focal, width / 2, height / 2))


def edge_strengths(codes: np.ndarray, full_scale: float) -> Tensor:
    """Stored edges (H,W) uint16 to [0, 1] float32; `full_scale` is the share of 65535 that is 1."""
    return torch.from_numpy((codes.astype(np.float32) / np.float32(65535 * full_scale)).clip(max=1))


def read_split(path: Path, split: str) -> list[str]:
    """The ids of a split in a file `id,train,val,test` of zeros and ones.

    Raises:
        ValueError: if it is no such file.
    """
    column = SPLIT_COLUMNS[split]
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    if not rows or any(row.get(name) is None for row in rows for name in ("id", column)):
        raise ValueError(f"{str(path)!r} is no split file; its first line must be id,train,val,test")
    return [row["id"] for row in rows if row[column] == "1"]
