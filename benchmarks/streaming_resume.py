"""Is every frame seen once if an epoch is interrupted? Streaming of `datasets` and this package's order, side by side.

    python benchmarks/streaming_resume.py

Seven parquet files, two processes. After so many frames each process stops, saves its state, and a new data set goes
on from it to the end of the epoch: `IterableDataset.state_dict` of `datasets`, with and without a shuffle buffer; here
only the number of frames, as the order follows from the seed and the lengths of the files. Counts frames that never
came and those that came twice.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from datasets.distributed import split_dataset_by_node

from mt_adapters.data import StepSampler

NUM_FILES, FRAMES_PER_FILE, NUM_PROCESSES = 7, 40, 2
NUM_FRAMES = NUM_FILES * FRAMES_PER_FILE
BUFFERS = (0, 64)
STOPS = (30, 77)


def streamed(files: list[str], process: int, buffer: int) -> Any:
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    if buffer:
        stream = stream.shuffle(seed=0, buffer_size=buffer)
    return split_dataset_by_node(stream, rank=process, world_size=NUM_PROCESSES)


def interrupted_stream(files: list[str], process: int, buffer: int, stop: int) -> Iterator[int]:
    stream = streamed(files, process, buffer)
    for number, row in enumerate(stream, start=1):
        yield row["frame"]
        if number == stop:
            break
    state = stream.state_dict()
    resumed = streamed(files, process, buffer)
    resumed.load_state_dict(state)
    for row in resumed:
        yield row["frame"]


def interrupted_order(process: int, stop: int) -> Iterator[int]:
    def order() -> list[int]:
        frames = [frame for _, frame in StepSampler([[FRAMES_PER_FILE] * NUM_FILES], NUM_FRAMES, seed=0)]
        return frames[process::NUM_PROCESSES]

    yield from order()[:stop]
    yield from order()[stop:]


def lost_and_doubled(frames: list[int]) -> tuple[int, int]:
    counts = Counter(frames)
    return NUM_FRAMES - len(counts), sum(count - 1 for count in counts.values())


def main() -> None:
    datasets.disable_progress_bars()
    print("| order | stopped after | frames lost | doubled |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / f"train-{number:05d}-of-{NUM_FILES:05d}.parquet") for number in range(NUM_FILES)]
        for number, file in enumerate(files):
            frames = list(range(number * FRAMES_PER_FILE, (number + 1) * FRAMES_PER_FILE))
            pyarrow.parquet.write_table(pyarrow.table({"frame": frames}), file, row_group_size=4)
        for stop in STOPS:
            for buffer in BUFFERS:
                seen = [
                    f for process in range(NUM_PROCESSES) for f in interrupted_stream(files, process, buffer, stop)
                ]
                lost, doubled = lost_and_doubled(seen)
                name = f"datasets {datasets.__version__}, " + (
                    f"shuffle buffer {buffer}" if buffer else "not shuffled"
                )
                print(f"| {name} | {stop} | {lost} | {doubled} |")
            seen = [f for process in range(NUM_PROCESSES) for f in interrupted_order(process, stop)]
            lost, doubled = lost_and_doubled(seen)
            print(f"| mt_adapters, shuffled | {stop} | {lost} | {doubled} |")


if __name__ == "__main__":
    main()
