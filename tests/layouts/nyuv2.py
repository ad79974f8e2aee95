"""A small NYU Depth V2 in its true forms, with known values."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.io
import torch
from PIL import Image
from torch import Tensor

from layouts.tilted_plane import NORMAL, plane_depth

NUM_NAMES = 894
# By the authors' file: of five frames, counted from 1.
FRAMES = {"train": ["0002", "0004"], "validation": ["0005"]}
# Camera of the toolbox, in pixels of 640 x 480 that are counted from 1.
CAMERA = (518.85790117450188, 519.46961112127485, 325.58244941119034, 253.73616633400465)
# Codes of the 894 names in a strip of the picture, and their classes of 40 by the file that the fixture writes.
NAMES_ROW, NAMES = 6, (0, 1, 2, 11, 40, 41, 500, 894)
# How each paper's folders end.
ENDINGS = {
    "ASTMT": {"images": "jpg", "segmentation": "mat", "depth": "mat", "normals": "jpg", "edge": "png"},
    "MTI-Net": {"images": "jpg", "segmentation": "png", "depth": "npy", "normals": "npy", "edge": "npy"},
    "InvPT": {"images": "png", "segmentation": "png", "depth": "npy", "normals": "png", "edge": "png"},
}
FOLDER_FRAMES = {"train": ["0003", "0007"], "validation": ["0001"]}
IDS_ROW, NORMAL_ROW, EDGE_ROW, DEPTH_ROW = 6, 0, 10, 0
# In the folders x is left, y up, z towards the camera.
NORMALS = {
    (-1.0, 0.0, 0.0): (1.0, 0.0, 0.0),
    (1.0, 0.0, 0.0): (-1.0, 0.0, 0.0),
    (0.0, 1.0, 0.0): (0.0, 1.0, 0.0),
    (0.0, 0.0, 1.0): (0.0, 0.0, 1.0),
    (0.0, 0.0, 0.0): (0.0, 0.0, 0.0),
}


def class_of_name(code: int) -> int:
    """The class of 40, from 1, that the fixture gives to a name; all 40 occur."""
    return (7 * code) % 40 + 1


def write_nyuv2_mat(folder: Path, size: tuple[int, int] = (48, 64)) -> dict[str, dict[str, Tensor]]:
    """Writes the authors' file with five frames, of which two train and one is validation; `size` from 40 x 40.

    Returns:
        by the name of the frame its image (3,H,W), semseg (40 classes), depth, raw depth and instances.
    """
    height, width = size
    focal_x, focal_y, center_x, center_y = CAMERA
    x, y = width / 640, height / 480
    images = np.random.default_rng(0).integers(0, 256, (5, *size, 3), dtype=np.uint8)
    labels, instances = np.full((5, *size), 3, dtype=np.uint16), np.ones((5, *size), dtype=np.uint8)
    labels[:, 30:], instances[:, 30:, 20:] = 21, 2
    labels[:, NAMES_ROW, : len(NAMES)] = NAMES
    depths = np.zeros((5, *size), dtype=np.float32)
    for number in range(5):
        camera = (focal_x * x, focal_y * y, (center_x - 0.5) * x, (center_y - 0.5) * y)
        depths[number] = plane_depth(size, camera, distance=2.0 + number)
    raw = depths.copy()
    raw[:, 15:18, 15:20] = 0

    # MATLAB's axes (H,W,3,N) lie in the file in reverse order, after 512 bytes of its own.
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "w", userblock_size=512) as file:
        for name, array in {"depths": depths, "rawDepths": raw, "labels": labels, "instances": instances}.items():
            _write_variable(file, name, array.transpose(0, 2, 1))
        _write_variable(file, "images", images.transpose(0, 3, 2, 1))
    splits = {"trainNdxs": np.array([[4], [2]], np.uint16), "testNdxs": np.array([[5]], np.uint16)}
    scipy.io.savemat(folder / "splits.mat", splits)
    mapping = np.array([[class_of_name(code) for code in range(1, NUM_NAMES + 1)]], np.uint8)
    scipy.io.savemat(folder / "classMapping40.mat", {"mapClass": mapping})

    known = {}
    for frame in (frame for frames in FRAMES.values() for frame in frames):
        place = int(frame) - 1
        semseg = torch.tensor([[class_of_name(c) - 1 if c else 255 for c in row] for row in labels[place].tolist()])
        known[frame] = {
            "image": torch.from_numpy(images[place]).permute(2, 0, 1),
            "semseg": semseg,
            "depth": torch.from_numpy(depths[place]),
            "raw_depth": torch.from_numpy(raw[place]),
        }
    return known


def write_nyuv2_folders(
    folder: Path, size: tuple[int, int] = (48, 64), paper: str = "MTI-Net"
) -> dict[str, dict[str, Tensor]]:
    """Writes folders as a paper has them, two train frames and one validation frame; `size` is from 40 x 42 on.

    Returns:
        by the name of the frame its image (3,H,W), semseg (40 classes), depth, normals and edges. Pictures in JPEG are
        not exact.
    """
    (folder / "gt_sets").mkdir(parents=True)
    for split, file in (("train", "train.txt"), ("validation", "val.txt")):
        (folder / "gt_sets" / file).write_text("\n".join(reversed(FOLDER_FRAMES[split])) + "\n")
    known = {}
    for number, frame in enumerate(frame for frames in FOLDER_FRAMES.values() for frame in frames):
        known[frame] = _write_folder_frame(folder, ENDINGS[paper], frame, number, size)
    return known


def file_of(folder: Path, paper: str, frame: str, kind: str) -> Path:
    return folder / kind / f"{frame}.{ENDINGS[paper][kind]}"


def _write_variable(file: Any, name: str, array: np.ndarray) -> None:
    file.create_dataset(name, data=array, chunks=(1, *array.shape[1:]), compression="gzip")


def _write_folder_frame(
    folder: Path, endings: dict[str, str], frame: str, number: int, size: tuple[int, int]
) -> dict[str, Tensor]:
    # Smooth, so that a JPEG keeps it.
    image = np.zeros((*size, 3), dtype=np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = np.arange(size[1]) * 2, np.arange(size[0])[:, None] * 3, number * 10
    ids = np.full(size, 1, dtype=np.uint8)
    ids[30:] = 2
    ids[IDS_ROW, :41] = np.arange(41)
    depth = plane_depth(size, (50.0, 50.0, 32.0, 24.0), distance=2.0 + number).astype(np.float32)
    depth[DEPTH_ROW, :2] = 0
    left, up, towards = -NORMAL[0], NORMAL[1], NORMAL[2]
    vectors = np.full((*size, 3), (left, up, towards), dtype=np.float32)
    normals = torch.tensor(NORMAL).repeat(*size, 1)
    if endings["normals"] != "jpg":
        vectors[NORMAL_ROW, : len(NORMALS)] = list(NORMALS)
        normals[NORMAL_ROW, : len(NORMALS)] = torch.tensor(list(NORMALS.values()))
    # As large as a block of JPEG, twice, for zeros to survive it.
    vectors[16:32, 32:48], normals[16:32, 32:48] = 0, 0
    edges = np.zeros(size, dtype=np.float32)
    edges[EDGE_ROW, :5] = 1

    as_picture = np.round(vectors * 127.5 + 127.5).astype(np.uint8)
    contents = {
        "images": image,
        "segmentation": ids if endings["segmentation"] == "png" else {"segmentation": ids},
        "depth": depth if endings["depth"] == "npy" else {"depth": depth},
        "normals": vectors if endings["normals"] == "npy" else as_picture,
        "edge": edges if endings["edge"] == "npy" else (edges * 255).astype(np.uint8),
    }
    for kind, content in contents.items():
        path = folder / kind / f"{frame}.{endings[kind]}"
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, dict):
            scipy.io.savemat(path, content)
        elif endings[kind] == "npy":
            np.save(path, content)
        else:
            quality = {"quality": 95, "subsampling": 0} if endings[kind] == "jpg" else {}
            Image.fromarray(content).save(path, **quality)
    semseg = torch.from_numpy(ids.astype(np.int64)) - 1
    semseg[semseg < 0] = 255
    return {
        "image": torch.from_numpy(image).permute(2, 0, 1),
        "semseg": semseg,
        "depth": torch.from_numpy(depth),
        "normals": normals.permute(2, 0, 1),
        "edges": torch.from_numpy(edges),
    }
