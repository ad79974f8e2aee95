"""Thick lines to lines of one pixel.

By the rules of Guo and Hall, "Parallel thinning with two-subiteration algorithms" (CACM 1989, algorithm A1), which
MATLAB's `bwmorph(..., "thin")` and scikit-image's `thin` follow too.
"""

from __future__ import annotations

import numpy as np

# Neighbours x1 to x8 as (row, column): from the east, against the clock.
NEIGHBOURS = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))


def _removable() -> tuple[np.ndarray, np.ndarray]:
    """For each subiteration, bool (256,): whether a pixel goes, by its neighbours as the bits x1 (lowest) to x8."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1 == 1
    x1, x2, x3, x4, x5, x6, x7, x8 = bits.T
    odd, even, next_odd = bits[:, 0::2], bits[:, 1::2], np.roll(bits, -2, axis=1)[:, 0::2]
    # Their conditions a (it joins nothing), b (it is no end of a line) and c (the side whose turn it is).
    has_one_side = (~odd & (even | next_odd)).sum(axis=1) == 1
    num_pairs = np.minimum((odd | even).sum(axis=1), (even | next_odd).sum(axis=1))
    may_go = has_one_side & (num_pairs >= 2) & (num_pairs <= 3)
    return may_go & ~((x2 | x3 | ~x8) & x1), may_go & ~((x6 | x7 | ~x4) & x5)


REMOVABLE = _removable()


def thin(mask: np.ndarray) -> np.ndarray:
    """A bool mask (H,W) whose lines are one pixel thick and connected as before.

    Example:
        >>> thin(np.ones((3, 7), dtype=bool)).astype(int)
        array([[0, 0, 0, 0, 0, 0, 0],
               [0, 1, 1, 1, 1, 1, 0],
               [0, 0, 0, 0, 0, 0, 0]])
    """
    # MATLAB's arrays come column by column, and `ravel` of such would be a copy.
    padded = np.ascontiguousarray(np.pad(mask, 1))
    pixels = padded.ravel().view(np.uint8)
    offsets = [down * padded.shape[1] + right for down, right in NEIGHBOURS]
    left, num_before = np.flatnonzero(pixels), -1
    while len(left) != num_before:
        num_before = len(left)
        for removable in REMOVABLE:
            codes = np.zeros(len(left), dtype=np.uint8)
            for bit, offset in enumerate(offsets):
                codes |= pixels[left + offset] << bit
            goes = removable[codes]
            pixels[left[goes]] = 0
            left = left[~goes]
    return padded[1:-1, 1:-1]
