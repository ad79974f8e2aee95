"""PNG files of three channels of 16 bits, which Pillow cannot write; each row by its own rule of prediction."""

import struct
import zlib
from pathlib import Path

import numpy as np

BYTES_PER_PIXEL = 6


def png_48_bit(array: np.ndarray, filters: tuple[int, ...] = (0, 1, 2)) -> bytes:
    """The bytes of such a file.

    Args:
        array: (H,W,3) of 0 to 65535.
        filters: the filter types (0 to 4) that the rows take in turn.
    """
    height, width, _ = array.shape
    rows = array.astype(">u2").tobytes()
    num_bytes = width * BYTES_PER_PIXEL
    above, stored = bytes(num_bytes), bytearray()
    for y in range(height):
        row = rows[y * num_bytes : (y + 1) * num_bytes]
        kind = filters[y % len(filters)]
        stored.append(kind)
        for i, value in enumerate(row):
            left, corner = (row[i - BYTES_PER_PIXEL], above[i - BYTES_PER_PIXEL]) if i >= BYTES_PER_PIXEL else (0, 0)
            stored.append((value - prediction(kind, left, above[i], corner)) % 256)
        above = row
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(stored))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def prediction(kind: int, left: int, up: int, corner: int) -> int:
    if kind < 4:
        return (0, left, up, (left + up) // 2)[kind]
    nearest = {abs(left + up - corner - value): value for value in (corner, up, left)}
    return nearest[min(nearest)]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def write_48_bit(path: Path, first: np.ndarray, second: np.ndarray, third: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_48_bit(np.stack([first, second, third], axis=-1)))
