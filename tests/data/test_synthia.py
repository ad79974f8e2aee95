import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from layouts.png_48_bit import png_48_bit
from layouts.synthia import (
    CAR_ROWS,
    DEPTHS,
    FIRST_CAR,
    FRAMES,
    ID_ROW,
    NUM_IDS,
    SECOND_CAR,
    write_synthia,
)
from layouts.tilted_plane import NORMAL
from mt_adapters.data.cityscapes import CityscapesDataset
from mt_adapters.data.frames import SPLITS
from mt_adapters.data.pictures import BadSampleError
from mt_adapters.data.synthia import SynthiaDataset, read_rgb_16_bit
from mt_adapters.tasks import get_task

X = 255
# What each of the ids 0 to 22 of README.txt is among the 16 classes of Cityscapes (DenseMTL, ctrl-uda).
EXPECTED = [X, 9, 2, 0, 1, 4, 8, 5, 12, 7, 10, 15, 14, X, X, 6, X, 11, X, 13, X, 3, X]
FOLDERS = {"image": "RGB", "semseg": "GT/LABELS", "depth": "Depth/Depth"}


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def filled(value: int, size: tuple[int, int] = (48, 64)) -> bytes:
    return png_48_bit(np.full((*size, 3), value))


@pytest.mark.parametrize("split", SPLITS)
def test_frames_are_read_back_in_metres_and_train_ids(tmp_path: Path, split: str) -> None:
    known = write_synthia(tmp_path)
    dataset = SynthiaDataset(split, tmp_path)
    assert [dataset.name(index) for index in range(len(dataset))] == FRAMES[split]
    for index, frame in enumerate(FRAMES[split]):
        sample = dataset[index]
        assert torch.equal(sample["image"], known[frame]["image"])
        assert list(sample["labels"]) == ["semseg", "depth"]
        assert torch.equal(sample["labels"]["semseg"], known[frame]["semseg"])
        assert torch.equal(sample["labels"]["depth"], known[frame]["depth"])
        assert torch.equal(sample["labels"]["depth"][0, : len(DEPTHS)], torch.tensor(list(DEPTHS.values())))


def test_each_id_is_the_class_that_its_source_says_in_the_order_of_cityscapes(tmp_path: Path) -> None:
    write_synthia(tmp_path)
    dataset = SynthiaDataset("train", tmp_path)
    assert dataset[0]["labels"]["semseg"][ID_ROW, :NUM_IDS].tolist() == EXPECTED
    (tmp_path / "leftImg8bit/train/ulm").mkdir(parents=True)
    (tmp_path / "gtFine").mkdir()
    (tmp_path / "leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png").touch()
    assert dataset.labels["semseg"] == CityscapesDataset("train", tmp_path, num_classes=16).labels["semseg"]


def test_all_labels_are_valid_for_their_tasks(tmp_path: Path) -> None:
    write_synthia(tmp_path)
    dataset = SynthiaDataset("train", tmp_path, derive=["normals", "edges"])
    labels = dataset[1]["labels"]
    assert labels.keys() == dataset.labels.keys() == {"semseg", "depth", "normals", "edges"}
    for name, label in labels.items():
        get_task(name, num_labels=16).check_label(label[None], 1, 48, 64)


def test_normals_derived_from_depth_are_those_of_the_plane(tmp_path: Path) -> None:
    write_synthia(tmp_path)
    normals = SynthiaDataset("train", tmp_path, derive=["normals"])[0]["labels"]["normals"]
    is_labelled = (normals != 0).any(dim=0)
    assert is_labelled[3:-1, 1:-1].all()
    torch.testing.assert_close(normals[:, is_labelled].mean(dim=1), torch.tensor(NORMAL), rtol=0, atol=0.005)
    assert (normals[:, is_labelled].T @ torch.tensor(NORMAL)).min() > 0.99


def test_the_camera_is_that_of_the_video_sequences(tmp_path: Path) -> None:
    write_synthia(tmp_path)
    camera = SynthiaDataset("train", tmp_path)._intrinsics("0000000", 760, 1280)
    assert camera == (532.740352, 532.740352, 640, 380)


def test_derived_edges_are_borders_of_classes_and_instances_and_steps_in_depth(tmp_path: Path) -> None:
    write_synthia(tmp_path)
    edges = SynthiaDataset("train", tmp_path, derive=["edges"])[0]["labels"]["edges"]
    cars = edges[CAR_ROWS, FIRST_CAR.start - 1 : SECOND_CAR.stop]
    expected = torch.zeros_like(cars)
    expected[:, [0, FIRST_CAR.stop - FIRST_CAR.start, -1]] = 1
    expected[-1, 1:] = 1
    assert torch.equal(cars, expected)
    # Void (id 0) is no region, but has a depth, so a label: no edge.
    assert edges[ID_ROW, 0] == 0
    assert edges[ID_ROW, 1:NUM_IDS].eq(1).all()
    # 0.01 to 2.56 to 655.34 metres; the ends of the row have no depth.
    assert edges[0, : len(DEPTHS)].tolist() == [0, 1, 1, 1, 0]


def test_every_fifth_frame_is_validation_and_all_can_be_train(tmp_path: Path) -> None:
    (tmp_path / "RGB").mkdir()
    for number in range(9400):
        (tmp_path / "RGB" / f"{number:07}.png").touch()
    splits = [set(SynthiaDataset(split, tmp_path).frames) for split in SPLITS]
    assert [len(split) for split in splits] == [7520, 1880]
    assert not splits[0] & splits[1]
    assert "0009399" in splits[1]
    assert len(SynthiaDataset("train", tmp_path, train_on_all=True)) == 9400
    assert SynthiaDataset("validation", tmp_path, train_on_all=True).frames == sorted(splits[1])


def test_a_set_without_depth_or_labels_lacks_them(tmp_path: Path) -> None:
    write_synthia(tmp_path)
    shutil.rmtree(tmp_path / "Depth")
    dataset = SynthiaDataset("train", tmp_path, derive=["edges"])
    assert list(dataset[0]["labels"]) == list(dataset.labels) == ["semseg", "edges"]
    with pytest.raises(ValueError, match=r"derives 'normals' from depth, but there is no \['.*Depth'\]"):
        SynthiaDataset("train", tmp_path, derive=["normals"])
    shutil.rmtree(tmp_path / "GT")
    with pytest.raises(ValueError, match=r"derives 'edges' from semseg or depth, but there is no \['.*LABELS', "):
        SynthiaDataset("train", tmp_path, derive=["edges"])


def test_edges_are_derived_from_depth_alone_where_there_are_no_labels(tmp_path: Path) -> None:
    write_synthia(tmp_path)
    shutil.rmtree(tmp_path / "GT")
    edges = SynthiaDataset("train", tmp_path, derive=["edges"])[0]["labels"]["edges"]
    assert edges[0, 1:3].eq(1).all()
    assert edges[0, 0].isnan()
    assert not edges[10:].any()


def test_depth_is_found_a_folder_higher_too(tmp_path: Path) -> None:
    known = write_synthia(tmp_path)
    for path in (tmp_path / "Depth/Depth").iterdir():
        path.rename(tmp_path / "Depth" / path.name)
    (tmp_path / "Depth/Depth").rmdir()
    assert torch.equal(SynthiaDataset("train", tmp_path)[0]["labels"]["depth"], known["0000000"]["depth"])


@pytest.mark.parametrize(
    ("label", "content", "rule"),
    [
        ("image", png(np.zeros((48, 64), np.uint8)), "must be an 8-bit RGB image"),
        (
            "semseg",
            png(np.zeros((48, 64, 3), np.uint8)),
            "has 8 bits in a channel, but must be a 16-bit RGB PNG of",
        ),
        ("semseg", png(np.zeros((48, 64), np.uint8)), "must be a 16-bit RGB PNG of class and instance ids"),
        ("semseg", filled(23), "holds class id 23; ids are 0 to 22"),
        ("semseg", filled(256 + 3), "holds class id 259"),
        ("semseg", lambda stored: stored[:-40], "the picture is damaged"),
        (
            "depth",
            png(np.zeros((48, 64, 3), np.uint8)),
            "has 8 bits in a channel, but must be a 16-bit RGB PNG of",
        ),
        ("depth", png(np.zeros((48, 64), np.uint16)), "must be a 16-bit RGB PNG of centimetres"),
        ("depth", lambda stored: stored[:-40], "the picture is damaged"),
        ("depth", lambda stored: stored.replace(b"IDAT", b"IDAX"), "the picture is damaged"),
        ("depth", None, "cannot be read"),
        ("semseg", None, "cannot be read"),
    ],
    ids=range(12),
)
def test_a_wrong_file_is_named_with_the_rule(
    tmp_path: Path, label: str, content: bytes | Callable | None, rule: str
) -> None:
    write_synthia(tmp_path)
    path = tmp_path / FOLDERS[label] / "0000000.png"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    dataset = SynthiaDataset("train", tmp_path)
    assert dataset[1]["labels"].keys() == {"semseg", "depth"}
    with pytest.raises(BadSampleError, match=rf"{FOLDERS[label]}/0000000\.png'\W.*({rule})"):
        dataset[0]


@pytest.mark.parametrize("label", ["semseg", "depth"])
def test_a_label_of_another_size_than_the_image_is_refused(tmp_path: Path, label: str) -> None:
    write_synthia(tmp_path)
    (tmp_path / FOLDERS[label] / "0000000.png").write_bytes(filled(1, size=(47, 64)))
    with pytest.raises(BadSampleError, match=rf"0000000: the label '{label}' is 47 x 64 pixels, .* image is 48 x 64"):
        SynthiaDataset("train", tmp_path)[0]


@pytest.mark.parametrize("filters", [(0,), (1,), (2,), (3,), (4,), (0, 1, 2, 3, 4)])
def test_all_48_bits_of_a_pixel_are_read_with_each_filter_of_the_format(tmp_path: Path, filters: tuple) -> None:
    array = np.random.default_rng(0).integers(0, 2**16, (20, 13, 3))
    (tmp_path / "a.png").write_bytes(png_48_bit(array, filters))
    codes = read_rgb_16_bit(tmp_path / "a.png", "noise")
    assert codes.dtype == np.uint16
    assert (codes == array).all()


def test_pillow_alone_would_lose_the_lower_half_of_each_channel(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_48_bit(np.full((2, 2, 3), 22)))
    assert not np.array(Image.open(tmp_path / "a.png")).any()


def test_a_folder_that_is_empty_or_a_step_too_high_is_refused_with_the_layout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no frame of the split 'train'.*RGB/\*\.png, GT/LABELS/\*\.png and"):
        SynthiaDataset("train", tmp_path)
    write_synthia(tmp_path / "RAND_CITYSCAPES")
    with pytest.raises(ValueError, match="holds no frame.*RAND_CITYSCAPES"):
        SynthiaDataset("validation", tmp_path)


def test_a_pickled_data_set_reads_the_same(tmp_path: Path) -> None:
    write_synthia(tmp_path)
    dataset = SynthiaDataset("train", tmp_path, derive=["normals"])
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.labels == dataset.labels
    assert all(torch.equal(copy[1]["labels"][name], label) for name, label in dataset[1]["labels"].items())
