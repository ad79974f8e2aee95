"""A small SYNTHIA-RAND-CITYSCAPES in its true layout, with known values."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from layouts.png_48_bit import write_48_bit
from layouts.tilted_plane import plane_depth

FRAMES = {"train": ["0000000", "0000001"], "validation": ["0000004"]}
NUM_IDS = 23
# README.txt: id -> train id of Cityscapes' 16 classes.
TRAIN_IDS = {
    3: 0,
    4: 1,
    2: 2,
    21: 3,
    5: 4,
    7: 5,
    15: 6,
    9: 7,
    6: 8,
    1: 9,
    10: 10,
    17: 11,
    8: 12,
    19: 13,
    12: 14,
    11: 15,
}
# Code -> metres.
DEPTHS = {0: 0.0, 1: 0.01, 256: 2.56, 65534: 655.34, 65535: 0.0}
ID_ROW, CAR_ROWS, FIRST_CAR, SECOND_CAR = 6, slice(20, 28), slice(10, 16), slice(16, 22)
FOCAL_PER_WIDTH = 532.740352 / 1280


def write_synthia(folder: Path, size: tuple[int, int] = (48, 64)) -> dict[str, dict[str, Tensor]]:
    """Writes two train frames and one validation frame; `size` is from 40 x 40 to 96 x 96.

    Returns:
        by the name of the frame its image (3,H,W), semseg and depth.
    """
    return {frame: _write_frame(folder, frame, size) for frames in FRAMES.values() for frame in frames}


def _write_frame(folder: Path, frame: str, size: tuple[int, int]) -> dict[str, Tensor]:
    number = int(frame)
    image = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    (folder / "RGB").mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / "RGB" / f"{frame}.png")

    ids = np.full(size, 2, dtype=np.int64)
    ids[:5], ids[30:] = 1, 3
    ids[ID_ROW, :NUM_IDS] = np.arange(NUM_IDS)
    ids[CAR_ROWS, FIRST_CAR] = ids[CAR_ROWS, SECOND_CAR] = 8
    instances = np.zeros(size, dtype=np.int64)
    instances[CAR_ROWS, FIRST_CAR], instances[CAR_ROWS, SECOND_CAR] = 300, 301
    write_48_bit(folder / "GT" / "LABELS" / f"{frame}.png", ids, instances, np.zeros_like(ids))

    focal = FOCAL_PER_WIDTH * size[1]
    centimetres = np.round(100 * plane_depth(size, (focal, focal, size[1] / 2, size[0] / 2), distance=20.0 + number))
    depth = centimetres / 100
    centimetres[0, : len(DEPTHS)], depth[0, : len(DEPTHS)] = list(DEPTHS), list(DEPTHS.values())
    write_48_bit(folder / "Depth" / "Depth" / f"{frame}.png", centimetres, centimetres, centimetres)

    semseg = torch.full(size, 255)
    for synthia_id, train_id in TRAIN_IDS.items():
        semseg[torch.from_numpy(ids == synthia_id)] = train_id
    return {
        "image": torch.from_numpy(image).permute(2, 0, 1),
        "semseg": semseg,
        "depth": torch.from_numpy(depth.astype(np.float32)),
    }
