"""A small Taskonomy in its true layouts, with known values."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from layouts.tilted_plane import NORMAL, plane_depth

# Buildings of the official tiny split.
FRAMES = {
    "train": ["allensville/point_0_view_0", "allensville/point_10_view_2", "hanson/point_3_view_1"],
    "validation": ["darden/point_4_view_0"],
}
# What omnitools unpacks, what older readers expect, what the sample building is like, and archives as they are named.
FOLDERS = {
    "omnitools": "{domain}/taskonomy/{building}",
    "domains": "{domain}/{building}",
    "buildings": "{building}/{domain}",
    "archives": "{building}_{domain}/{domain}",
}
FIELD_OF_VIEW = 1.2
NUM_CODES = 18
# Strips of known values at the left of one row each.
ID_ROW, DEPTH_ROW, NORMAL_ROW, EDGE_ROW = 6, 0, 0, 10
DEPTHS = {0: 0.0, 1: 1 / 512, 256: 0.5, 1024: 2.0, 65534: 127.99609375, 65535: 0.0}
# Red grows to the right, green downwards, blue away from the camera; ours are right, up, towards it.
NORMALS = {
    (255, 128, 128): (1.0, 0.0, 0.0),
    (0, 128, 128): (-1.0, 0.0, 0.0),
    (128, 0, 128): (0.0, 1.0, 0.0),
    (128, 255, 128): (0.0, -1.0, 0.0),
    (128, 128, 0): (0.0, 0.0, 1.0),
    (128, 128, 128): (0.0, 0.0, 0.0),
}
# (1, -4, -8) / 9.
PLANE_CODE = (142, 71, 14)
# 0.08 * 65535 is 5242.8.
EDGES = {0: 0.0, 1000: 1000 / 5242.8, 5242: 5242 / 5242.8, 5243: 1.0, 65535: 1.0}


def write_taskonomy(
    folder: Path, size: tuple[int, int] = (48, 64), folders: str = "domains"
) -> dict[str, dict[str, Tensor]]:
    """Writes three train frames and one validation frame; `size` is from 40 x 40 to 96 x 96.

    Returns:
        by the name of the frame its image (3,H,W), semseg, depth, normals and edges (of edge_texture).
    """
    return {
        frame: write_frame(folder, FOLDERS[folders], frame, number, size)
        for number, frame in enumerate(frame for frames in FRAMES.values() for frame in frames)
    }


def file_of(folder: Path, template: str, frame: str, domain: str, ending: str = "png") -> Path:
    building, view = frame.split("/")
    name = "segmentsemantic" if domain == "segment_semantic" else domain
    return folder / template.format(domain=domain, building=building) / f"{view}_domain_{name}.{ending}"


def write_frame(folder: Path, template: str, frame: str, number: int, size: tuple[int, int]) -> dict[str, Tensor]:
    height, width = size
    image = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    ids = np.full(size, 1, dtype=np.uint8)
    ids[20:30, 5:20], ids[30:] = 3, 7
    ids[ID_ROW, :NUM_CODES] = np.arange(NUM_CODES)

    focal = width / 2 / math.tan(FIELD_OF_VIEW / 2)
    planar = plane_depth(size, (focal, focal, width / 2, height / 2), distance=2.0 + number)
    codes = np.round(512 * planar)
    depth = codes / 512
    distances = np.zeros(size)
    for row in range(height):
        for column in range(width):
            x, y = (column + 0.5 - width / 2) / focal, (row + 0.5 - height / 2) / focal
            distances[row, column] = np.round(512 * planar[row, column] * math.sqrt(1 + x * x + y * y))
    codes[DEPTH_ROW, : len(DEPTHS)], depth[DEPTH_ROW, : len(DEPTHS)] = list(DEPTHS), list(DEPTHS.values())
    distances[DEPTH_ROW, : len(DEPTHS)] = [code if code in (0, 65535) else 1024 for code in DEPTHS]

    colors = np.full((*size, 3), PLANE_CODE, dtype=np.uint8)
    colors[NORMAL_ROW, : len(NORMALS)] = list(NORMALS)
    normals = torch.tensor(NORMAL).repeat(height, width, 1)
    normals[NORMAL_ROW, : len(NORMALS)] = torch.tensor(list(NORMALS.values()))

    texture = np.zeros(size, dtype=np.uint16)
    texture[:, 40] = 3000
    texture[EDGE_ROW, : len(EDGES)] = list(EDGES)
    edges = torch.zeros(size)
    edges[:, 40] = 3000 / 5242.8
    edges[EDGE_ROW, : len(EDGES)] = torch.tensor(list(EDGES.values()))

    pictures = {
        "rgb": image,
        "segment_semantic": ids,
        "depth_zbuffer": codes.astype(np.uint16),
        "depth_euclidean": distances.astype(np.uint16),
        "normal": colors,
        "edge_texture": texture,
        "edge_occlusion": texture // 20,
    }
    for domain, picture in pictures.items():
        path = file_of(folder, template, frame, domain)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    path = file_of(folder, template, frame, "point_info", "json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"field_of_view_rads": FIELD_OF_VIEW, "resolution": 512, "point_uuid": "0"}))

    semseg = torch.from_numpy(ids.astype(np.int64)) - 1
    semseg[semseg < 0] = 255
    return {
        "image": torch.from_numpy(image).permute(2, 0, 1),
        "semseg": semseg,
        "depth": torch.from_numpy(depth.astype(np.float32)),
        "normals": normals.permute(2, 0, 1),
        "edges": edges,
    }
