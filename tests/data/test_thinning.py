"""Thinning: what scikit-image makes of a mask, and what the paper's conditions say, pixel by pixel."""

import doctest

import numpy as np
import pytest

from mt_adapters.data import thinning
from mt_adapters.data.thinning import thin

# What `thin` of scikit-image 0.26 makes of THICK.
THICK = """
......###.....
......##......
......##......
..#######.....
.#########....
.####.#####...
..##...####...
.........###..
..........#...
"""
THIN = """
.......##.....
......#.......
......#.......
......#.......
...#####......
..#.....#.....
.........#....
..........#...
..............
"""


def mask(drawing: str) -> np.ndarray:
    return np.array([[sign == "#" for sign in line] for line in drawing.split()])


def thinned_by_loops(mask: np.ndarray) -> np.ndarray:
    """Guo and Hall's algorithm A1, one pixel at a time: N(P), C(P) and the two sides."""
    image = np.pad(mask, 1).astype(int)
    while True:
        before = image.sum()
        for is_first in (True, False):
            removed = []
            for row, column in zip(*np.nonzero(image), strict=True):
                north, south = image[row - 1], image[row + 1]
                n, ne, e = north[column], north[column + 1], image[row, column + 1]
                se, s, sw = south[column + 1], south[column], south[column - 1]
                w, nw = image[row, column - 1], north[column - 1]
                pairs = ((1 - n) & (ne | e)) + ((1 - e) & (se | s)) + ((1 - s) & (sw | w)) + ((1 - w) & (nw | n))
                clockwise, other_way = (
                    (nw | n) + (ne | e) + (se | s) + (sw | w),
                    (n | ne) + (e | se) + (s | sw) + (w | nw),
                )
                side = (n | ne | (1 - se)) & e if is_first else (s | sw | (1 - nw)) & w
                if pairs == 1 and 2 <= min(clockwise, other_way) <= 3 and not side:
                    removed.append((row, column))
            for place in removed:
                image[place] = 0
        if image.sum() == before:
            return image[1:-1, 1:-1] == 1


def test_a_mask_is_thinned_as_by_scikit_image() -> None:
    assert np.array_equal(thin(mask(THICK)), mask(THIN))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.7, 0.9])
def test_random_masks_are_thinned_by_the_conditions_of_the_paper(share: float) -> None:
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (1, 9), (12, 20), (17, 5)):
        noise = rng.random((height, width)) < share
        before = noise.copy()
        assert np.array_equal(thin(noise), thinned_by_loops(noise))
        assert np.array_equal(noise, before), "the mask itself stays as it is"


def test_a_mask_that_lies_column_by_column_in_memory_is_thinned_alike() -> None:
    assert np.array_equal(thin(np.asfortranarray(mask(THICK))), mask(THIN))


def test_nothing_and_thin_lines_stay() -> None:
    assert not thin(np.zeros((3, 4), dtype=bool)).any()
    assert np.array_equal(thin(np.eye(5, dtype=bool)), np.eye(5, dtype=bool))


def test_the_example_of_the_docstring_holds() -> None:
    assert doctest.testmod(thinning) == (0, 1)
