"""Stored pictures to labels in our units; what is wrong with one is said with its name and the rule that it breaks."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SEMSEG_NO_LABEL = 255
# In a table of class ids: a code that the data set does not have.
NOT_ALLOWED = -1
# Rounding to 8 bits moves the length of a unit vector by less than 0.01; more than this is another encoding.
NORMALS_LENGTH_TOLERANCE = 0.1


class BadSampleError(ValueError):
    """A frame that cannot be used; says which file or column, what it holds and what it must hold."""


class StoredLabel(NamedTuple):
    """A label as it is stored, (H,W) or (H,W,3), and what turns it, or a part of it, into its task's units.

    Training looks at a part of each frame, and only that part is worth the arithmetic.
    """

    codes: np.ndarray
    decode: Callable[[np.ndarray], Tensor]

    @property
    def size(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]


class PictureRule(NamedTuple):
    """How a picture must be stored.

    Pillow's modes alone tell 8 bits from 16; other readers convert in silence.
    """

    modes: tuple[str, ...]
    words: str
    is_lossless: bool = True


RGB = PictureRule(("RGB",), "an 8-bit RGB image", is_lossless=False)
NORMALS_8_BIT = PictureRule(("RGB",), "an 8-bit RGB PNG of n * 0.5 + 0.5")
IDS_8_BIT = PictureRule(("L",), "an 8-bit grey PNG of class ids")
# A palette only colours the ids for viewers; what is stored are the ids.
IDS_WITH_PALETTE = PictureRule(("P", "L"), "an 8-bit PNG of class ids, with or without a palette")


def grey_16_bit(content: str) -> PictureRule:
    return PictureRule(("I;16",), f"a 16-bit grey PNG of {content}")


def read_file(path: Path) -> bytes:
    """
    Raises:
        BadSampleError: if there is no such file.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadSampleError(f"{str(path)!r}: cannot be read ({error}); get the file again") from error


def read_picture(path: Path, rule: PictureRule) -> np.ndarray:
    """The picture of a file as an array (H,W) or (H,W,3), in the numbers that are stored.

    Raises:
        BadSampleError: if the file is missing, damaged or stored in another way than the rule says.
    """
    return decode_picture(read_file(path), rule, repr(str(path)))


def decode_picture(stored: bytes, rule: PictureRule, name: str) -> np.ndarray:
    """Like `read_picture`; `name` says in errors where the bytes came from."""
    return np.array(open_picture(stored, rule, name))


def open_picture(stored: bytes, rule: PictureRule, name: str) -> Image.Image:
    """The decoded picture, which fits the rule.

    Raises:
        BadSampleError: as `read_picture`.
    """
    try:
        picture = Image.open(io.BytesIO(stored))
        kind, mode = picture.format, picture.mode
        picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow reports broken PNG chunks as SyntaxError or ValueError.
        raise BadSampleError(f"{name}: the picture is damaged ({error}); get or write the file anew.") from error
    if mode not in rule.modes or (rule.is_lossless and kind != "PNG"):
        raise BadSampleError(f"{name}: is {kind} of Pillow mode {mode!r}, but must be {rule.words}.")
    return picture


def encode_png(array: np.ndarray) -> bytes:
    """The bytes of a PNG of an array (H,W) bool, uint8 or uint16, or (H,W,3) uint8."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def id_table(ids: Mapping[int, int], no_label: Sequence[int] = (), size: int = 256) -> np.ndarray:
    """A table for `class_ids`: int64 (size,), code -> class id, 255, or NOT_ALLOWED for all other codes."""
    table = np.full(size, NOT_ALLOWED, dtype=np.int64)
    table[list(ids)] = list(ids.values())
    table[list(no_label)] = SEMSEG_NO_LABEL
    return table


def class_ids(codes: np.ndarray, table: np.ndarray, name: str) -> Tensor:
    """Stored codes (H,W) to class ids int64 (H,W), 255 = no label.

    Raises:
        BadSampleError: if a code is not in the table.
    """
    is_known = codes.max(initial=0) < len(table) and codes.min(initial=0) >= 0
    label = table.take(codes) if is_known else np.array(NOT_ALLOWED)
    if label.min(initial=0) == NOT_ALLOWED:
        allowed = np.flatnonzero(table != NOT_ALLOWED)
        wrong = np.setdiff1d(codes, allowed)[0]
        spans = np.split(allowed, np.flatnonzero(np.diff(allowed) > 1) + 1)
        words = ", ".join(f"{span[0]}" if len(span) == 1 else f"{span[0]} to {span[-1]}" for span in spans)
        raise BadSampleError(f"{name}: holds class id {wrong}; ids are {words}.")
    return torch.from_numpy(label)


def metres(codes: np.ndarray, metres_per_code: float, no_label: Sequence[int] = (0,)) -> Tensor:
    """Stored depth codes (H,W) to metres float32 (H,W), 0 = no label."""
    # Divided where the unit is a whole part of a metre: the nearest float to 6.976 is 6976 / 1000.
    per_metre = round(1 / metres_per_code)
    exact = abs(per_metre * metres_per_code - 1) < 1e-9
    values = codes.astype(np.float32)
    depth = values / np.float32(per_metre) if exact else values * np.float32(metres_per_code)
    for code in no_label:
        depth[codes == code] = 0
    return torch.from_numpy(depth)


def unit_vectors(
    codes: np.ndarray, name: str, axes: tuple[int, int, int] = (1, 1, 1), tolerance: float = NORMALS_LENGTH_TOLERANCE
) -> Tensor:
    """Codes uint8 (H,W,3) of n * 0.5 + 0.5 to unit vectors float32 (3,H,W), zeros = no label.

    Args:
        axes: the signs that turn the stored axes into x right, y up, z towards the camera.
        tolerance: how far a stored vector may be off unit length.

    Raises:
        BadSampleError: if vectors are not of unit length, so stored in another way.
    """
    # The zero vector has no exact code: 127.5 is rounded down or up. Black is what an empty picture holds.
    codes = np.ascontiguousarray(codes.transpose(2, 0, 1))
    middle = (codes == 127) | (codes == 128)
    no_label = (middle[0] & middle[1] & middle[2]) | ~(codes[0] | codes[1] | codes[2]).astype(bool)
    vectors = codes.astype(np.float32)
    vectors -= 127.5
    # Written out: a sum over an axis of three takes several times as long.
    lengths = np.sqrt(vectors[0] * vectors[0] + vectors[1] * vectors[1] + vectors[2] * vectors[2])
    lengths[no_label] = 127.5
    worst = max(lengths.max(initial=127.5) - 127.5, 127.5 - lengths.min(initial=127.5)) / 127.5
    if worst > tolerance:
        raise BadSampleError(
            f"{name}: vectors are up to {worst:.2f} off unit length; they must be {NORMALS_8_BIT.words}, "
            "with |n| = 1 and (128, 128, 128) where there is no label."
        )
    vectors /= lengths
    if axes != (1, 1, 1):
        vectors *= np.array(axes, dtype=np.float32)[:, None, None]
    vectors[:, no_label] = 0
    return torch.from_numpy(vectors)
