"""Small components of Omnidata's starter set in their true layout, with known values."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from layouts import taskonomy
from layouts.tilted_plane import NORMAL

FRAMES = {
    "taskonomy": taskonomy.FRAMES,
    "replica": {
        "train": ["frl_apartment_1/point_0_view_0", "room_0/point_12_view_1"],
        "validation": ["office_0/point_5_view_3"],
    },
    "hypersim": {
        "train": ["ai_001_001-cam_00/point_3_view_0", "ai_001_001-cam_01/point_7_view_0"],
        "validation": ["ai_003_010-cam_00/point_0_view_0"],
    },
}
NUM_CLASSES = {"replica": 101, "hypersim": 40}
ID_ROW = 6
# A camera that is tilted against its picture, row by row; x right, y up, it looks along -z.
CAMERA = (0.577, 0.0, 0.01, 0.0, 0.433, 0.02, 0.0, 0.035, -1.003)
SPLIT_FILE = "id,train,val,test\nai_001_001,1,0,0\nai_009_009,1,0,0\nai_003_010,0,1,0\nai_005_005,0,0,1\n"


def write_omnidata(
    folder: Path, size: tuple[int, int] = (48, 64), component: str = "replica"
) -> dict[str, dict[str, Tensor]]:
    """Writes two or three train frames and one validation frame; `size` is from 40 x 40 to 96 x 96.

    Returns:
        by the name of the frame its image (3,H,W), semseg, depth, normals and edges (of edge_texture). The depth of
        hypersim is not exact: its distances are rounded.
    """
    known = {}
    frames = [frame for frames in FRAMES[component].values() for frame in frames]
    for number, frame in enumerate(frames):
        known[frame] = taskonomy.write_frame(folder, template_of(component), frame, number, size)
        if component != "taskonomy":
            taskonomy.file_of(folder, template_of(component), frame, "segment_semantic").unlink()
            known[frame]["semseg"] = _write_classes(folder, component, frame, size)
        if component == "hypersim":
            known[frame]["depth"] = _write_distances(folder, frame, 2.0 + number, size)
    if component == "hypersim":
        (folder / "train_val_test_hypersim.csv").write_text(SPLIT_FILE)
        columns = [f"M_cam_from_uv_{row}{column}" for row in range(3) for column in range(3)]
        lines = [",".join(["scene_name", "settings_output_img_width", *columns])]
        lines += [",".join([scene, "1024", *map(str, CAMERA)]) for scene in ("ai_001_001", "ai_003_010")]
        lines += [",".join(["ai_002_002", "1024", *[""] * 9])]
        (folder / "metadata_camera_parameters.csv").write_text("\n".join(lines) + "\n")
    return known


def template_of(component: str) -> str:
    return f"{{domain}}/{component}/{{building}}"


def file_of(folder: Path, component: str, frame: str, domain: str, ending: str = "png") -> Path:
    return taskonomy.file_of(folder, template_of(component), frame, domain, ending)


def _write_classes(folder: Path, component: str, frame: str, size: tuple[int, int]) -> Tensor:
    """Red is the class, green and blue are the instance."""
    num_codes = min(NUM_CLASSES[component] + 1, size[1])
    packed = np.zeros((*size, 3), dtype=np.uint8)
    packed[..., 0], packed[30:, :, 0], packed[20:30, 5:20, 0] = 1, 2, NUM_CLASSES[component]
    packed[ID_ROW, :num_codes, 0] = np.arange(num_codes)
    packed[ID_ROW + 1, :3] = 255
    packed[20:30, 5:20, 1:] = (1, 44)
    path = file_of(folder, component, frame, "semantic")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(packed).save(path)
    semseg = torch.from_numpy(packed[..., 0].astype(np.int64)) - 1
    semseg[(semseg < 0) | (semseg == 254)] = 255
    return semseg


def _write_distances(folder: Path, frame: str, plane_distance: float, size: tuple[int, int]) -> Tensor:
    height, width = size
    codes, depth = np.zeros(size, dtype=np.uint16), torch.zeros(size)
    for row in range(height):
        for column in range(width):
            u, v = (column + 0.5) / width * 2 - 1, 1 - (row + 0.5) / height * 2
            ray = [CAMERA[3 * i] * u + CAMERA[3 * i + 1] * v + CAMERA[3 * i + 2] for i in range(3)]
            steps = -plane_distance / sum(n * r for n, r in zip(NORMAL, ray, strict=True))
            codes[row, column] = round(512 * steps * math.sqrt(sum(r * r for r in ray)))
            depth[row, column] = -steps * ray[2]
    codes[0, :2], depth[0, :2] = (0, 65535), 0
    Image.fromarray(codes).save(file_of(folder, "hypersim", frame, "depth_euclidean"))
    # What it holds is not planar depth, so it must not be read.
    Image.fromarray(np.full(size, 9999, dtype=np.uint16)).save(file_of(folder, "hypersim", frame, "depth_zbuffer"))
    return depth
