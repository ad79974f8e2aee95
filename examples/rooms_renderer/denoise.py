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
# A single path that finds a lamp by chance outshines its neighbourhood by more than this.
FIREFLY_FACTOR = 3.0


def denoise(
    radiance: np.ndarray, albedo: np.ndarray, normals: np.ndarray, positions: np.ndarray, depth: np.ndarray
) -> np.ndarray:
    """Smoothed radiance (H, W, 3); `depth` (H, W) in metres scales how far from a plane a neighbour may lie."""
    light = clamp_fireflies(radiance / np.maximum(albedo, MIN_ALBEDO))
    normals = normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-6)
    # Noise shrinks from level to level, and with it the difference in brightness that may be noise.
    spread = 2.0
    for level in range(NUM_LEVELS):
        light = _filter(light, normals, positions, np.maximum(depth, 0.1), 2**level, spread)
        spread /= 1.6
    return light * np.maximum(albedo, MIN_ALBEDO)


def clamp_fireflies(light: np.ndarray) -> np.ndarray:
    """Pixels that outshine the median of the 3 x 3 around them are brought down to a multiple of it, in their hue."""
    brightness = light.mean(axis=-1)
    padded = np.pad(brightness, 1, mode="edge")
    height, width = brightness.shape
    around = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    limit = FIREFLY_FACTOR * np.median(np.stack(around), axis=0) + 1e-4
    return light * np.minimum(1, limit / np.maximum(brightness, 1e-9))[..., None]


def _filter(
    light: np.ndarray, normals: np.ndarray, positions: np.ndarray, depth: np.ndarray, step: int, spread: float
) -> np.ndarray:
    reach = 2 * step
    padded = [
        np.pad(array, ((reach, reach), (reach, reach), (0, 0)), mode="edge") for array in (light, normals, positions)
    ]
    height, width = depth.shape
    brightness = np.log(light.mean(axis=-1) + 1e-3)
    total, weights = np.zeros_like(light), np.zeros_like(depth)
    for row, row_weight in enumerate(KERNEL):
        for column, column_weight in enumerate(KERNEL):
            window = (slice(row * step, row * step + height), slice(column * step, column * step + width))
            other_light, other_normals, other_positions = (array[window] for array in padded)
            off_plane = np.abs(((other_positions - positions) * normals).sum(axis=-1)) / (PLANE_DISTANCE * depth)
            aligned = np.clip((other_normals * normals).sum(axis=-1), 0, 1) ** NORMAL_POWER
            brighter = np.abs(np.log(other_light.mean(axis=-1) + 1e-3) - brightness) / spread
            weight = row_weight * column_weight * aligned * np.exp(-off_plane - brighter)
            total += other_light * weight[..., None]
            weights += weight
    return total / np.maximum(weights, 1e-9)[..., None]
