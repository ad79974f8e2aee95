"""Frames of the rooms set: exposure, the encodings of its columns, and parquet files of them."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

JPEG_QUALITY = 95
MILLIMETRES_PER_METRE = 1000
MAX_MILLIMETRES = 2**16 - 1
PICTURES = ("image", "depth", "normals", "semseg", "edges")
# Tells `datasets` which columns are pictures.
FEATURES = {
    **{name: {"_type": "Image"} for name in PICTURES},
    "room": {"dtype": "string", "_type": "Value"},
    "room_type": {"dtype": "string", "_type": "Value"},
    "fov_degrees": {"dtype": "float32", "_type": "Value"},
}
_PICTURE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
SCHEMA = pyarrow.schema(
    [(name, _PICTURE) for name in PICTURES]
    + [("room", pyarrow.string()), ("room_type", pyarrow.string()), ("fov_degrees", pyarrow.float32())],
    metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
)
# The mean of the shipped sample's pixels is 139 of 255 with little spread.
MEAN_BRIGHTNESS = 139 / 255
SHOULDER = 0.75


def expose(radiance: np.ndarray, stops: float = 0.0) -> np.ndarray:
    """Radiance to sRGB uint8 (H, W, 3): the mean pixel is `MEAN_BRIGHTNESS`, then `stops` brighter.

    Radiance above `SHOULDER` is compressed, so that lamps and windows keep some colour.
    """
    low, high = 1e-4, 1e4
    for _ in range(40):  # The mean grows with the gain, so halving the interval finds it.
        gain = np.sqrt(low * high)
        if _tone(radiance * gain).mean() < MEAN_BRIGHTNESS:
            low = gain
        else:
            high = gain
    return (_tone(radiance * gain * 2**stops) * 255 + 0.5).astype(np.uint8)


def _tone(linear: np.ndarray) -> np.ndarray:
    linear = np.maximum(linear, 0)
    room = 1 - SHOULDER
    bright = SHOULDER + room * (1 - np.exp(-(np.maximum(linear, SHOULDER) - SHOULDER) / room))
    linear = np.where(linear < SHOULDER, linear, bright)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)


def encode_frame(
    image: np.ndarray, depth: np.ndarray, normals: np.ndarray, semseg: np.ndarray, edges: np.ndarray
) -> dict[str, Any]:
    """The five pictures of a frame as the bytes of JPEG and PNG files.

    `image` is uint8 (H, W, 3), `depth` metres (H, W), `normals` unit vectors or zeros (H, W, 3), `semseg` class ids
    (H, W), `edges` bool (H, W).
    """
    millimetres = np.clip(np.round(depth * MILLIMETRES_PER_METRE), 0, MAX_MILLIMETRES).astype(np.uint16)
    codes = np.round(np.clip(normals * 0.5 + 0.5, 0, 1) * 255).astype(np.uint8)
    return {
        "image": _file(Image.fromarray(image), format="JPEG", quality=JPEG_QUALITY),
        "depth": _file(Image.fromarray(millimetres), format="PNG"),
        "normals": _file(Image.fromarray(codes), format="PNG"),
        "semseg": _file(Image.fromarray(semseg.astype(np.uint8)), format="PNG"),
        "edges": _file(Image.fromarray(edges.astype(bool)), format="PNG"),
    }


def _file(picture: Image.Image, **options: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    picture.save(buffer, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def write_frames(path: Path, frames: list[dict[str, Any]], notes: dict[str, Any]) -> None:
    """Writes a parquet file whole or not at all; `notes` are kept in its metadata as JSON."""
    table = pyarrow.Table.from_pylist(frames, schema=SCHEMA)
    _write(path, table.replace_schema_metadata({**SCHEMA.metadata, "rooms_renderer": json.dumps(notes)}))


def read_notes(path: Path) -> dict[str, Any]:
    return json.loads(pyarrow.parquet.read_schema(path).metadata[b"rooms_renderer"])


def join_files(path: Path, parts: list[Path]) -> int:
    """One parquet file of several, row group by row group; returns the number of frames."""
    temporary = path.with_suffix(".tmp")
    num_frames = 0
    with pyarrow.parquet.ParquetWriter(temporary, SCHEMA) as writer:
        for part in parts:
            table = pyarrow.parquet.read_table(part).replace_schema_metadata(SCHEMA.metadata)
            writer.write_table(table)
            num_frames += table.num_rows
    os.replace(temporary, path)
    return num_frames


def _write(path: Path, table: pyarrow.Table) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    pyarrow.parquet.write_table(table, temporary)
    os.replace(temporary, path)
