"""Images without labels: a folder of pictures, or the image column of a table."""

from __future__ import annotations

import glob
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
TABLE, COLUMN = "train.parquet", "image"


class Images:
    """Pictures as uint8 (3, H, W), upright; nothing but the pictures is read.

    Args:
        sources: picture files, or rows of a table that hold a picture's bytes under "image".
        name: what the pictures are, for messages.
        fingerprint: changes where the pictures change.
        numbers: of the sources that count; default: all.

    Raises:
        ValueError: from `images[i]`, a picture that cannot be read, with its file or row.
    """

    def __init__(self, sources: Sequence[Any], name: str, fingerprint: str, numbers: range | None = None) -> None:
        self.sources, self.name, self.fingerprint = sources, name, fingerprint
        self.numbers = range(len(sources)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Tensor:
        source = self.sources[self.numbers[index]]
        try:
            with Image.open(source if isinstance(source, Path) else io.BytesIO(source[COLUMN]["bytes"])) as picture:
                array = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
        except (
            OSError,
            SyntaxError,
            TypeError,
            ValueError,
        ) as error:  # Pillow reports broken PNG chunks as SyntaxError.
            where = str(source) if isinstance(source, Path) else f"row {self.numbers[index]} of {self.name}"
            raise ValueError(f"the picture {where!r} cannot be read ({error}): write it anew, or remove it") from error
        return torch.from_numpy(array).permute(2, 0, 1).contiguous()

    def split(self, share: float) -> tuple[Images, Images]:
        """The images without the last ones, and these: `share` of all, at least one. Neighbours stay together."""
        if len(self) < 2 or not 0 < share < 1:
            raise ValueError(
                f"{share} of {len(self)} images cannot be held out; at least two images are needed, and a share "
                "between 0 and 1: add images, or correct holdout"
            )
        first = len(self) - min(max(1, round(share * len(self))), len(self) - 1)
        train, holdout = (
            Images(self.sources, self.name, f"{self.fingerprint}; {part}", part)
            for part in (self.numbers[:first], self.numbers[first:])
        )
        return train, holdout


def open_images(folder: str | Path) -> Images:
    """All pictures in a folder and its folders, in the order of their names; or, of a rooms folder, the training set.

    Raises:
        ValueError: if the folder does not exist or holds no picture.
    """
    folder = Path(folder)
    if (folder / TABLE).is_file():
        return _table_images(folder / TABLE)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    if not files:
        what = "holds no pictures" if folder.is_dir() else "does not exist"
        raise ValueError(
            f"the folder {str(folder)!r} {what}: give data_dir a folder with files that end in {', '.join(ENDINGS)}, "
            f"or one with {TABLE}, whose column {COLUMN!r} holds pictures"
        )
    sizes = "; ".join(f"{path.relative_to(folder)} {path.stat().st_size}" for path in files)
    return Images(files, folder.name, sizes)


def _table_images(path: Path) -> Images:
    # Here, and not above: importing the package must not import datasets.
    import datasets

    # load_dataset takes names for patterns: a folder called "rooms [1]" would not be found.
    table = datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
    if COLUMN not in table.column_names:
        raise ValueError(
            f"{str(path)!r} has the columns {table.column_names}; pictures are read from {COLUMN!r}: rename the "
            "column, or give a folder of picture files"
        )
    table = table.select_columns([COLUMN]).cast_column(COLUMN, datasets.Image(decode=False))
    return Images(table, path.name, f"{path.name} {path.stat().st_size} {len(table)}")
