"""Rooms: rendered furnished interiors in which every pixel has every label."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mt_adapters.data.frames import SPLITS, FrameDataset
from mt_adapters.data.pictures import (
    IDS_8_BIT,
    NORMALS_8_BIT,
    RGB,
    BadSampleError,
    PictureRule,
    StoredLabel,
    class_ids,
    grey_16_bit,
    id_table,
    metres,
    open_picture,
    unit_vectors,
)

ROOMS_CLASSES: tuple[str, ...] = (
    "void",
    "wall",
    "floor",
    "ceiling",
    "window",
    "door",
    "bed",
    "sofa",
    "chair",
    "table",
    "storage",
    "appliance",
    "electronics",
    "lamp",
    "plant",
    "picture",
    "rug",
    "objects",
)
SAMPLE_DIR = Path(__file__).parent / "sample"

VOID_ID = 0
IDS = id_table({code: code for code in range(1, len(ROOMS_CLASSES))}, no_label=[VOID_ID])
COLUMNS: dict[str, PictureRule] = {
    "image": RGB,
    "semseg": IDS_8_BIT,
    "depth": grey_16_bit("millimetres"),
    "normals": NORMALS_8_BIT,
    "edges": PictureRule(("1",), "a 1-bit PNG"),
}


class RoomsDataset(FrameDataset):
    """Frames of rendered rooms with semantic segmentation, depth, surface normals and edges.

    `dataset[i]` is `{"image": uint8 (3, H, W), "labels": {...}}` with the labels

    - `semseg`: int64 (H, W), ids of `ROOMS_CLASSES`, 255 = no label (stored as 0, "void");
    - `depth`: float32 (H, W), planar z in metres, 0 = no label;
    - `normals`: float32 (3, H, W), unit vectors, x right, y up, z towards the camera, zeros = no label;
    - `edges`: float32 (H, W), 0 or 1.

    Args:
        split: "train" or "validation".
        data_dir: folder with `train.parquet` and `validation.parquet`; None is the 128 x 128 sample that the package
            ships. Reading needs the `datasets` package (`pip install "mt-adapters[train]"`), but no network.

    Raises:
        ValueError: unknown split, missing file or column; from `dataset[i]` (a `BadSampleError`), a frame that is
            damaged or stored in another encoding, with its row and column.

    Example:
        >>> dataset = RoomsDataset("validation")
        >>> dataset[0]["labels"]["depth"].shape
        torch.Size([128, 128])
    """

    labels: Mapping[str, tuple[str, ...] | None] = {
        "semseg": ROOMS_CLASSES,
        "depth": None,
        "normals": None,
        "edges": None,
    }
    set_name = "rooms"
    summary = (
        "rooms: path-traced furnished interiors; the package ships a sample of them. Frames CC-BY 4.0, the "
        "furniture models in them CC-BY 3.0 and CC0 (credits in the package's NOTICE)"
    )

    def __init__(self, split: str, data_dir: str | Path | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r}; rooms has: {', '.join(SPLITS)}.")
        self.split = split
        self.path = Path(SAMPLE_DIR if data_dir is None else data_dir) / f"{split}.parquet"
        if not self.path.is_file():
            raise ValueError(
                f"There is no {self.path.name} in the folder {str(self.path.parent)!r}. A rooms folder holds "
                "train.parquet and validation.parquet: correct data_dir, or leave it out (None) to use the sample "
                "that the package ships."
            )
        self._table = _open_table(self.path)

    def __len__(self) -> int:
        return len(self._table)

    def name(self, index: int) -> str:
        return f"{self.path.name}, row {index}"

    def _frame(self, index: int) -> tuple[int, dict[str, Any]]:
        return index, self._table[index]

    def _image(self, frame: tuple[int, dict[str, Any]]) -> Image.Image:
        return self._decode(frame, "image")

    def _image_bytes(self, frame: tuple[int, dict[str, Any]]) -> bytes:
        return frame[1]["image"]["bytes"]

    def _label(self, frame: tuple[int, dict[str, Any]], label: str) -> StoredLabel:
        codes, name = np.array(self._decode(frame, label)), self._column(frame, label)
        if label == "semseg":
            return StoredLabel(codes, partial(class_ids, table=IDS, name=name))
        if label == "depth":
            return StoredLabel(codes, partial(metres, metres_per_code=self.depth_unit))
        if label == "normals":
            return StoredLabel(codes, partial(unit_vectors, name=name))
        return StoredLabel(codes, lambda part: torch.from_numpy(part.astype(np.float32)))

    def _column(self, frame: tuple[int, dict[str, Any]], column: str) -> str:
        return f"{self.name(frame[0])}, column {column!r}"

    def _decode(self, frame: tuple[int, dict[str, Any]], column: str) -> Image.Image:
        rule, cell = COLUMNS[column], frame[1][column]
        if cell is None or cell["bytes"] is None:
            raise BadSampleError(
                f"{self._column(frame, column)}: holds no picture; it must be {rule.words}, stored in the file itself."
            )
        return open_picture(cell["bytes"], rule, self._column(frame, column))


def _open_table(path: Path) -> Any:
    """The parquet file as a memory-mapped table whose image columns stay undecoded."""
    # Here, and not above: importing the package must not import datasets.
    import datasets

    # load_dataset takes names for patterns: a folder called "rooms [1]" would not be found.
    table = datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
    missing = [column for column in COLUMNS if column not in table.column_names]
    if missing:
        raise ValueError(
            f"{str(path)!r} lacks the columns {missing}; rooms needs {list(COLUMNS)}. It is probably another data set."
        )
    table = table.select_columns(list(COLUMNS))
    for column in COLUMNS:
        table = table.cast_column(column, datasets.Image(decode=False))
    return table
