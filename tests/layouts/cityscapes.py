"""A small Cityscapes in its true layout, with known values."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from layouts.tilted_plane import plane_depth

FRAMES = {
    "train": ["aachen_000000_000019", "bochum_000000_000313"],
    "validation": ["munster_000167_000019"],
}
FOLDERS = {"train": "train", "validation": "val"}
NUM_IDS = 34
# The ids that have a train id, in its order (helpers/labels.py).
TRAINED_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]

BASELINE, FOCAL_X, FOCAL_Y, U0, V0 = 0.25, 64.0, 60.0, 33.0, 22.0
# Code of a disparity -> metres: baseline * fx is 16, and 256 steps are a pixel.
DEPTHS = {0: 0.0, 1: 0.0, 256: 0.0, 257: 16.0, 513: 8.0, 4097: 1.0}
# Where the picture holds a strip of all ids, and two cars beside each other.
ID_ROW, CAR_ROWS, FIRST_CAR, SECOND_CAR = 6, slice(20, 28), slice(10, 16), slice(16, 22)


def write_cityscapes(folder: Path, size: tuple[int, int] = (48, 64)) -> dict[str, dict[str, Tensor]]:
    """Writes two train frames and one validation frame; `size` is from 40 x 40 to 96 x 96.

    Returns:
        by the name of the frame its image (3,H,W), semseg (19 classes) and depth.
    """
    return {
        frame: _write_frame(folder, split, frame, number, size)
        for split, frames in FRAMES.items()
        for number, frame in enumerate(frames)
    }


def file_of(folder: Path, split: str, frame: str, kind: str, ending: str) -> Path:
    return folder / kind / FOLDERS[split] / frame.split("_")[0] / f"{frame}_{ending}"


def _write_frame(folder: Path, split: str, frame: str, number: int, size: tuple[int, int]) -> dict[str, Tensor]:
    image = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    ids = np.full(size, 11, dtype=np.uint8)
    ids[:5], ids[30:] = 23, 7
    ids[ID_ROW, :NUM_IDS] = np.arange(NUM_IDS)
    ids[CAR_ROWS, FIRST_CAR] = ids[CAR_ROWS, SECOND_CAR] = 26
    instances = ids.astype(np.uint16)
    instances[CAR_ROWS, FIRST_CAR], instances[CAR_ROWS, SECOND_CAR] = 26000, 26001

    planar = plane_depth(size, (FOCAL_X, FOCAL_Y, U0 + 0.5, V0 + 0.5), distance=3.0 - number)
    disparities = np.round(BASELINE * FOCAL_X / planar * 256 + 1)
    depth = BASELINE * FOCAL_X / ((disparities - 1) / 256)
    disparities[0, : len(DEPTHS)], depth[0, : len(DEPTHS)] = list(DEPTHS), list(DEPTHS.values())
    camera = {
        "extrinsic": {"baseline": BASELINE, "pitch": 0.03, "roll": 0.0, "x": 1.7, "y": 0.1, "yaw": -0.01, "z": 1.22},
        "intrinsic": {"fx": FOCAL_X, "fy": FOCAL_Y, "u0": U0, "v0": V0},
    }
    pictures = {
        ("leftImg8bit", "leftImg8bit.png"): image,
        ("gtFine", "gtFine_labelIds.png"): ids,
        ("gtFine", "gtFine_instanceIds.png"): instances,
        ("disparity", "disparity.png"): disparities.astype(np.uint16),
    }
    for (kind, ending), picture in pictures.items():
        path = file_of(folder, split, frame, kind, ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    path = file_of(folder, split, frame, "camera", "camera.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(camera, indent=4))

    semseg = torch.full(size, 255)
    for train_id, label_id in enumerate(TRAINED_IDS):
        semseg[torch.from_numpy(ids == label_id)] = train_id
    return {
        "image": torch.from_numpy(image).permute(2, 0, 1),
        "semseg": semseg,
        "depth": torch.from_numpy(depth.astype(np.float32)),
    }
