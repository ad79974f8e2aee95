"""Depth of one tilted plane, seen by a pinhole camera: what normals derived from it must be is known."""

import numpy as np

# x right, y up, z towards the camera; all parts differ, so that no two axes can be mixed up.
NORMAL = (1 / 9, 4 / 9, 8 / 9)


def plane_depth(size: tuple[int, int], camera: tuple[float, float, float, float], distance: float) -> np.ndarray:
    """Planar depth in metres, float64 (H,W).

    Args:
        camera: focal lengths and the place of the optical axis in pixels, the corner of the picture being (0, 0).
        distance: of the plane from the camera, in metres.
    """
    focal_x, focal_y, center_x, center_y = camera
    depth = np.zeros(size)
    for row in range(size[0]):
        for column in range(size[1]):
            x, y = (column + 0.5 - center_x) / focal_x, -(row + 0.5 - center_y) / focal_y
            depth[row, column] = distance / (NORMAL[2] - NORMAL[0] * x - NORMAL[1] * y)
    return depth
