"""Checks rendered rooms: do normals agree with depth, and are classes as frequent as in other rooms?

    PYTHONPATH=examples python -m rooms_renderer.check outputs/rooms src/mt_adapters/data/sample

Prints a Markdown table with a column per folder, over both splits.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from PIL import Image

from .cameras import Camera
from .classes import CLASSES
from .labels import normals_from_depth

# Depth is stored in whole millimetres, so neighbouring pixels would give normals that are off by degrees.
REACH = 4


def picture(frame: dict[str, Any], column: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(frame[column]["bytes"])))


def normal_angles(frame: dict[str, Any]) -> np.ndarray:
    """Degrees between the stored normals and those of the surface that the stored depth describes, pixel by pixel."""
    camera = Camera(np.zeros(3), np.eye(3), frame["fov_degrees"])
    from_depth = normals_from_depth(picture(frame, "depth") / 1000, camera, REACH)
    normals = picture(frame, "normals")[REACH:-REACH, REACH:-REACH] / 127.5 - 1
    normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-9)
    return np.degrees(np.arccos(np.clip((from_depth * normals).sum(axis=-1), -1, 1)))


def measure(folder: Path) -> dict[str, str]:
    """What the table shows of a folder with train.parquet and validation.parquet."""
    paths = [folder / f"{split}.parquet" for split in ("train", "validation")]
    counts, angles, depths, edges, brightness = np.zeros(len(CLASSES)), [], [], [], []
    for frame in (frame for path in paths for frame in pyarrow.parquet.read_table(path).to_pylist()):
        counts += np.bincount(picture(frame, "semseg").ravel(), minlength=len(CLASSES))
        angles.append(np.median(normal_angles(frame)))
        depths.append(np.median(picture(frame, "depth")) / 1000)
        edges.append(picture(frame, "edges").mean())
        brightness.append(picture(frame, "image").mean())
    shares = {
        f"{name}, % of pixels": f"{share:.1f}"
        for name, share in zip(CLASSES, counts / counts.sum() * 100, strict=True)
    }
    return {
        "frames": str(len(angles)),
        "normals against depth, median degrees": f"{np.median(angles):.2f}",
        "median depth, metres": f"{np.median(depths):.2f}",
        "edges, % of pixels": f"{np.mean(edges) * 100:.1f}",
        "brightness, of 255": f"{np.mean(brightness):.0f}",
        **shares,
    }


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(f"error: name folders with train.parquet and validation.parquet.\n\n{__doc__}")
    columns = [measure(Path(folder)) for folder in sys.argv[1:]]
    print(f"| | {' | '.join(sys.argv[1:])} |\n|---|{'--:|' * len(columns)}")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(column[name] for column in columns)} |")


if __name__ == "__main__":
    main()
