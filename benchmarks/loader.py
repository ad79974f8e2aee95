"""How fast frames reach the training: the whole loader, next to Pillow that only decodes the same pictures.

    python benchmarks/loader.py
    python benchmarks/loader.py --data_dir rooms --check     # frames of their own size; exit status 1 below the limit

Four tasks; frames from a prepared data set, cropped, resized, mirrored, jittered, normalised and stacked to batches of
--image_size pixels by worker processes. Without --data_dir the frames are those of the shipped sample, enlarged to
512 x 512, the size of Taskonomy's. "decoding alone" is the same worker processes, pictures from memory, and nothing
but Pillow's decoding. Both in turn; the median ratio of the pairs counts. CPU ms are of one process without workers.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mt_adapters.data import (
    AugmentedDataset,
    FrameDataset,
    Mixture,
    MultitaskCollator,
    PreparedDataset,
    RoomsDataset,
    StepSampler,
    TrainTransform,
)
from mt_adapters.data.pictures import StoredLabel
from mt_adapters.data.preparation import prepare_split
from mt_adapters.tasks import get_task

TASKS = ("semseg", "depth", "normals", "edges")
MIN_RATIO = 0.8
JPEG_QUALITY = 95


class Enlarged(RoomsDataset):
    """The rooms sample at a larger size: the image bilinear, labels nearest."""

    def __init__(self, split: str, size: int) -> None:
        super().__init__(split)
        self.size = size

    def _image(self, frame: Any) -> Image.Image:
        return Image.open(io.BytesIO(self._image_bytes(frame)))

    def _image_bytes(self, frame: Any) -> bytes:
        buffer = io.BytesIO()
        picture = Image.open(io.BytesIO(super()._image_bytes(frame)))
        picture.resize((self.size, self.size), Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=JPEG_QUALITY)
        return buffer.getvalue()

    def _label(self, frame: Any, label: str) -> StoredLabel:
        stored = super()._label(frame, label)
        nearest = np.arange(self.size) * len(stored.codes) // self.size
        return stored._replace(codes=stored.codes.take(nearest, axis=0).take(nearest, axis=1))


class DecodingAlone(Dataset[int]):
    """Every stored picture of a frame, decoded and forgotten."""

    def __init__(self, dataset: PreparedDataset) -> None:
        rows = [dataset._frame(index) for index in range(len(dataset))]
        self.frames = [[row[column]["bytes"] for column in ("image", *TASKS)] for row in rows]

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> int:
        for stored in self.frames[index]:
            with Image.open(io.BytesIO(stored)) as picture:
                picture.load()
        return 0


def seconds_of_an_epoch(loader: DataLoader) -> float:
    start = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - start


def cpu_seconds(function: Any) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(dataset: PreparedDataset, arguments: argparse.Namespace) -> dict[str, float]:
    tasks = [get_task(name, num_labels=18) for name in TASKS]
    mixture = Mixture.of(dataset, {task.name: task.kind for task in tasks})
    augmented = AugmentedDataset(mixture, TrainTransform(tasks, (arguments.image_size,) * 2))
    order = list(StepSampler(mixture.shard_lengths, len(dataset)))
    collator = MultitaskCollator(tasks)
    shared = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers, "persistent_workers": True}
    whole = DataLoader(augmented, sampler=order, collate_fn=collator, **shared)  # type: ignore[arg-type]
    alone = DataLoader(DecodingAlone(dataset), **shared)
    pairs = []
    for _ in range(arguments.repeats + 1):
        pairs.append((seconds_of_an_epoch(alone), seconds_of_an_epoch(whole)))
    # The first one starts the workers.
    pairs = pairs[1:]
    decoding, frames = alone.dataset, range(min(len(dataset), 64))
    cpu_alone = min(cpu_seconds(lambda: [decoding[i] for i in frames]) for _ in range(3))
    cpu_whole = min(cpu_seconds(lambda: collator([augmented[order[i]] for i in frames])) for _ in range(3))
    return {
        "alone": len(dataset) / min(alone for alone, _ in pairs),
        "loader": len(dataset) / min(whole for _, whole in pairs),
        "ratio": statistics.median(alone / whole for alone, whole in pairs),
        "cpu_alone": 1000 * cpu_alone / len(frames),
        "cpu_loader": 1000 * cpu_whole / len(frames),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, help="a rooms folder; default: the shipped sample, enlarged")
    parser.add_argument("--stored_size", type=int, default=512, help="side of the enlarged frames in pixels")
    parser.add_argument("--image_size", type=int, default=224, help="side of the crops in pixels")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--check", action="store_true", help=f"exit with status 1 if the ratio is below {MIN_RATIO}")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    raw: FrameDataset = (
        Enlarged("train", arguments.stored_size)
        if arguments.data_dir is None
        else RoomsDataset("train", arguments.data_dir)
    )
    with tempfile.TemporaryDirectory() as folder:
        prepare_split(raw, "train", Path(folder))
        dataset = PreparedDataset("train", folder)
        side = dataset[0]["image"].shape[-1]
        figures = measure(dataset, arguments)
    print(
        "| frames stored at | decoding alone, frames/s | loader, frames/s | ratio | CPU ms, decoding | loader |\n"
        "|---|---|---|---|---|---|\n"
        f"| {side} x {side} | {figures['alone']:.0f} | {figures['loader']:.0f} | {figures['ratio']:.2f} "
        f"| {figures['cpu_alone']:.2f} | {figures['cpu_loader']:.2f} |\n\n"
        f"{'PASS' if figures['ratio'] >= MIN_RATIO else 'FAIL'}: the loader with augmentation at "
        f"{arguments.image_size} pixels and {arguments.num_workers} workers is at {figures['ratio']:.0%} of the rate "
        f"of decoding alone (>= {MIN_RATIO:.0%})"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"stored_size": side} | figures, indent=1) + "\n")
    return 1 if arguments.check and figures["ratio"] < MIN_RATIO else 0


if __name__ == "__main__":
    sys.exit(main())
