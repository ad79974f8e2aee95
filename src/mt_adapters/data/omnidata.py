"""Omnidata's starter set: components that are annotated and stored as Taskonomy is.

    rgb/COMPONENT/SCENE/point_P_view_V_domain_rgb.png            8-bit RGB
    depth_zbuffer/COMPONENT/SCENE/..._domain_depth_zbuffer.png   16-bit grey; or depth_euclidean with point_info
    normal/COMPONENT/SCENE/..._domain_normal.png                 8-bit RGB
    edge_texture/COMPONENT/SCENE/..._domain_edge_texture.png     16-bit grey; or edge_occlusion
    semantic/COMPONENT/SCENE/..._domain_semantic.png             8-bit RGB: red is the class, the rest the instance
    segment_semantic/taskonomy/BUILDING/...                      for the component taskonomy instead, see there
    train_val_test_hypersim.csv                                  for hypersim: its split
    metadata_camera_parameters.csv                               for hypersim with depth: its cameras

COMPONENT is taskonomy, replica or hypersim. SCENE is a building of Taskonomy, a scene of Replica (room_0), or a camera
of a scene of Hypersim (ai_001_001-cam_00), whose files are point_FRAME_view_0.

Splits: the official ones of whole scenes. Units, axes, edges and their sources: as in `mt_adapters.data.taskonomy`,
and measured on Omnidata's own pictures of Replica (normals 3.8 degrees off those of their depth) and Hypersim (3.9
degrees).

Hypersim: depth_zbuffer has no meaning for it, as many of its cameras are tilted against their pictures: depth is
planar z worked out from depth_euclidean and each scene's matrix M_cam_from_uv (264 different ones in 482 scenes).
Classes are the 40 of NYU Depth V2.

Quirks. Class 0, "undefined", and red = 255 have no label. Replica_GSO, BlendedMVS and HM3D are left out: they have no
classes, or other units.

Not verified: `semantic` on a true file. Omnidata's reader takes red for the class; the pictures of its documentation
show colours for people instead, and are refused wherever red is not a class.

Sources: https://github.com/EPFL-VILAB/omnidata: omnidata_tools/dataset/README.md (domains), .../starter_dataset
(folders, archives), omnidata_tools/torch/dataloader (names, classes of Replica and Hypersim, cameras, packing of
classes), and the splits in component_datasets. Cameras: contrib/mikeroberts3000 of
https://github.com/apple/ml-hypersim.

Licences: Taskonomy's and Replica's own (non-commercial research and education; LICENSE in
https://github.com/facebookresearch/Replica-Dataset), Hypersim's CC BY-SA 3.0 (README.md of ml-hypersim), and
Omnidata's for its annotations (LICENSE in its repository).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mt_adapters.data.nyuv2 import NYU40_CLASSES
from mt_adapters.data.pictures import BadSampleError, PictureRule, StoredLabel, class_ids, id_table, read_picture
from mt_adapters.data.taskonomy import TASKONOMY_CLASSES, TaskonomyDataset, read_split

# Source: CLASS_LABELS in component_datasets/replica/__init__.py, without the first, "undefined", whose code is 0.
REPLICA_CLASSES: tuple[str, ...] = tuple(
    "backpack|base-cabinet|basket|bathtub|beam|beanbag|bed|bench|bike|bin|blanket|blinds|book|bottle|box|bowl|camera|"
    "cabinet|candle|chair|chopping-board|clock|cloth|clothing|coaster|comforter|computer-keyboard|cup|cushion|curtain|"
    "ceiling|cooktop|countertop|desk|desk-organizer|desktop-computer|door|exercise-ball|faucet|floor|handbag|hair-dryer|"
    "handrail|indoor-plant|knife-block|kitchen-utensil|lamp|laptop|major-appliance|mat|microwave|monitor|mouse|nightstand|"
    "pan|panel|paper-towel|phone|picture|pillar|pillow|pipe|plant-stand|plate|pot|rack|refrigerator|remote-control|scarf|"
    "sculpture|shelf|shoe|shower-stall|sink|small-appliance|sofa|stair|stool|switch|table|table-runner|tablet|"
    "tissue-paper|toilet|toothbrush|towel|tv-screen|tv-stand|umbrella|utensil-holder|vase|vent|wall|wall-cabinet|wall-plug|"
    "wardrobe|window|rug|logo|bag|set-of-clothing".split("|")
)
# Source: train_val_test_replica.csv.
REPLICA_SCENES: dict[str, tuple[str, ...]] = {
    "train": tuple(
        "apartment_0 apartment_1 frl_apartment_0 frl_apartment_1 hotel_0 "
        "office_1 office_3 office_4 room_0 room_2".split()
    ),
    "validation": ("apartment_2", "frl_apartment_2", "frl_apartment_3", "office_0"),
}
UNDEFINED, NO_CLASS = 0, 255
CLASS_AND_INSTANCE = PictureRule(("RGB",), "an 8-bit RGB PNG whose red is the class id")


class Component(NamedTuple):
    """One of the sets: its classes, from code 1, and what to say of it."""

    classes: tuple[str, ...]
    summary: str


COMPONENTS: dict[str, Component] = {
    "taskonomy": Component(TASKONOMY_CLASSES, TaskonomyDataset.summary),
    "replica": Component(
        REPLICA_CLASSES,
        "Replica (18 scanned rooms and flats) as rendered for Omnidata, from https://omnidata.vision with omnitools. "
        "Licence: Replica's own, for non-commercial research and education only",
    ),
    "hypersim": Component(
        NYU40_CLASSES,
        "Hypersim (rendered rooms) as annotated for Omnidata, from https://omnidata.vision with omnitools. "
        "Licence: CC BY-SA 3.0",
    ),
}
CAMERA_FILE = "metadata_camera_parameters.csv"
CAMERA_COLUMNS = [f"M_cam_from_uv_{row}{column}" for row in range(3) for column in range(3)]


class OmnidataDataset(TaskonomyDataset):
    """Frames of one component of Omnidata's starter set with `semseg`, `depth`, `normals` and `edges`.

    Args:
        split: "train" or "validation".
        data_dir: the folder that omnitools unpacks to; labels whose domain is not there are left out.
        derive: nothing can be derived: the set has all labels.
        component: "taskonomy", "replica" or "hypersim".
        subset: of the component taskonomy, see `TaskonomyDataset`.
        edges: the domain of the label `edges`, "edge_texture" (default) or "edge_occlusion".

    Raises:
        ValueError: see `TaskonomyDataset`; for an unknown component, or a missing or wrong file of hypersim's split or
            cameras.
    """

    set_name = "omnidata"
    layout: ClassVar[str] = (
        "rgb/COMPONENT/SCENE/point_*_view_*_domain_rgb.png of scenes of the split, and so for semantic, depth_zbuffer "
        "(or depth_euclidean), normal and edge_texture"
    )

    def __init__(
        self,
        split: str,
        data_dir: str | Path | None,
        derive: Sequence[str] = (),
        component: str = "taskonomy",
        subset: str = "tiny",
        edges: str = "edge_texture",
    ) -> None:
        if component not in COMPONENTS:
            raise ValueError(f"unknown component {component!r}; known are {list(COMPONENTS)}")
        self.component, (classes, self.summary) = component, COMPONENTS[component]
        self.labels = {**self.labels, "semseg": classes}
        if component != "taskonomy":
            self.domains = {**self.domains, "semseg": ("semantic",)}
            codes = {code: place for place, code in enumerate(range(1, len(classes) + 1))}
            self._ids = id_table(codes, no_label=[UNDEFINED, NO_CLASS])
        if component == "hypersim":
            self.domains = {**self.domains, "depth": ("depth_euclidean",)}
        super().__init__(split, data_dir, derive, subset, edges)
        if component == "hypersim" and "depth" in self.labels:
            self._cameras = read_cameras(self.root / CAMERA_FILE, {scene_of(name) for name in self._buildings})

    def _find_buildings(self) -> list[str]:
        self._folders = f"{{domain}}/{self.component}/{{building}}"
        if self.component == "taskonomy":
            return self._existing(self._split_names())
        names = self._scene_names()
        folder = self.root / "rgb" / self.component
        found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        return [name for name in found if scene_of(name) in names]

    def _scene_names(self) -> set[str]:
        path = self.root / f"train_val_test_{self.component}.csv"
        if path.is_file():
            return set(read_split(path, self.split))
        if self.component == "replica":
            return set(REPLICA_SCENES[self.split])
        raise ValueError(
            f"there is no {path.name} in {str(self.root)!r}; it is in omnidata_tools/torch/dataloader/"
            f"component_datasets/{self.component} of https://github.com/EPFL-VILAB/omnidata"
        )

    def _classes(self, path: Path) -> StoredLabel | None:
        if self.component == "taskonomy":
            return super()._classes(path)
        red = read_picture(path, CLASS_AND_INSTANCE)[..., 0]
        return StoredLabel(red, partial(class_ids, table=self._ids, name=repr(str(path))))

    def _rays(self, frame: str, height: int, width: int) -> Tensor:
        if self.component != "hypersim":
            return super()._rays(frame, height, width)
        scene = scene_of(frame)
        if scene not in self._cameras:
            raise BadSampleError(f"{str(self.root / CAMERA_FILE)!r}: has no line for the scene {scene!r}.")
        # u and v go from -1 to 1, from left to right and from bottom to top, over the whole picture.
        u = (torch.arange(width) + 0.5) * (2 / width) - 1
        v = 1 - (torch.arange(height) + 0.5) * (2 / height)
        grid = torch.stack([u.expand(height, width), v[:, None].expand(height, width), torch.ones(height, width)])
        return torch.einsum("ij,jhw->ihw", torch.tensor(self._cameras[scene]).view(3, 3), grid)


def scene_of(folder: str) -> str:
    """ai_001_001 of ai_001_001-cam_00 or of its frames; scenes of other components have no "-"."""
    return folder.split("/")[0].split("-")[0]


def read_cameras(path: Path, scenes: set[str]) -> dict[str, list[float]]:
    """Scene -> M_cam_from_uv, row by row.

    Raises:
        ValueError: if the file is missing or is another one.
    """
    if not path.is_file():
        raise ValueError(
            f"there is no {path.name} in {str(path.parent)!r}, which depth of Hypersim needs; it is in "
            "contrib/mikeroberts3000 of https://github.com/apple/ml-hypersim"
        )
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["scene_name"] in scenes]
        return {row["scene_name"]: [float(row[column]) for column in CAMERA_COLUMNS] for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r}: needs the columns scene_name and {CAMERA_COLUMNS} ({error!r})") from error
