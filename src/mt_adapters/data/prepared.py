"""Prepared data sets: any data set in our own codes, in parquet files that are read frame by frame.

    info.json                              what it is: labels, classes, depth unit, files, report
    train-00000-of-00007.parquet  ...      one row a frame: name, image, and a picture for each label

`examples/prepare_data.py` writes them; `datasets.load_dataset("parquet", data_files=...)` loads or streams them too.

| label | stored as |
|---|---|
| class ids | 8-bit PNG, 255 = no label |
| depth | 16-bit PNG, in units of `depth_unit` metres, 0 = no label |
| normals | 8-bit RGB PNG of n * 0.5 + 0.5, (128, 128, 128) = no label |
| edges | 16-bit PNG of value * 65534, 65535 = no label |

A label that a frame lacks is null. Rounding moves a normal by up to 0.4 degrees, an edge by 8e-6, a depth by half a
unit.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mt_adapters.data.frames import SPLITS, FrameDataset
from mt_adapters.data.pictures import (
    IDS_8_BIT,
    NORMALS_8_BIT,
    RGB,
    SEMSEG_NO_LABEL,
    BadSampleError,
    StoredLabel,
    class_ids,
    decode_picture,
    encode_png,
    grey_16_bit,
    id_table,
    metres,
    open_picture,
    unit_vectors,
)
from mt_adapters.data.sampling import SHARDS_AT_ONCE

INFO_FILE = "info.json"
# Small, so that one frame costs little more than its own bytes.
FRAMES_PER_ROW_GROUP = 4
MAX_CODE = 65535
EDGE_STEPS = 65534
RULES = {"depth": grey_16_bit("depth codes"), "normals": NORMALS_8_BIT, "edges": grey_16_bit("edge codes")}


class PreparedDataset(FrameDataset):
    """A data set that `examples/prepare_data.py` wrote.

    Args:
        split: "train" or "validation".
        data_dir: folder with `info.json` and the parquet files.

    Raises:
        ValueError: unknown split, or a folder without a complete prepared data set; from `dataset[i]` (a
            `BadSampleError`), a frame that is damaged, with its file, row and column.
    """

    def __init__(self, split: str, data_dir: str | Path | None) -> None:
        self.root = Path(data_dir or "")
        info = read_info(self.root)
        if info is None:
            raise ValueError(
                f"there is no {INFO_FILE} in {str(data_dir)!r}: give data_dir a folder that examples/prepare_data.py "
                "has written to its end, or run it again to go on"
            )
        if split not in info["splits"]:
            raise ValueError(
                f"unknown split {split!r}; {str(data_dir)!r} has: {', '.join(info['splits'])}"
                + (f". Prepare it: prepare_data.py ... --splits {split}" if split in SPLITS else "")
            )
        self.set_name, self.summary = info["set"], info["summary"]
        self.depth_unit = info["depth_unit"]
        self.labels = {name: None if names is None else tuple(names) for name, names in info["labels"].items()}
        self._tables = {
            name: id_table({code: code for code in range(len(names))}, no_label=[SEMSEG_NO_LABEL])
            for name, names in self.labels.items()
            if names is not None
        }
        self._shards = [(self.root / shard["file"], shard["num_frames"]) for shard in info["splits"][split]["shards"]]
        self._starts = [0, *accumulate(num_frames for _, num_frames in self._shards)]
        self._open: dict[Path, Any] = {}
        self._process = os.getpid()

    @property
    def shard_lengths(self) -> list[int]:
        return [num_frames for _, num_frames in self._shards]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def name(self, index: int) -> str:
        return self._frame(index)["name"]

    def _frame(self, index: int) -> dict[str, Any]:
        """The row's columns, read when they are asked for, and where it stands."""
        number = bisect_right(self._starts, index) - 1
        path, num_frames = self._shards[number]
        file = self._file(path, num_frames)
        group, row = divmod(index - self._starts[number], FRAMES_PER_ROW_GROUP)
        columns = ["name", "image", *self.labels]
        # Without threads: those of a process that was forked do not answer.
        table = file.read_row_group(group, columns=columns, use_threads=False).slice(row, 1)
        values = table.to_pylist()[0]
        return values | {"where": f"{path.name}, row {index - self._starts[number]} ({values['name']})"}

    def _file(self, path: Path, num_frames: int) -> Any:
        # Here, and not above: pyarrow comes with the extra "train".
        import pyarrow.parquet

        if self._process != os.getpid():
            self._open, self._process = {}, os.getpid()
        if path not in self._open:
            try:
                file = pyarrow.parquet.ParquetFile(path, memory_map=True)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{str(path)!r} is missing or damaged ({error}): prepare the data set again"
                ) from error
            metadata = file.metadata
            sizes = {metadata.row_group(group).num_rows for group in range(metadata.num_row_groups - 1)}
            if metadata.num_rows != num_frames or not sizes <= {FRAMES_PER_ROW_GROUP}:
                raise ValueError(
                    f"{str(path)!r} has {metadata.num_rows} frames in groups of {sorted(sizes)}, but {INFO_FILE} says "
                    f"{num_frames} in groups of {FRAMES_PER_ROW_GROUP}: the files do not belong together; prepare the "
                    "data set again"
                )
            while len(self._open) >= 2 * SHARDS_AT_ONCE:
                self._open.pop(next(iter(self._open)))
            self._open[path] = file
        return self._open[path]

    def _image(self, frame: dict[str, Any]) -> Image.Image:
        return open_picture(self._image_bytes(frame), RGB, f"{frame['where']}, column 'image'")

    def _image_bytes(self, frame: dict[str, Any]) -> bytes:
        if not frame["image"] or frame["image"]["bytes"] is None:
            raise BadSampleError(f"{frame['where']}, column 'image': holds no picture")
        return frame["image"]["bytes"]

    def _label(self, frame: dict[str, Any], label: str) -> StoredLabel | None:
        if frame[label] is None:
            return None
        name = f"{frame['where']}, column {label!r}"
        codes = decode_picture(frame[label]["bytes"], RULES.get(label, IDS_8_BIT), name)
        decode = partial(
            decode_label, label=label, name=name, depth_unit=self.depth_unit, table=self._tables.get(label)
        )
        return StoredLabel(codes, decode)


def read_info(folder: Path) -> dict[str, Any] | None:
    """What `info.json` says; None where there is no such file.

    Raises:
        ValueError: if it is damaged, or names files outside of its folder.
    """
    file = folder / INFO_FILE
    if not file.is_file():
        return None
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        names = [shard["file"] for split in info["splits"].values() for shard in split["shards"]]
        lengths = [shard["num_frames"] for split in info["splits"].values() for shard in split["shards"]]
        is_valid = all(Path(name).name == name for name in names) and all(
            isinstance(n, int) and n >= 0 for n in lengths
        )
        is_valid = (
            is_valid
            and isinstance(info["labels"], dict)
            and info["depth_unit"] > 0
            and {"set", "summary"} <= info.keys()
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} is damaged ({error}): prepare the data set again") from error
    if not is_valid:
        raise ValueError(f"{str(file)!r} is damaged, or not of a prepared data set: prepare the data set again")
    return info


def decode_label(codes: np.ndarray, label: str, name: str, depth_unit: float, table: np.ndarray | None) -> Tensor:
    """A stored picture as a label in its task's units.

    Raises:
        BadSampleError: for a class id out of range, or vectors that are not of unit length.
    """
    if table is not None:
        return class_ids(codes, table, name)
    if label == "depth":
        return metres(codes, depth_unit)
    if label == "normals":
        return unit_vectors(codes, name)
    edges = torch.from_numpy(codes.astype(np.float32) / EDGE_STEPS)
    edges[torch.from_numpy(codes == MAX_CODE)] = torch.nan
    return edges


def encode_label(label: str, value: Tensor, name: str, depth_unit: float, has_classes: bool) -> bytes:
    """A label in its task's units as the PNG that `decode_label` reads.

    Raises:
        BadSampleError: for a depth that 16 bits do not hold.
    """
    if has_classes:
        return encode_png(value.numpy().astype(np.uint8))
    if label == "depth":
        known = value > 0
        codes = torch.where(known, (value.double() / depth_unit).round().clamp(min=1), 0.0)
        if codes.max() > MAX_CODE:
            raise BadSampleError(
                f"{name}: a depth of {value.nan_to_num(0.0).max():.1f} m is more than {MAX_CODE} units of "
                f"{depth_unit:.4g} m hold: leave it out as no label in the reader"
            )
        return encode_png(codes.numpy().astype(np.uint16))
    if label == "normals":
        codes = ((value.double() * 0.5 + 0.5) * 255).round()
        codes[:, (value == 0).all(dim=0)] = 128
        return encode_png(codes.permute(1, 2, 0).numpy().astype(np.uint8))
    codes = torch.where(value.isnan(), MAX_CODE, (value.double() * EDGE_STEPS).round())
    return encode_png(codes.numpy().astype(np.uint16))
