"""A small Virtual KITTI 2 in its true layout, with known values."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from layouts.tilted_plane import plane_depth

# Frames of Camera_0, in the order of the reader.
FRAMES = {
    "train": ["Scene01/clone/Camera_0/00000", "Scene01/clone/Camera_0/00001", "Scene20/15-deg-left/Camera_0/00000"],
    "validation": ["Scene02/fog/Camera_0/00000"],
}
COLORS_TXT = """Category r g b
Terrain 210 0 200
Sky 90 200 255
Tree 0 199 0
Vegetation 90 240 0
Building 140 140 140
Road 100 60 100
GuardRail 250 100 255
TrafficSign 255 255 0
TrafficLight 200 200 0
Pole 255 130 0
Misc 80 80 80
Truck 160 60 60
Car 255 127 80
Van 0 139 139
Undefined 0 0 0
"""
COLORS = {line.split()[0]: tuple(map(int, line.split()[1:])) for line in COLORS_TXT.splitlines()[1:]}
# The place of each of the colours among the 8 classes that Cityscapes has, too.
SHARED = (255, 6, 5, 5, 1, 0, 255, 4, 3, 2, 255, 7, 7, 7, 255)
DEPTHS = {0: 0.0, 1: 0.01, 256: 2.56, 65534: 655.34, 65535: 0.0}
ID_ROW = 6
# K[0,0], K[1,1], K[0,2], K[1,2]; from the middle of the first pixel.
CAMERA = (70.5, 66.25, 30.5, 23.0)


def write_vkitti2(folder: Path, size: tuple[int, int] = (48, 64)) -> dict[str, dict[str, Tensor]]:
    """Writes three train frames and one validation frame, from both cameras; `size` is from 40 x 40 to 96 x 96.

    Returns:
        by the name of the frame its size, semseg (8 classes) and depth. Images are JPEG, so not exact.
    """
    known = {}
    for number, frame in enumerate(frame for frames in FRAMES.values() for frame in frames):
        for camera in (0, 1):
            name = frame.replace("Camera_0", f"Camera_{camera}")
            known[name] = _write_frame(folder, name, number + 10 * camera, size)
    return known


def file_of(folder: Path, frame: str, kind: str, prefix: str, ending: str = "png") -> Path:
    scene, variation, camera, number = frame.split("/")
    return folder / scene / variation / "frames" / kind / camera / f"{prefix}_{number}.{ending}"


def _write_frame(folder: Path, frame: str, number: int, size: tuple[int, int]) -> dict[str, Tensor]:
    # Smooth, so that a JPEG keeps it: red grows to the right, green downwards, blue tells the frames apart.
    image = np.zeros((*size, 3), dtype=np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = np.arange(size[1]) * 2, np.arange(size[0])[:, None] * 3, number * 10

    places = np.full(size, list(COLORS).index("Tree"))
    places[:5], places[30:] = list(COLORS).index("Sky"), list(COLORS).index("Road")
    places[ID_ROW, : len(COLORS)] = np.arange(len(COLORS))
    colors = np.array(list(COLORS.values()), dtype=np.uint8)[places]

    focal_x, focal_y, column, row = CAMERA
    planar = plane_depth(size, (focal_x, focal_y, column + 0.5, row + 0.5), distance=20.0 + number)
    centimetres = np.round(100 * planar)
    depth = centimetres / 100
    centimetres[0, : len(DEPTHS)], depth[0, : len(DEPTHS)] = list(DEPTHS), list(DEPTHS.values())

    pictures = {
        ("rgb", "rgb", "jpg"): image,
        ("classSegmentation", "classgt", "png"): colors,
        ("depth", "depth", "png"): centimetres.astype(np.uint16),
    }
    for (kind, prefix, ending), picture in pictures.items():
        path = file_of(folder, frame, kind, prefix, ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path, **({"quality": 95} if ending == "jpg" else {}))
    scene, variation, *_ = frame.split("/")
    # The left and the right camera differ here (not in the true set), so that a wrong line shows.
    lines = [
        f"{index} {camera} {focal_x + camera} {focal_y + 2 * index} {column} {row}"
        for index in (0, 1)
        for camera in (0, 1)
    ]
    header = "frame cameraID K[0,0] K[1,1] K[0,2] K[1,2]"
    (folder / scene / variation / "intrinsic.txt").write_text("\n".join([header, *lines]) + "\n")
    (folder / scene / variation / "colors.txt").write_text(COLORS_TXT)
    return {
        "image": torch.from_numpy(image).permute(2, 0, 1),
        "semseg": torch.tensor(SHARED)[torch.from_numpy(places)],
        "depth": torch.from_numpy(depth.astype(np.float32)),
    }
