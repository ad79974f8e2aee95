import doctest
import importlib
import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from mt_adapters.data import DATASETS, RoomsDataset, get_dataset
from mt_adapters.data.rooms import ROOMS_CLASSES, SAMPLE_DIR
from mt_adapters.tasks import get_task

HEIGHT, WIDTH = 4, 6
NOISE = np.random.default_rng(0).integers(0, 2**16, (HEIGHT, WIDTH), dtype=np.uint16)
SAMPLE_PROGRAM = Path(__file__).parents[2] / "examples/make_rooms_sample.py"
TASKS = [get_task(name, num_labels=len(ROOMS_CLASSES)) for name in ("semseg", "depth", "normals", "edges")]


def encode(array: np.ndarray, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=format)
    return buffer.getvalue()


def frame(**replaced: bytes | None) -> dict[str, dict[str, object] | str]:
    """A row of the parquet file, one picture per column, in the shape that `datasets` stores."""
    grid = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    pictures = {
        "image": encode(np.stack([grid] * 3, axis=-1), "JPEG"),
        "depth": encode(grid.astype(np.uint16)),
        "normals": encode(np.stack([grid] * 3, axis=-1)),
        "semseg": encode(grid),
        "edges": encode(grid > 0),
    } | replaced
    return {name: {"bytes": picture, "path": None} for name, picture in pictures.items()} | {"room": "r0"}


def rooms(folder: Path, *frames: dict, drop: tuple[str, ...] = ()) -> RoomsDataset:
    table = pyarrow.Table.from_pylist(list(frames)).drop_columns(list(drop))
    pyarrow.parquet.write_table(table, folder / "train.parquet")
    return RoomsDataset("train", data_dir=folder)


def test_a_made_frame_is_read_back_in_metres_ids_and_unit_vectors(tmp_path: Path) -> None:
    image = np.arange(HEIGHT * WIDTH * 3, dtype=np.uint8).reshape(HEIGHT, WIDTH, 3)
    ids = np.full((HEIGHT, WIDTH), 17, dtype=np.uint8)
    ids[1, 2] = 0
    millimetres = np.full((HEIGHT, WIDTH), 2500, dtype=np.uint16)
    millimetres[0, 0], millimetres[3, 5] = 0, 6976
    normals = np.full((HEIGHT, WIDTH, 3), (128, 128, 255), dtype=np.uint8)
    normals[0, 1], normals[2, 0], normals[2, 1], normals[2, 2] = (255, 128, 128), (128, 128, 128), (127, 128, 127), 0
    edges = np.zeros((HEIGHT, WIDTH), dtype=bool)
    edges[3, 4] = True

    dataset = rooms(
        tmp_path,
        frame(),
        frame(
            image=encode(image),
            semseg=encode(ids),
            depth=encode(millimetres),
            normals=encode(normals),
            edges=encode(edges),
        ),
    )
    sample = dataset[1]

    assert len(dataset) == 2
    assert sample["image"].dtype == torch.uint8
    assert torch.equal(sample["image"], torch.from_numpy(image).permute(2, 0, 1))
    labels = sample["labels"]
    assert (labels["semseg"][1, 2], labels["semseg"][0, 0]) == (255, 17)
    assert labels["depth"][0, 0] == 0
    assert labels["depth"][1, 1] == 2.5
    assert labels["depth"][3, 5] == torch.tensor(6.976)
    torch.testing.assert_close(labels["normals"][:, 0, 0], torch.tensor([0.0, 0.0, 1.0]), atol=0.004, rtol=0)
    torch.testing.assert_close(labels["normals"][:, 0, 1], torch.tensor([1.0, 0.0, 0.0]), atol=0.004, rtol=0)
    assert not labels["normals"][:, 2, :3].any()
    assert labels["edges"].dtype == torch.float32
    assert labels["edges"].nonzero().tolist() == [[3, 4]]
    for task in TASKS:
        task.check_label(labels[task.name][None], 1, HEIGHT, WIDTH)


def test_every_depth_of_16_bits_is_kept_exactly(tmp_path: Path) -> None:
    millimetres = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    grid = np.zeros((256, 256), dtype=np.uint8)
    colors = np.zeros((256, 256, 3), dtype=np.uint8)
    pictures = {"image": encode(colors), "normals": encode(colors), "semseg": encode(grid), "edges": encode(grid > 0)}
    depth = rooms(tmp_path, frame(depth=encode(millimetres), **pictures))[0]["labels"]["depth"]
    assert torch.equal((depth * 1000).round().long(), torch.from_numpy(millimetres.astype(np.int64)))


def test_decoded_normals_have_unit_length(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(HEIGHT, WIDTH, 3))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    codes = np.round((vectors * 0.5 + 0.5) * 255).astype(np.uint8)
    normals = rooms(tmp_path, frame(normals=encode(codes)))[0]["labels"]["normals"]
    torch.testing.assert_close(normals.norm(dim=0), torch.ones(HEIGHT, WIDTH))
    assert np.abs(normals.numpy().transpose(1, 2, 0) - vectors).max() < 0.01


@pytest.mark.parametrize(
    ("column", "picture", "rule"),
    [
        ("depth", encode(np.zeros((HEIGHT, WIDTH), np.uint8)), "must be a 16-bit grey PNG of millimetres"),
        ("semseg", encode(np.zeros((HEIGHT, WIDTH), np.uint16)), "must be an 8-bit grey PNG of class ids"),
        ("semseg", encode(np.zeros((HEIGHT, WIDTH), np.uint8), "JPEG"), "is JPEG .* must be an 8-bit grey PNG"),
        ("semseg", encode(np.full((HEIGHT, WIDTH), 18, np.uint8)), "holds class id 18; ids are 0 to 17"),
        ("normals", encode(np.full((HEIGHT, WIDTH, 3), 255, np.uint8)), "0.73 off unit length"),
        ("normals", encode(np.zeros((HEIGHT, WIDTH), np.uint8)), "must be an 8-bit RGB PNG"),
        ("edges", encode(np.zeros((HEIGHT, WIDTH), np.uint8)), "must be a 1-bit PNG"),
        ("image", encode(np.zeros((HEIGHT, WIDTH), np.uint8)), "must be an 8-bit RGB image"),
        ("depth", encode(np.zeros((HEIGHT, 5), np.uint16)), "is 4 x 5 pixels, but the image is 4 x 6"),
        ("depth", encode(NOISE)[:70], "the picture is damaged"),
        ("normals", encode(NOISE).replace(b"IDAT", b"IDAX"), "the picture is damaged"),
        ("edges", encode(NOISE)[:20], "the picture is damaged"),
        ("image", b"no picture", "the picture is damaged"),
        ("edges", None, "holds no picture"),
    ],
    ids=range(14),
)
def test_a_wrong_frame_is_named_with_row_column_and_rule(
    tmp_path: Path, column: str, picture: bytes | None, rule: str
) -> None:
    dataset = rooms(tmp_path, frame(), frame(**{column: picture}))
    assert dataset[0]["labels"].keys() == {"semseg", "depth", "normals", "edges"}
    with pytest.raises(ValueError, match=rf"train\.parquet, row 1\W.*'{column}'.*({rule})"):
        dataset[1]


def test_a_missing_folder_is_named_with_what_is_expected_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.*train.parquet and validation.parquet.*data_dir"):
        RoomsDataset("train", data_dir=tmp_path / "nowhere")


def test_a_folder_without_the_split_is_refused(tmp_path: Path) -> None:
    rooms(tmp_path, frame())
    with pytest.raises(ValueError, match=r"There is no validation\.parquet"):
        RoomsDataset("validation", data_dir=str(tmp_path))


def test_a_folder_with_the_signs_of_a_pattern_in_its_name_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "rooms [1] *"
    folder.mkdir()
    assert len(rooms(folder, frame())) == 1


def test_a_file_without_a_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks the columns \['edges'\]"):
        rooms(tmp_path, frame(), drop=("edges",))


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'test'.*train, validation"):
        RoomsDataset("test")


def test_an_unknown_data_set_is_refused_with_the_known_ones() -> None:
    assert get_dataset("rooms") is RoomsDataset
    with pytest.raises(ValueError, match=f"'nyu'.*{', '.join(DATASETS)}"):
        get_dataset("nyu")


def test_importing_the_data_room_leaves_datasets_alone() -> None:
    program = "import sys, mt_adapters.data; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("name", [".table", ".rooms", ".transforms", ".collate", ".sampling"])
def test_the_examples_of_the_docstrings_hold(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"mt_adapters.data{name}")).failed == 0


@pytest.mark.parametrize(("split", "num_frames"), [("train", 160), ("validation", 40)])
def test_every_frame_of_the_shipped_sample_has_valid_labels(split: str, num_frames: int) -> None:
    dataset = RoomsDataset(split)
    assert len(dataset) >= num_frames
    seen = set()
    for sample in dataset:
        assert sample["image"].shape == (3, 128, 128)
        labels = sample["labels"]
        for task in TASKS:
            task.check_label(labels[task.name][None], 1, 128, 128)
        assert (labels["depth"] > 0.1).all()
        assert (labels["depth"] < 20).all()
        assert (labels["normals"].norm(dim=0) > 0.99).all()
        assert 0.01 < labels["edges"].mean() < 0.4
        seen.update(labels["semseg"].unique().tolist())
    assert seen == set(range(1, len(ROOMS_CLASSES)))


def test_the_shipped_sample_is_small_and_its_splits_share_no_room() -> None:
    files = {split: SAMPLE_DIR / f"{split}.parquet" for split in ("train", "validation")}
    assert sum(file.stat().st_size for file in files.values()) < 8e6
    ids = {split: set(pyarrow.parquet.read_table(file)["room"].to_pylist()) for split, file in files.items()}
    assert len(ids["train"]) == 240
    assert len(ids["validation"]) == 30
    assert not ids["train"] & ids["validation"]


def test_normals_of_the_sample_agree_with_its_depth() -> None:
    dataset = RoomsDataset("validation")
    fields_of_view = pyarrow.parquet.read_table(dataset.path)["fov_degrees"].to_pylist()
    errors = []
    for index in range(0, len(dataset), 4):
        labels = dataset[index]["labels"]
        z = labels["depth"].double().numpy()
        ray = (np.arange(128) + 0.5 - 64) / 64 * np.tan(np.radians(fields_of_view[index]) / 2)
        points = np.stack([ray[None, :] * z, -ray[:, None] * z, -z])
        right = points[:, 1:-1, 2:] - points[:, 1:-1, :-2]
        up = points[:, :-2, 1:-1] - points[:, 2:, 1:-1]
        from_depth = np.cross(right, up, axis=0)
        cosine = (from_depth * labels["normals"].numpy()[:, 1:-1, 1:-1]).sum(0) / np.linalg.norm(from_depth, axis=0)
        errors.append(np.median(np.degrees(np.arccos(cosine.clip(-1, 1)))))
    # Millimetres, and pixels taken from up to half a pixel away, leave a few degrees.
    assert np.mean(errors) < 8


def test_class_borders_of_the_sample_are_edges() -> None:
    num_borders = num_edges = 0
    for sample in RoomsDataset("validation"):
        semseg, edges = sample["labels"]["semseg"], sample["labels"]["edges"].bool()
        borders = semseg[:, 1:] != semseg[:, :-1]
        num_borders += borders.sum().item()
        num_edges += (borders & (edges[:, 1:] | edges[:, :-1])).sum().item()
    assert num_edges > 0.95 * num_borders


def test_the_sample_program_shrinks_all_labels_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("make_rooms_sample", SAMPLE_PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    arguments = ["--size", "32", "--num_train", "5", "--num_validation", "3"]
    monkeypatch.setattr(sys, "argv", [str(SAMPLE_PROGRAM), str(SAMPLE_DIR), str(tmp_path), *arguments])
    program.main()

    small, large = RoomsDataset("train", tmp_path), RoomsDataset("train")
    assert (len(small), len(RoomsDataset("validation", tmp_path))) == (5, 3)
    room_ids = pyarrow.parquet.read_table(tmp_path / "train.parquet")["room"].to_pylist()
    assert len(set(room_ids)) == 5
    row = pyarrow.parquet.read_table(large.path)["room"].to_pylist().index(room_ids[0])
    small_labels, large_labels = small[0]["labels"], large[row]["labels"]
    for name in ("depth", "semseg", "normals"):
        assert torch.equal(small_labels[name], large_labels[name][..., 2::4, 2::4])
    assert torch.equal(small_labels["edges"], large_labels["edges"].reshape(32, 4, 32, 4).amax(dim=(1, 3)))
    mean = large[row]["image"].float().reshape(3, 32, 4, 32, 4).mean(dim=(2, 4))
    assert (small[0]["image"].float() - mean).abs().mean() < 6
