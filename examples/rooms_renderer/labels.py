"""From what the renderer hits in each pixel to the labels of the rooms set.

Legend: arrays are (H, W) or (H, W, 3); positions are in the room's frame, in metres; `ids` number the pieces.
"""

from __future__ import annotations

import numpy as np

from .cameras import Camera

# Edge rule of the rooms set: on the shipped frames it gives the same pixels (F-score 0.997).
DEPTH_STEP = 0.06
CREASE_DEGREES = 45.0


def planar_depth(positions: np.ndarray, hit: np.ndarray, camera: Camera) -> np.ndarray:
    """Distance along the camera's axis in metres, 0 where nothing was hit."""
    depth = (camera.position - positions) @ camera.axes[2]
    return np.where(hit, depth, 0.0)


def camera_normals(normals: np.ndarray, positions: np.ndarray, hit: np.ndarray, camera: Camera) -> np.ndarray:
    """Unit normals that face the camera, in its frame (x right, y up, z towards it); zeros where nothing was hit."""
    local = normals @ camera.axes.T
    to_camera = (camera.position - positions) @ camera.axes.T
    local = local * np.where((local * to_camera).sum(axis=-1, keepdims=True) < 0, -1, 1)
    length = np.linalg.norm(local, axis=-1, keepdims=True)
    return np.where(hit[..., None], local / np.maximum(length, 1e-9), 0.0)


def edges(ids: np.ndarray, depth: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Pixels unlike their left or upper neighbour: another piece, over 6 % of depth, or over 45 degrees."""
    result = np.zeros(ids.shape, dtype=bool)
    for axis in (0, 1):
        before, after = (slice(None, -1), slice(1, None))
        if axis == 1:
            before, after = (slice(None), before), (slice(None), after)
        nearer = np.minimum(depth[before], depth[after])
        step = np.abs(depth[before] - depth[after]) > DEPTH_STEP * nearer
        crease = (normals[before] * normals[after]).sum(axis=-1) < np.cos(np.radians(CREASE_DEGREES))
        result[after] |= (ids[before] != ids[after]) | step | crease
    return result


def normals_from_depth(depth: np.ndarray, camera: Camera, reach: int = 1) -> np.ndarray:
    """Normals of the surface through the pixels `reach` away on all four sides, to check the renderer's against.

    (H - 2 * reach, W - 2 * reach, 3). Depth in whole millimetres needs a reach of several pixels.
    """
    size = depth.shape[0]
    rays = camera.rays(size) @ camera.axes.T
    points = rays / -rays[..., 2:] * depth[..., None]
    middle = slice(reach, size - reach)
    across = points[middle, 2 * reach :] - points[middle, : size - 2 * reach]
    up = points[: size - 2 * reach, middle] - points[2 * reach :, middle]
    normals = np.cross(across, up)
    return normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)
