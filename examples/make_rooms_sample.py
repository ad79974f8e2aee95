"""Make the small rooms sample that the package ships from a folder with the full rooms set.

    python examples/make_rooms_sample.py path/to/rooms src/mt_adapters/data/sample

Both folders hold train.parquet and validation.parquet with the same columns. The frames are spread evenly over the
rooms and the whole view is kept, so `fov_degrees` stays true. The program has no randomness: with the same versions of
Pillow and datasets it writes the same files again.
"""

import argparse
import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

JPEG_QUALITY = 90
# A mean of the labels on two sides of a border would belong to neither side.
NEAREST_COLUMNS = ("depth", "normals", "semseg")


def choose_rows(rooms: list[str], num_frames: int) -> list[int]:
    """Rows of `num_frames` frames; their counts per room differ by at most one and are spread over the file."""
    rows_of_room: dict[str, list[int]] = {}
    for row, room in enumerate(rooms):
        rows_of_room.setdefault(room, []).append(row)
    num_rooms = len(rows_of_room)
    chosen = []
    for position, rows in enumerate(rows_of_room.values()):
        count = (position + 1) * num_frames // num_rooms - position * num_frames // num_rooms
        chosen += rows[:count]
    if len(chosen) < num_frames:
        raise ValueError(f"{num_frames} frames were asked for, but {num_rooms} rooms have only {len(chosen)} to give.")
    return chosen


def shrink_edges(edges: Image.Image, size: int) -> Image.Image:
    """An edge wherever one of the source pixels is: thin lines stay connected."""
    source = np.asarray(edges)
    # Each source pixel counts for the target pixel that holds its centre, and for no other: lines do not double.
    rows, columns = (((np.arange(length) + 0.5) * size / length).astype(int) for length in source.shape)
    target = np.zeros((size, size), dtype=bool)
    np.logical_or.at(target, (rows[:, None], columns[None, :]), source)
    return Image.fromarray(target)


def encode(image: Image.Image, **options: object) -> dict[str, object]:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def shrink_frame(frame: dict, size: int) -> dict:
    """The frame with all its pictures at `size` x `size` pixels; other columns stay."""
    pictures = {name: Image.open(io.BytesIO(frame[name]["bytes"])) for name in ("image", "edges", *NEAREST_COLUMNS)}
    shrunk = {
        "image": encode(
            pictures["image"].resize((size, size), Image.Resampling.BOX), format="JPEG", quality=JPEG_QUALITY
        ),
        "edges": encode(shrink_edges(pictures["edges"], size), format="PNG", optimize=True),
    }
    for name in NEAREST_COLUMNS:
        nearest = pictures[name].resize((size, size), Image.Resampling.NEAREST)
        shrunk[name] = encode(nearest, format="PNG", optimize=True)
    return {**frame, **shrunk}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with the full train.parquet and validation.parquet")
    parser.add_argument("output", type=Path, help="folder for the sample")
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--num_train", type=int, default=260, help="training frames")
    parser.add_argument("--num_validation", type=int, default=56, help="validation frames")
    arguments = parser.parse_args()

    arguments.output.mkdir(parents=True, exist_ok=True)
    for split, num_frames in (("train", arguments.num_train), ("validation", arguments.num_validation)):
        source = datasets.load_dataset("parquet", data_files=str(arguments.source / f"{split}.parquet"), split="train")
        features = source.features
        for name in ("image", "edges", *NEAREST_COLUMNS):
            source = source.cast_column(name, datasets.Image(decode=False))
        frames = [shrink_frame(source[row], arguments.size) for row in choose_rows(source["room"], num_frames)]
        path = arguments.output / f"{split}.parquet"
        datasets.Dataset.from_list(frames, features=features).to_parquet(str(path))
        rooms = {frame["room"] for frame in frames}
        print(f"{path}: {len(frames)} frames of {len(rooms)} rooms, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
