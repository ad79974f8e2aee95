"""The layout of PASCAL_MT with known values: two frames to train on, one with a person, and one to validate on."""

from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from PIL import Image

FRAMES = {"train": ("2008_000002", "2008_000003"), "val": ("2008_000007",)}
WITHOUT_PERSON = "2008_000003"
# Drawn from PASCAL-Context, as it has no picture of VOC.
FROM_CONTEXT = "2008_000003"
FLOOR, SKY = 158, 360
# Stored x is left: rows 0 to 15 face left, 16 to 31 up, the others the camera, and of the last row nothing is known.
CODES = (
    ((0, 16), (255, 128, 128)),
    ((16, 32), (128, 255, 128)),
    ((32, None), (128, 128, 255)),
    ((-1, None), (0, 0, 0)),
)


def write_pascal_context(folder: Path, size: tuple[int, int] = (48, 64)) -> dict[str, Any]:
    """Left half: a floor with a person's head and foot on it; right half: sky. Returns the half and the rows."""
    height, width = size
    half = width // 2
    names = ("JPEGImages", "semseg/VOC12", "semseg/pascal-context", "human_parts", "pascal-context/trainval")
    for name in (*names, "normals_distill", "sal_distill", "ImageSets/Context"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for split, frames in FRAMES.items():
        (folder / f"ImageSets/Context/{split}.txt").write_text("".join(f"{frame}\n" for frame in frames))
        for number, frame in enumerate(frames):
            rng = np.random.default_rng(number)
            image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(image).save(folder / f"JPEGImages/{frame}.jpg", quality=95)
            ids = np.zeros(size, dtype=np.uint8)
            ids[:, :half], ids[0] = 15, 255
            picture = Image.fromarray(ids).convert("P")
            picture.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
            kind = "pascal-context" if frame == FROM_CONTEXT else "VOC12"
            picture.save(folder / f"semseg/{kind}/{frame}.png")
            context = np.full(size, SKY, dtype=np.uint16)
            context[:, :half] = FLOOR
            scipy.io.savemat(folder / f"pascal-context/trainval/{frame}.mat", {"LabelMap": context})
            normals = np.zeros((height, width, 3), dtype=np.uint8)
            for (start, stop), code in CODES:
                normals[start:stop] = code
            Image.fromarray(normals).save(folder / f"normals_distill/{frame}.png")
            salient = np.full(size, 127, dtype=np.uint8)
            salient[:, :half] = 128
            Image.fromarray(salient).save(folder / f"sal_distill/{frame}.png")
            # As MATLAB writes no parts: an empty matrix of numbers.
            objects = [
                thing(2, size, {"leye": (0, 4)}),
                ("person", 15, np.ones(size, dtype=np.uint8), np.zeros((0, 0))),
            ]
            if frame != WITHOUT_PERSON:
                objects.append(thing(15, size, {"head": (4, 8), "lfoot": (8, 12), "torso": (12, 16)}))
            write_parts(folder / f"human_parts/{frame}.mat", objects)
    # What readers of the literature leave there; the frames are those of Context.
    (folder / "ImageSets/Parts").mkdir()
    (folder / "ImageSets/Parts/train.txt").write_text(
        '{\n\t"2008_000002": [2, 15, 15],\n\t"2008_000003": [2, 15]\n}\n'
    )
    return {"half": half}


def thing(class_ind: int, size: tuple[int, int], parts: dict[str, tuple[int, int]]) -> tuple[Any, ...]:
    """An object of some parts, each a span of rows."""
    stored = np.empty((1, len(parts)), dtype=[("part_name", "O"), ("mask", "O")])
    for place, (name, (start, stop)) in enumerate(parts.items()):
        mask = np.zeros(size, dtype=np.uint8)
        mask[start:stop] = 1
        stored[0, place] = (name, mask)
    return "person" if class_ind == 15 else "bird", class_ind, np.ones(size, dtype=np.uint8), stored


def write_parts(file: Path, objects: list[tuple[Any, ...]]) -> None:
    fields = [("class", "O"), ("class_ind", "O"), ("mask", "O"), ("parts", "O")]
    array = np.empty((1, len(objects)), dtype=fields)
    for place, stored in enumerate(objects):
        array[0, place] = stored
    scipy.io.savemat(file, {"anno": {"imname": file.stem, "objects": array}})
