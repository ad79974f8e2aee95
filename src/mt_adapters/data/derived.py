"""Labels that a data set lacks, worked out from those that it has. Readers do so only where they are asked to.

Axes: x right, y up, z towards the camera. Shape letters: H height, W width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mt_adapters.data.pictures import SEMSEG_NO_LABEL

# Ours: the rule of the rooms set. Two neighbours whose depths differ by more than this share of the nearer one lie on
# different surfaces.
DEPTH_STEP = 0.06


class Intrinsics(NamedTuple):
    """A pinhole camera in pixels; pixel i covers [i, i + 1), so its centre is at i + 0.5."""

    focal_x: float
    focal_y: float
    center_x: float
    center_y: float


def points_from_depth(depth: Tensor, camera: Intrinsics) -> Tensor:
    """Planar depth (H,W) in metres to points (3,H,W) in metres in the camera's frame."""
    height, width = depth.shape
    columns = (torch.arange(width, dtype=depth.dtype) + 0.5 - camera.center_x) / camera.focal_x
    rows = (torch.arange(height, dtype=depth.dtype) + 0.5 - camera.center_y) / camera.focal_y
    return torch.stack([columns[None, :] * depth, -rows[:, None] * depth, -depth])


def normals_from_depth(depth: Tensor, camera: Intrinsics) -> Tensor:
    """Surface normals (3,H,W) float32 of a depth map (H,W), 0 or NaN = no label.

    A pixel's normal is that of the plane through its four neighbours. Zeros (no label) on the map's border, next to a
    pixel without depth, and where a neighbour lies on another surface (`DEPTH_STEP`).
    """
    normals = torch.zeros(3, *depth.shape)
    points = points_from_depth(depth.double(), camera)
    right = points[:, 1:-1, 2:] - points[:, 1:-1, :-2]
    up = points[:, :-2, 1:-1] - points[:, 2:, 1:-1]
    # Written out: torch's functions over the first dimension are many times slower on CPUs.
    x = right[1] * up[2] - right[2] * up[1]
    y = right[2] * up[0] - right[0] * up[2]
    z = right[0] * up[1] - right[1] * up[0]
    inner = torch.stack([x, y, z]) / (x * x + y * y + z * z).sqrt()
    center = depth[1:-1, 1:-1]
    is_labelled = center > 0
    for neighbour in (depth[1:-1, 2:], depth[1:-1, :-2], depth[:-2, 1:-1], depth[2:, 1:-1]):
        is_labelled &= (neighbour > 0) & ~_is_step(center, neighbour)
    normals[:, 1:-1, 1:-1] = torch.where(is_labelled, inner, 0.0)
    return normals


def edges_from_labels(ids: Tensor | None, depth: Tensor | None) -> Tensor:
    """Edges (H,W) float32, 0 or 1: borders of classes or instances, and steps in depth (`DEPTH_STEP`).

    Args:
        ids: (H,W) class or instance ids, 255 = no label, or None.
        depth: (H,W) metres, 0 or NaN = no label, or None.

    A pixel is an edge where its right or lower neighbour is of another id, or on another surface. NaN (no label) where
    neither says anything of the pixel.
    """
    first = ids if ids is not None else depth
    if first is None:
        raise ValueError("edges need ids or depth; both are None")
    is_edge, is_known = torch.zeros(2, *first.shape, dtype=torch.bool)
    for dim in (0, 1):
        length = first.shape[dim] - 1
        here, there = (slice(None),) * dim + (slice(0, length),), (slice(None),) * dim + (slice(1, None),)
        if ids is not None:
            both = (ids[here] != SEMSEG_NO_LABEL) & (ids[there] != SEMSEG_NO_LABEL)
            is_edge[here] |= both & (ids[here] != ids[there])
        if depth is not None:
            both = (depth[here] > 0) & (depth[there] > 0)
            is_edge[here] |= both & _is_step(depth[here], depth[there])
    if ids is not None:
        is_known |= ids != SEMSEG_NO_LABEL
    if depth is not None:
        is_known |= depth > 0
    return torch.where(is_known, is_edge.float(), torch.nan)


def _is_step(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).abs() > DEPTH_STEP * torch.minimum(one, other)
