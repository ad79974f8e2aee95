"""Prepared data sets: what goes in comes out, files are whole or absent, and what is damaged is named."""

import io
import json
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from mt_adapters.data import BadSampleError, FrameDataset, PreparedDataset, StepSampler
from mt_adapters.data.pictures import encode_png
from mt_adapters.data.preparation import prepare_split

HEIGHT, WIDTH = 6, 8
CLASSES = ("sky", "road", "car")


class MadeFrames(FrameDataset):
    """Frames of known values: frame i has depth i + 1 metres and class i % 3; some lack a label, some are bad."""

    set_name = "made"
    summary = "made for a test"
    labels = {"semseg": CLASSES, "depth": None, "normals": None, "edges": None}
    depth_unit = 1 / 256

    def __init__(self, length: int = 30, bad: tuple[int, ...] = (), seconds: float = 0.0) -> None:
        self.length, self.bad, self.seconds = length, bad, seconds

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"made/{index:03d}"

    def _frame(self, index: int) -> int:
        time.sleep(self.seconds)
        if index in self.bad:
            raise BadSampleError(f"'{index:03d}.png': the picture is damaged.")
        return index

    def _image(self, frame: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(frame).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))

    def _label(self, frame: int, label: str) -> Tensor | None:
        if label == "semseg":
            ids = torch.full((HEIGHT, WIDTH), frame % 3)
            ids[0] = 255
            return ids
        if label == "depth":
            depth = torch.full((HEIGHT, WIDTH), frame + 1 + 3 / 256)
            depth[:, 0] = 0
            return depth
        if label == "normals":
            normals = torch.zeros(3, HEIGHT, WIDTH)
            normals[:, 1:] = torch.tensor([0.6, 0.0, 0.8])[:, None, None]
            return None if frame % 2 else normals
        edges = torch.rand(HEIGHT, WIDTH, generator=torch.Generator().manual_seed(frame))
        edges[2] = torch.nan
        return edges


def prepare(folder: Path, dataset: FrameDataset | None = None, **options: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"frames_per_shard": 5, "max_bad_share": 0.5} | options
    return prepare_split(dataset or MadeFrames(), "train", folder, **settings)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(folder, MadeFrames(bad=(4, 17)))
    return folder


def by_name(folder: Path) -> dict[str, dict[str, Any]]:
    dataset = PreparedDataset("train", folder)
    return {dataset.name(index): dataset[index] for index in range(len(dataset))}


def test_every_label_comes_back_exact_or_rounded_as_the_docstring_says(prepared: Path) -> None:
    source, samples = MadeFrames(), by_name(prepared)
    assert sorted(samples) == [f"made/{index:03d}" for index in range(30) if index not in (4, 17)]
    for index in (0, 1, 29):
        expected, found = source[index], samples[f"made/{index:03d}"]
        assert torch.equal(found["image"], expected["image"])
        assert found["labels"].keys() == expected["labels"].keys()
        for label in ("semseg", "depth"):
            assert torch.equal(found["labels"][label], expected["labels"][label])
            assert found["labels"][label].dtype == expected["labels"][label].dtype
        torch.testing.assert_close(
            found["labels"]["edges"], expected["labels"]["edges"], atol=8e-6, rtol=0, equal_nan=True
        )
        if "normals" in expected["labels"]:
            cosine = (found["labels"]["normals"] * expected["labels"]["normals"]).sum(dim=0)
            assert not found["labels"]["normals"][:, 0].any()
            assert torch.rad2deg(cosine[1:].clamp(max=1).acos()).max() < 0.5


def test_rounding_moves_no_normal_by_more_than_the_docstring_says(tmp_path: Path) -> None:
    vectors = torch.nn.functional.normalize(torch.randn(3, 200, 200, dtype=torch.float64), dim=0)

    class Normals(MadeFrames):
        labels = {"normals": None}

        def _image(self, frame: int) -> Image.Image:
            return Image.fromarray(np.zeros((200, 200, 3), dtype=np.uint8))

        def _label(self, frame: int, label: str) -> Tensor:
            return vectors.float()

    prepare(tmp_path, Normals(1))
    found = by_name(tmp_path)["made/000"]["labels"]["normals"].double()
    sine = torch.linalg.vector_norm(torch.linalg.cross(found, vectors, dim=0), dim=0)
    assert torch.rad2deg(sine.asin()).max() < 0.4


def test_the_depth_that_codes_do_not_hold_is_refused_and_the_nearest_one_keeps_its_label(tmp_path: Path) -> None:
    class Far(MadeFrames):
        def _label(self, frame: int, label: str) -> Tensor | None:
            return torch.full((HEIGHT, WIDTH), (1e-6, 65535 / 256, 256.1)[frame]) if label == "depth" else None

    report = prepare(tmp_path, Far(3))["report"]
    depths = {name: sample["labels"]["depth"][0, 0].item() for name, sample in by_name(tmp_path).items()}
    assert depths == {"made/000": 1 / 256, "made/001": 65535 / 256}
    assert [entry["frame"] for entry in report["skipped"]] == ["made/002"]
    assert "a depth of 256.1 m is more than 65535 units of 0.003906 m hold" in report["skipped"][0]["reason"]


def test_the_report_counts_frames_labels_classes_depths_and_what_was_skipped(prepared: Path) -> None:
    report = json.loads((prepared / "info.json").read_text())["splits"]["train"]["report"]
    kept = [index for index in range(30) if index not in (4, 17)]
    assert report["num_frames"] == 28
    labels = report["labels"]
    assert labels["normals"]["frames"] == sum(index % 2 == 0 for index in kept) / 28
    assert labels["normals"]["pixels"] == pytest.approx((HEIGHT - 1) / HEIGHT)
    assert labels["semseg"]["pixels"] == pytest.approx((HEIGHT - 1) / HEIGHT)
    for number, name in enumerate(CLASSES):
        assert labels["semseg"]["classes"][name] == pytest.approx(sum(i % 3 == number for i in kept) / 28)
    assert (labels["depth"]["min"], labels["depth"]["max"]) == (1 + 3 / 256, 30 + 3 / 256)
    assert labels["depth"]["mean"] == pytest.approx(sum(kept) / 28 + 1 + 3 / 256)
    assert 0.4 < labels["edges"]["mean"] < 0.6
    reasons = {entry["frame"]: entry["reason"] for entry in report["skipped"]}
    assert reasons == {f"made/{i:03d}": f"'{i:03d}.png': the picture is damaged." for i in (4, 17)}


def test_files_are_random_parts_of_the_set_and_datasets_streams_them(prepared: Path) -> None:
    files = sorted(str(path) for path in prepared.glob("train-*-of-00006.parquet"))
    assert len(files) == 6
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    rows = list(stream)
    assert sorted(row["name"] for row in rows) == sorted(by_name(prepared))
    assert [row["name"] for row in rows] != sorted(row["name"] for row in rows)
    assert rows[0]["image"].size == (WIDTH, HEIGHT)
    assert rows[0]["depth"].mode == "I;16"


def test_jobs_and_interruptions_do_not_change_a_byte(tmp_path: Path) -> None:
    whole, parallel = tmp_path / "whole", tmp_path / "parallel"
    prepare(whole, bad_frames())
    prepare(parallel, bad_frames(), jobs=2)

    def stop_after(count: int) -> Any:
        def show(frames: Any, total: int) -> Any:
            for number, value in enumerate(frames):
                if number == count:
                    raise KeyboardInterrupt
                yield value

        return show

    cut = tmp_path / "cut"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepare(cut, bad_frames(), show=stop_after(2))
    assert not (cut / "info.json").exists()
    with pytest.raises(ValueError, match=r"no info\.json.*run it again"):
        PreparedDataset("train", cut)
    prepare(cut, bad_frames())
    contents = [
        {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (whole, parallel, cut)
    ]
    assert contents[0].keys() == contents[1].keys() == contents[2].keys()
    assert contents[0] == contents[1] == contents[2]


def bad_frames() -> MadeFrames:
    return MadeFrames(bad=(3,))


def test_a_program_that_is_killed_leaves_no_half_file_and_keeps_the_whole_ones(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    process = multiprocessing.get_context("fork").Process(target=prepare, args=(folder, MadeFrames(seconds=0.02)))
    process.start()
    while not len(list(folder.glob("progress/train/*.json"))) >= 2:
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("train-*.parquet")}
    assert 2 <= len(finished) < 6
    for path in finished:
        assert pyarrow.parquet.read_table(path).num_rows == 5
    kept = [path for path in finished if (folder / f"progress/train/{int(path.name[6:11])}.json").exists()]
    prepare(folder)
    assert all(path.stat().st_mtime_ns == finished[path] for path in kept)
    assert len(PreparedDataset("train", folder)) == 30
    assert not list(folder.rglob("*partial*"))
    assert not (folder / "progress").exists()


def test_a_finished_split_is_not_done_again_and_other_settings_are_refused(tmp_path: Path) -> None:
    first = prepare(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert prepare(tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    with pytest.raises(ValueError, match="from other files or with other settings: delete"):
        prepare(tmp_path, frames_per_shard=6)

    class Other(MadeFrames):
        depth_unit = 1 / 100

    with pytest.raises(ValueError, match="holds 'made' with other labels, classes or units"):
        prepare(tmp_path, Other())


@pytest.mark.parametrize("jobs", [1, 2])
def test_too_many_bad_frames_stop_the_program_with_an_example(tmp_path: Path, jobs: int) -> None:
    with pytest.raises(ValueError, match=r"3 of 30 frames are bad.*max_bad_share=0.05.*made/00[123]: '00[123].png'"):
        prepare(tmp_path, MadeFrames(bad=(1, 2, 3)), max_bad_share=0.05, jobs=jobs, frames_per_shard=30)
    assert not (tmp_path / "info.json").exists()


def test_a_prepared_set_pickles_and_is_read_by_workers(prepared: Path) -> None:
    dataset = PreparedDataset("train", prepared)
    dataset[0]
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[3]["image"], dataset[3]["image"])
    assert dataset.shard_lengths == [
        len(part) for part in np.split(np.arange(28), np.cumsum(dataset.shard_lengths)[:-1])
    ]
    order = [index for _, index in StepSampler([dataset.shard_lengths], 28)]
    loader = DataLoader(dataset, sampler=order, batch_size=None, num_workers=2)  # type: ignore[arg-type]
    for index, sample in zip(order, loader, strict=True):
        assert torch.equal(sample["image"], dataset[index]["image"])


def rewrite(path: Path, row: int, column: str, stored: bytes | None) -> None:
    table = pyarrow.parquet.read_table(path)
    rows = table.to_pylist()
    rows[row][column] = None if stored is None else {"bytes": stored, "path": None}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, table.schema), path, row_group_size=4)


GREY = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)


@pytest.mark.parametrize(
    ("column", "stored", "rule"),
    [
        ("depth", encode_png(GREY), "must be a 16-bit grey PNG of depth codes"),
        ("depth", encode_png(GREY.astype(np.uint16))[:44], "the picture is damaged"),
        ("depth", encode_png(GREY.astype(np.uint16)[:, :5]), "is 6 x 5 pixels, but the image is 6 x 8"),
        ("semseg", encode_png(GREY + np.uint8(7)), "holds class id 7; ids are 0 to 2, 255"),
        ("normals", encode_png(np.full((HEIGHT, WIDTH, 3), 255, np.uint8)), "off unit length"),
        ("edges", encode_png(GREY), "must be a 16-bit grey PNG of edge codes"),
        ("image", b"", "the picture is damaged"),
        ("image", None, "holds no picture"),
    ],
    ids=range(8),
)
def test_a_damaged_frame_is_named_with_file_row_column_and_rule(
    tmp_path: Path, column: str, stored: bytes | None, rule: str
) -> None:
    prepare(tmp_path)
    path = tmp_path / "train-00001-of-00006.parquet"
    rewrite(path, 2, column, stored)
    dataset = PreparedDataset("train", tmp_path)
    dataset[6]
    with pytest.raises(BadSampleError, match=rule) as caught:
        dataset[7]
    assert column in str(caught.value)
    if "pixels" not in rule:
        assert "train-00001-of-00006.parquet, row 2" in str(caught.value)


def test_damaged_files_and_infos_are_refused_with_the_mend(tmp_path: Path) -> None:
    prepare(tmp_path)
    file = tmp_path / "train-00000-of-00006.parquet"
    stored, info = file.read_bytes(), json.loads((tmp_path / "info.json").read_text())
    file.write_bytes(stored[:-20])
    with pytest.raises(ValueError, match=r"train-00000.*missing or damaged.*prepare the data set again"):
        PreparedDataset("train", tmp_path)[0]
    file.write_bytes((tmp_path / "train-00001-of-00006.parquet").read_bytes())
    info["splits"]["train"]["shards"][0]["num_frames"] = 4
    (tmp_path / "info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"has 5 frames .* says 4 .*do not belong together"):
        PreparedDataset("train", tmp_path)[0]
    info["splits"]["train"]["shards"][0] = {"file": "../../secret.parquet", "num_frames": 5}
    (tmp_path / "info.json").write_text(json.dumps(info))
    for content in (json.dumps(info), "{", "[]", '{"splits": {}}'):
        (tmp_path / "info.json").write_text(content)
        with pytest.raises(ValueError, match=r"info\.json.* is damaged"):
            PreparedDataset("train", tmp_path)


def test_a_split_that_was_not_prepared_is_refused(prepared: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown split 'validation'.*has: train\. .*--splits validation"):
        PreparedDataset("validation", prepared)


def test_a_jpeg_goes_through_as_it_is(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    MadeFrames()._image(0).save(buffer, format="JPEG")

    class Photos(MadeFrames):
        def _image_bytes(self, frame: int) -> bytes:
            return buffer.getvalue()

    prepare(tmp_path, Photos(2))
    assert PreparedDataset("train", tmp_path).image_bytes(1) == buffer.getvalue()
