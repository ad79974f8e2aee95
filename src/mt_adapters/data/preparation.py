"""A data set to sharded parquet files: in parallel, resumable at any moment, with a report of what was found.

Frames are shuffled once, so that every file is a random part of the set, and training only has to shuffle files.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mt_adapters.data.frames import FrameDataset
from mt_adapters.data.pictures import SEMSEG_NO_LABEL, BadSampleError
from mt_adapters.data.prepared import FRAMES_PER_ROW_GROUP, INFO_FILE, encode_label, read_info

# Reports of finished files, while others are still being written.
PROGRESS_DIR = "progress"
FORMAT = 1


def prepare_split(
    dataset: FrameDataset,
    split: str,
    output: Path,
    *,
    frames_per_shard: int = 1000,
    max_bad_share: float = 0.05,
    jobs: int = 1,
    seed: int = 0,
    show: Callable[[Iterator[int], int], Iterator[int]] = lambda frames, total: frames,
) -> dict[str, Any]:
    """Writes the parquet files of one split and its part of `info.json`; returns that part.

    Files that an earlier, interrupted call has written are kept.

    Args:
        frames_per_shard: frames in one parquet file.
        max_bad_share: the largest share of frames that may be skipped because they are bad.
        jobs: processes that read and encode.
        seed: of the order of the frames.
        show: gets an iterator over numbers of finished frames and their total, and goes through it; a progress bar.

    Raises:
        ValueError: if the folder holds another data set, or one prepared in another way, or too many frames are bad.
    """
    names = [dataset.name(index) for index in range(len(dataset))]
    order = np.random.default_rng(seed).permutation(len(names))
    shards = np.array_split(order, max(1, round(len(names) / frames_per_shard)))
    has_classes = {label: classes is not None for label, classes in dataset.labels.items()}
    described: dict[str, Any] = {
        "format": FORMAT,
        "set": dataset.set_name,
        "summary": dataset.summary,
        "labels": {label: None if classes is None else list(classes) for label, classes in dataset.labels.items()},
        "depth_unit": dataset.depth_unit,
    }
    plan = json.dumps([described, split, frames_per_shard, seed, names]).encode()
    digest = hashlib.sha256(plan).hexdigest()
    info: dict[str, Any] = read_info(output) or described | {"splits": {}}
    if {key: info.get(key) for key in described} != described:
        raise ValueError(
            f"{str(output)!r} holds {info['set']!r} with other labels, classes or units: choose another output folder"
        )
    done = info["splits"].get(split)
    if done is not None and done["plan"] == digest:
        return done
    progress = output / PROGRESS_DIR / split
    _check_same_plan(output, split, progress, digest, done)

    files = [f"{split}-{number:05d}-of-{len(shards):05d}.parquet" for number in range(len(shards))]
    reports: dict[int, dict[str, Any]] = {}
    for number, file in enumerate(files):
        if (output / file).is_file() and (progress / f"{number}.json").is_file():
            reports[number] = json.loads((progress / f"{number}.json").read_text())
    tasks = [
        (number, shard.tolist(), output / file) for number, (shard, file) in enumerate(zip(shards, files, strict=True))
    ]
    todo = [task for task in tasks if task[0] not in reports]

    def finished() -> Iterator[int]:
        yield sum(len(shards[number]) for number in reports)
        for number, report in _run(dataset, has_classes, todo, jobs):
            reports[number] = report
            _check_share(reports, len(names), max_bad_share)
            _write_json(progress / f"{number}.json", report)
            yield len(shards[number])

    for _ in show(finished(), len(names)):
        pass
    _check_share(reports, len(names), max_bad_share)
    parts = [reports[number] for number in range(len(files))]
    written = [
        {"file": file, "num_frames": part["num_frames"]}
        for file, part in zip(files, parts, strict=True)
        if part["num_frames"]
    ]
    info["splits"][split] = {"plan": digest, "shards": written, "report": summarize(parts, described["labels"])}
    _write_json(output / INFO_FILE, info, indent=1)
    shutil.rmtree(output / PROGRESS_DIR / split, ignore_errors=True)
    if not any((output / PROGRESS_DIR).iterdir()):
        (output / PROGRESS_DIR).rmdir()
    return info["splits"][split]


def _check_same_plan(output: Path, split: str, progress: Path, digest: str, done: Mapping[str, Any] | None) -> None:
    plan_file = progress / "plan.txt"
    begun = plan_file.read_text() if plan_file.is_file() else digest
    if done is not None or begun != digest:
        raise ValueError(
            f"the split {split!r} in {str(output)!r} was prepared from other files or with other settings: delete "
            "that folder, or choose another one"
        )
    progress.mkdir(parents=True, exist_ok=True)
    plan_file.write_text(digest)


def _check_share(reports: Mapping[int, Mapping[str, Any]], num_frames: int, max_bad_share: float) -> None:
    skipped = [entry for report in reports.values() for entry in report["skipped"]]
    if len(skipped) > max_bad_share * num_frames:
        first = skipped[0]
        raise ValueError(
            f"{len(skipped)} of {num_frames} frames are bad, more than max_bad_share={max_bad_share}. "
            f"One is {first['frame']}: {first['reason']} Mend the files, or raise max_bad_share"
        )


def _run(
    dataset: FrameDataset, has_classes: Mapping[str, bool], todo: Sequence[tuple[int, list[int], Path]], jobs: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, report) of shards as they are finished."""
    if jobs <= 1:
        for number, indices, path in todo:
            yield number, write_shard(dataset, has_classes, indices, path)
        return
    # The data set goes to each process once, and not with every shard: its list of names may be long. Spawned, since
    # forks of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_remember, initargs=(dataset, has_classes)) as pool:
        running = {pool.submit(_write_remembered, indices, path): number for number, indices, path in todo}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


_remembered: list[Any] = []


def _remember(dataset: FrameDataset, has_classes: Mapping[str, bool]) -> None:
    torch.set_num_threads(1)
    _remembered[:] = [dataset, has_classes]


def _write_remembered(indices: list[int], path: Path) -> dict[str, Any]:
    dataset, has_classes = _remembered
    return write_shard(dataset, has_classes, indices, path)


def write_shard(
    dataset: FrameDataset, has_classes: Mapping[str, bool], indices: Sequence[int], path: Path
) -> dict[str, Any]:
    """Writes a parquet file that is complete or not there; returns its counts, which add up over files."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    columns = {"name": datasets.Value("string"), "image": datasets.Image()} | dict.fromkeys(
        has_classes, datasets.Image()
    )
    schema = datasets.Features(columns).arrow_schema
    report: dict[str, Any] = {"num_frames": 0, "skipped": [], "labels": {label: {} for label in has_classes}}
    temporary = path.with_name(f".{path.name}.partial")
    rows: list[dict[str, Any]] = []
    # Pictures are compressed already.
    with pyarrow.parquet.ParquetWriter(temporary, schema, compression="none") as writer:
        for index in indices:
            try:
                rows.append(_encode_frame(dataset, has_classes, index, report))
            except BadSampleError as error:
                report["skipped"].append({"frame": dataset.name(index), "reason": str(error)})
            if len(rows) == FRAMES_PER_ROW_GROUP or (rows and index == indices[-1]):
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                rows = []
    with open(temporary, "rb") as written:
        os.fsync(written.fileno())
    os.replace(temporary, path)
    return report


def _encode_frame(
    dataset: FrameDataset, has_classes: Mapping[str, bool], index: int, report: dict[str, Any]
) -> dict[str, Any]:
    name = dataset.name(index)
    labels = dataset[index]["labels"]
    row: dict[str, Any] = {"name": name, "image": {"bytes": dataset.image_bytes(index), "path": None}}
    for label, is_ids in has_classes.items():
        row[label] = None
        if label in labels:
            row[label] = {
                "bytes": encode_label(label, labels[label], name, dataset.depth_unit, is_ids),
                "path": None,
            }
    # Counted last: a frame is in the report as a whole or not at all.
    report["num_frames"] += 1
    for label, value in labels.items():
        _count(report["labels"][label], label, value, has_classes[label])
    return row


def _count(counts: dict[str, Any], label: str, value: torch.Tensor, is_ids: bool) -> None:
    if is_ids:
        known = value != SEMSEG_NO_LABEL
        histogram = torch.bincount(value[known], minlength=SEMSEG_NO_LABEL)
        counts["histogram"] = [
            a + b for a, b in zip(counts.get("histogram", [0] * 255), histogram.tolist(), strict=True)
        ]
    elif label == "normals":
        known = (value != 0).any(dim=0)
    elif label == "depth":
        known = value > 0
        if known.any():
            low, high = value[known].min().item(), value[known].max().item()
            counts["min"], counts["max"] = min(counts.get("min", low), low), max(counts.get("max", high), high)
            counts["sum"] = counts.get("sum", 0.0) + value[known].double().sum().item()
    else:
        known = ~value.isnan()
        counts["sum"] = counts.get("sum", 0.0) + value[known].double().sum().item()
    num_known = int(known.sum())
    counts["num_frames"] = counts.get("num_frames", 0) + (num_known > 0)
    counts["num_labelled"] = counts.get("num_labelled", 0) + num_known
    counts["num_pixels"] = counts.get("num_pixels", 0) + known.numel()


def summarize(parts: Sequence[Mapping[str, Any]], labels: Mapping[str, list[str] | None]) -> dict[str, Any]:
    """The report of a split from those of its files: coverage of labels, class shares, depth range, skipped frames."""
    num_frames = sum(part["num_frames"] for part in parts)
    report: dict[str, Any] = {"num_frames": num_frames, "labels": {}}
    for label, classes in labels.items():
        counts = [part["labels"][label] for part in parts if part["labels"][label]]
        num_labelled = sum(count["num_labelled"] for count in counts)
        entry: dict[str, Any] = {
            "frames": sum(count["num_frames"] for count in counts) / max(num_frames, 1),
            "pixels": num_labelled / max(sum(count["num_pixels"] for count in counts), 1),
        }
        if classes is not None:
            histogram = np.sum([count["histogram"] for count in counts], axis=0) if counts else np.zeros(255)
            entry["classes"] = {name: histogram[k] / max(num_labelled, 1) for k, name in enumerate(classes)}
        elif label in ("depth", "edges") and num_labelled:
            entry["mean"] = sum(count.get("sum", 0.0) for count in counts) / num_labelled
            if label == "depth":
                entry["min"] = min(count["min"] for count in counts if "min" in count)
                entry["max"] = max(count["max"] for count in counts if "max" in count)
        report["labels"][label] = entry
    report["skipped"] = [entry for part in parts for entry in part["skipped"]]
    return report


def _write_json(file: Path, content: Any, indent: int | None = None) -> None:
    temporary = file.with_name(f".{file.name}.partial")
    temporary.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
    os.replace(temporary, file)
