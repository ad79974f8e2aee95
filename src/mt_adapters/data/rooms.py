"""Rooms: rendered furnished interiors in which every pixel has every label."""

from __future__ import annotations

import glob
import io
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

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
SPLITS = ("train", "validation")
SAMPLE_DIR = Path(__file__).parent / "sample"

VOID_ID = 0
SEMSEG_NO_LABEL = 255
MILLIMETRES_PER_METRE = 1000
# Rounding to 8 bits moves the length of a unit vector by less than 0.01; more than this is another encoding.
NORMALS_LENGTH_TOLERANCE = 0.1

# Per column: Pillow's mode, which alone tells 8 bits from 16 (datasets would convert silently), and the rule in words.
COLUMNS: dict[str, tuple[str, str]] = {
    "image": ("RGB", "an 8-bit RGB image"),
    "semseg": ("L", "an 8-bit grey PNG of class ids"),
    "depth": ("I;16", "a 16-bit grey PNG of millimetres"),
    "normals": ("RGB", "an 8-bit RGB PNG of n * 0.5 + 0.5"),
    "edges": ("1", "a 1-bit PNG"),
}


class RoomsDataset(Dataset[dict[str, Any]]):
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
        ValueError: unknown split, missing file or column; from `dataset[i]`, a frame that is damaged or stored in
            another encoding, with its row and column.

    Example:
        >>> dataset = RoomsDataset("validation")
        >>> dataset[0]["labels"]["depth"].shape
        torch.Size([128, 128])
    """

    classes: ClassVar[tuple[str, ...]] = ROOMS_CLASSES
    # For the cards of models that were trained on it.
    summary: ClassVar[str] = (
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

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._table[index]
        try:
            arrays = {column: _decode(column, row[column]) for column in COLUMNS}
            _check_same_size(arrays)
            labels = {
                "semseg": _semseg_label(arrays["semseg"]),
                "depth": _depth_label(arrays["depth"]),
                "normals": _normals_label(arrays["normals"]),
                "edges": torch.from_numpy(arrays["edges"].astype(np.float32)),
            }
        except ValueError as error:
            raise ValueError(f"{self.path.name}, row {index}, {error}") from error
        return {"image": torch.from_numpy(arrays["image"]).permute(2, 0, 1).contiguous(), "labels": labels}


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


def _decode(column: str, cell: dict[str, Any] | None) -> np.ndarray:
    """The stored picture as an array (H, W) or (H, W, 3)."""
    mode, rule = COLUMNS[column]
    if cell is None or cell["bytes"] is None:
        raise ValueError(f"column {column!r}: holds no picture; it must be {rule}, stored in the file itself.")
    try:
        with Image.open(io.BytesIO(cell["bytes"])) as picture:
            stored = (picture.format, picture.mode)
            array = np.array(picture)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow reports broken PNG chunks as the last two.
        raise ValueError(f"column {column!r}: the picture is damaged ({error}); write the file anew.") from error
    lossy_label = column != "image" and stored[0] != "PNG"
    if stored[1] != mode or lossy_label:
        raise ValueError(f"column {column!r}: is {stored[0]} of Pillow mode {stored[1]!r}, but must be {rule}.")
    return array


def _check_same_size(arrays: dict[str, np.ndarray]) -> None:
    height_width = arrays["image"].shape[:2]
    for column, array in arrays.items():
        if array.shape[:2] != height_width:
            raise ValueError(
                f"column {column!r}: is {array.shape[0]} x {array.shape[1]} pixels, but the image is "
                f"{height_width[0]} x {height_width[1]}; all labels must have the image's size."
            )


def _semseg_label(ids: np.ndarray) -> Tensor:
    if ids.max() >= len(ROOMS_CLASSES):
        raise ValueError(
            f"column 'semseg': holds class id {ids.max()}; ids go from 0 (void) to {len(ROOMS_CLASSES) - 1}."
        )
    label = ids.astype(np.int64)
    label[label == VOID_ID] = SEMSEG_NO_LABEL
    return torch.from_numpy(label)


def _depth_label(millimetres: np.ndarray) -> Tensor:
    return torch.from_numpy(millimetres.astype(np.float32) / MILLIMETRES_PER_METRE)


def _normals_label(codes: np.ndarray) -> Tensor:
    """Codes uint8 (H, W, 3) to unit vectors (3, H, W)."""
    # The zero vector has no exact code: 127.5 is rounded down or up. Black is what an empty picture holds.
    codes = np.ascontiguousarray(codes.transpose(2, 0, 1))
    no_label = ((codes == 127) | (codes == 128)).all(axis=0) | (codes == 0).all(axis=0)
    vectors = codes.astype(np.float32) * (2 / 255) - 1
    lengths = np.sqrt((vectors * vectors).sum(axis=0))
    lengths[no_label] = 1
    worst = np.abs(lengths - 1).max()
    if worst > NORMALS_LENGTH_TOLERANCE:
        raise ValueError(
            f"column 'normals': vectors are up to {worst:.2f} off unit length; they must be {COLUMNS['normals'][1]}, "
            "with |n| = 1 and (128, 128, 128) where there is no label."
        )
    return torch.from_numpy(np.where(no_label, np.float32(0), vectors / lengths))
