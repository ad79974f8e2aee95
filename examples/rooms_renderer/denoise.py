"""Removes the noise of few samples on the CPU: an edge-avoiding wavelet filter on the light, guided by the surfaces.

After Dammertz et al., "Edge-Avoiding A-Trous Wavelet Transform for fast Global Illumination Filtering" (HPG 2010).
Radiance is divided by albedo first, so textures stay as sharp as they are; only the light on them is smoothed.
"""

from __future__ import annotations

import numpy as np

KERNEL = np.array([1, 4, 6, 4, 1]) / 16
NUM_LEVELS = 5
NORMAL_POWER = 64
PLANE_DISTANCE = 0.02  # metres per metre of depth
MIN_ALBEDO = 0.02
# A single path that finds a lamp by chance outshines its neighbourhood by more than this; one where no path finds any
# light is as much darker.
OUTLIER_FACTOR = 2.5


def denoise(
    radiance: np.ndarray, albedo: np.ndarray, normals: np.ndarray, positions: np.ndarray, depth: np.ndarray
) -> np.ndarray:
    """Smoothed radiance (H, W, 3); `depth` (H, W) in metres scales how far from a plane a neighbour may lie."""
    # A surface seen at grazing angle may answer with no number.
    radiance = np.nan_to_num(radiance, nan=0.0, posinf=0.0)
    light = clamp_outliers(radiance / np.maximum(albedo, MIN_ALBEDO))
    normals = normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-6)
    # Noise shrinks from level to level, and with it the difference in brightness that may be noise.
    spread = 2.0
    for level in range(NUM_LEVELS):
        light = _filter(light, normals, positions, np.maximum(depth, 0.1), 2**level, spread)
        spread /= 1.6
    return light * np.maximum(albedo, MIN_ALBEDO)


def clamp_outliers(light: np.ndarray) -> np.ndarray:
    """Pixels far from the median brightness of the 3 x 3 around them are brought closer to it, in their hue."""
    brightness = light.mean(axis=-1)
    median = np.median(_around(brightness), axis=0) + 1e-4
    wanted = np.clip(brightness, median / OUTLIER_FACTOR, median * OUTLIER_FACTOR)
    # The small constant gives black pixels a hue, grey.
    return (light + 1e-5) * (wanted / (brightness + 1e-5))[..., None]


def _around(image: np.ndarray) -> np.ndarray:
    """The 3 x 3 pixels around each one (9, H, W)."""
    padded = np.pad(image, 1, mode="edge")
    height, width = image.shape
    return np.stack([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)])


def _filter(
    light: np.ndarray, normals: np.ndarray, positions: np.ndarray, depth: np.ndarray, step: int, spread: float
) -> np.ndarray:
    reach = 2 * step
    # A pixel's own noise should not decide what it is compared with.
    brightness = np.log(_around(light.mean(axis=-1)).mean(axis=0) + 1e-3)[..., None]
    padded = [
        np.pad(array, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
        for array in (light, normals, positions, brightness)
    ]
    height, width = depth.shape
    total, weights = np.zeros_like(light), np.zeros_like(depth)
    for row, row_weight in enumerate(KERNEL):
        for column, column_weight in enumerate(KERNEL):
            window = (slice(row * step, row * step + height), slice(column * step, column * step + width))
            other_light, other_normals, other_positions, other_brightness = (array[window] for array in padded)
            off_plane = np.abs(((other_positions - positions) * normals).sum(axis=-1)) / (PLANE_DISTANCE * depth)
            aligned = np.clip((other_normals * normals).sum(axis=-1), 0, 1) ** NORMAL_POWER
            brighter = np.abs(other_brightness - brightness)[..., 0] / spread
            weight = row_weight * column_weight * aligned * np.exp(-off_plane - brighter)
            total += other_light * weight[..., None]
            weights += weight
    return total / np.maximum(weights, 1e-9)[..., None]
