import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from layouts.cityscapes import (
    BASELINE,
    CAR_ROWS,
    DEPTHS,
    FIRST_CAR,
    FOCAL_X,
    FOCAL_Y,
    FRAMES,
    ID_ROW,
    NUM_IDS,
    SECOND_CAR,
    U0,
    V0,
    file_of,
    write_cityscapes,
)
from layouts.tilted_plane import NORMAL
from mt_adapters.data.cityscapes import CLASS_SETS, CityscapesDataset
from mt_adapters.data.frames import SPLITS
from mt_adapters.data.pictures import BadSampleError
from mt_adapters.tasks import get_task

X = 255
# What each of the ids 0 to 33 is in a set of classes: helpers/labels.py, DenseMTL (16, 8) and ctrl-uda (7).
EXPECTED = {
    19: [
        X,
        X,
        X,
        X,
        X,
        X,
        X,
        0,
        1,
        X,
        X,
        2,
        3,
        4,
        X,
        X,
        X,
        5,
        X,
        6,
        7,
        8,
        9,
        10,
        11,
        12,
        13,
        14,
        15,
        X,
        X,
        16,
        17,
        18,
    ],
    16: [X, X, X, X, X, X, X, 0, 1, X, X, 2, 3, 4, X, X, X, 5, X, 6, 7, 8, X, 9, 10, 11, 12, X, 13, X, X, X, 14, 15],
    8: [X, X, X, X, X, X, X, 0, X, X, X, 1, X, X, X, X, X, 2, X, 3, 4, 5, X, 6, X, X, 7, X, 7, X, X, X, X, X],
    7: [X, X, X, X, X, X, X, 0, 0, X, X, 1, 1, 1, X, X, X, 2, X, 2, 2, 3, 3, 4, 5, 5, 6, 6, 6, 6, 6, 6, 6, 6],
}
TRAIN_FRAME = FRAMES["train"][0]


def grey(bits: int, value: int = 0, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    return np.full(size, value, dtype={8: np.uint8, 16: np.uint16}[bits])


def replace(folder: Path, kind: str, ending: str, content: np.ndarray | bytes | str | Callable) -> Path:
    """Writes another picture, other bytes or a changed camera in the place of a file of the first train frame."""
    path = file_of(folder, "train", TRAIN_FRAME, kind, ending)
    if isinstance(content, np.ndarray):
        Image.fromarray(content).save(path)
    elif callable(content):
        path.write_bytes(content(path.read_bytes()))
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("split", SPLITS)
def test_frames_are_read_back_in_metres_and_train_ids(tmp_path: Path, split: str) -> None:
    known = write_cityscapes(tmp_path)
    dataset = CityscapesDataset(split, tmp_path)
    assert [dataset.name(index) for index in range(len(dataset))] == FRAMES[split]
    for index, frame in enumerate(FRAMES[split]):
        sample = dataset[index]
        assert torch.equal(sample["image"], known[frame]["image"])
        assert list(sample["labels"]) == ["semseg", "depth"]
        assert torch.equal(sample["labels"]["semseg"], known[frame]["semseg"])
        torch.testing.assert_close(sample["labels"]["depth"], known[frame]["depth"], rtol=1e-6, atol=0)
        assert sample["labels"]["depth"][0, : len(DEPTHS)].tolist() == list(DEPTHS.values())
        assert (sample["labels"]["depth"] > 0).any()


@pytest.mark.parametrize("num_classes", EXPECTED)
def test_each_id_is_the_class_that_its_source_says(tmp_path: Path, num_classes: int) -> None:
    write_cityscapes(tmp_path)
    dataset = CityscapesDataset("train", tmp_path, num_classes=num_classes)
    assert dataset[0]["labels"]["semseg"][ID_ROW, :NUM_IDS].tolist() == EXPECTED[num_classes]
    assert len(dataset.labels["semseg"]) == num_classes


def test_the_names_of_the_classes_are_those_of_their_ids() -> None:
    names = "road sidewalk building wall fence pole light sign vegetation terrain sky person rider car truck bus train"
    endings = [name.split()[-1] for name in CLASS_SETS[19]]
    assert endings == [*names.split(), "motorcycle", "bicycle"]
    without = {"terrain", "truck", "train"}
    assert [name for name in CLASS_SETS[19] if name not in without] == list(CLASS_SETS[16])
    assert " ".join(CLASS_SETS[7]) == "flat construction object nature sky human vehicle"
    assert ", ".join(CLASS_SETS[8]) == "road, building, pole, traffic light, traffic sign, vegetation, sky, vehicle"


def test_all_labels_are_valid_for_their_tasks(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    dataset = CityscapesDataset("train", tmp_path, derive=["normals", "edges"])
    labels = dataset[1]["labels"]
    assert labels.keys() == dataset.labels.keys() == {"semseg", "depth", "normals", "edges"}
    for name, label in labels.items():
        get_task(name, num_labels=19).check_label(label[None], 1, 48, 64)


def test_normals_derived_from_disparities_are_those_of_the_plane(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    normals = CityscapesDataset("train", tmp_path, derive=["normals"])[0]["labels"]["normals"]
    is_labelled = (normals != 0).any(dim=0)
    assert is_labelled[3:-1, 1:-1].all()
    torch.testing.assert_close(normals[:, is_labelled].mean(dim=1), torch.tensor(NORMAL), rtol=0, atol=0.005)
    assert (normals[:, is_labelled].T @ torch.tensor(NORMAL)).min() > 0.99


def test_the_camera_is_the_one_of_the_file_half_a_pixel_on(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    assert CityscapesDataset("train", tmp_path)._intrinsics(TRAIN_FRAME, 48, 64) == (
        FOCAL_X,
        FOCAL_Y,
        U0 + 0.5,
        V0 + 0.5,
    )


def test_derived_edges_are_the_borders_of_instances(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    edges = CityscapesDataset("train", tmp_path, derive=["edges"])[0]["labels"]["edges"]
    cars = edges[CAR_ROWS, FIRST_CAR.start - 1 : SECOND_CAR.stop]
    expected = torch.zeros_like(cars)
    # The last column before each car, between the cars and of the second, and the last row of both.
    expected[:, [0, FIRST_CAR.stop - FIRST_CAR.start, -1]] = 1
    expected[-1, 1:] = 1
    assert torch.equal(cars, expected)
    assert edges[ID_ROW, :7].isnan().all()
    assert edges[ID_ROW, 7:NUM_IDS].eq(1).all()
    # Rows of one class, where disparities change from pixel to pixel, or are missing.
    assert not edges[0].any()
    assert not edges[40].any()


def test_a_set_without_disparities_or_labels_lacks_depth_or_classes(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    shutil.rmtree(tmp_path / "disparity")
    dataset = CityscapesDataset("train", tmp_path, derive=["edges"])
    assert list(dataset[0]["labels"]) == list(dataset.labels) == ["semseg", "edges"]
    assert dataset.read(0, ["depth"])["labels"] == {}
    with pytest.raises(ValueError, match=r"derives 'normals' from depth, but there is no \['.*disparity'\]"):
        CityscapesDataset("train", tmp_path, derive=["normals"])
    shutil.rmtree(tmp_path / "gtFine")
    assert list(CityscapesDataset("train", tmp_path).labels) == []
    with pytest.raises(ValueError, match="derives 'edges' from semseg, but there is no .*gtFine"):
        CityscapesDataset("train", tmp_path, derive=["edges"])


@pytest.mark.parametrize(
    ("kind", "ending", "content", "rule"),
    [
        ("leftImg8bit", "leftImg8bit.png", grey(8), "must be an 8-bit RGB image"),
        ("leftImg8bit", "leftImg8bit.png", lambda stored: stored[:-40], "the picture is damaged"),
        ("gtFine", "gtFine_labelIds.png", grey(16), "must be an 8-bit grey PNG of class ids"),
        ("gtFine", "gtFine_labelIds.png", grey(8, 34), "holds class id 34; ids are 0 to 33"),
        ("gtFine", "gtFine_labelIds.png", lambda stored: stored[:-40], "the picture is damaged"),
        ("gtFine", "gtFine_instanceIds.png", grey(8), "must be a 16-bit grey PNG of instance ids"),
        ("gtFine", "gtFine_instanceIds.png", grey(16, 34), "holds instance id 34; ids are 0 to 33 and 24000 to 33999"),
        ("gtFine", "gtFine_instanceIds.png", grey(16, 23999), "holds instance id 23999"),
        ("gtFine", "gtFine_instanceIds.png", grey(16, 34000), "holds instance id 34000"),
        ("disparity", "disparity.png", grey(8), r"must be a 16-bit grey PNG of disparities, 256 \* pixels \+ 1"),
        ("disparity", "disparity.png", lambda stored: stored[:-40], "the picture is damaged"),
        ("camera", "camera.json", "{", "is no camera file .* JSON with extrinsic.baseline in metres"),
        ("camera", "camera.json", "{}", r"is no camera file \(KeyError\('intrinsic'\)\)"),
        ("camera", "camera.json", "[1]", "is no camera file"),
    ],
    ids=range(14),
)
def test_a_wrong_file_is_named_with_the_rule(
    tmp_path: Path, kind: str, ending: str, content: np.ndarray | bytes | str | Callable, rule: str
) -> None:
    write_cityscapes(tmp_path)
    path = replace(tmp_path, kind, ending, content)
    dataset = CityscapesDataset("train", tmp_path, derive=["normals", "edges"])
    assert dataset[1]["labels"].keys() == {"semseg", "depth", "normals", "edges"}
    with pytest.raises(BadSampleError, match=rf"{path.name}'\W.*({rule})"):
        dataset[0]


def test_a_camera_of_no_baseline_is_refused(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    camera = {"extrinsic": {"baseline": -BASELINE}, "intrinsic": {"fx": FOCAL_X, "fy": FOCAL_Y, "u0": U0, "v0": V0}}
    replace(tmp_path, "camera", "camera.json", json.dumps(camera))
    with pytest.raises(BadSampleError, match=r"camera\.json'.*must be positive"):
        CityscapesDataset("train", tmp_path)[0]


@pytest.mark.parametrize(
    ("kind", "ending"),
    [
        ("gtFine", "gtFine_labelIds.png"),
        ("gtFine", "gtFine_instanceIds.png"),
        ("disparity", "disparity.png"),
        ("camera", "camera.json"),
    ],
)
def test_a_missing_file_of_a_frame_is_named(tmp_path: Path, kind: str, ending: str) -> None:
    write_cityscapes(tmp_path)
    file_of(tmp_path, "train", TRAIN_FRAME, kind, ending).unlink()
    with pytest.raises(BadSampleError, match=rf"{TRAIN_FRAME}_{ending}'.*cannot be read"):
        CityscapesDataset("train", tmp_path, derive=["edges"])[0]


@pytest.mark.parametrize(
    ("kind", "ending", "bits"), [("gtFine", "gtFine_labelIds", 8), ("disparity", "disparity", 16)]
)
def test_a_label_of_another_size_than_the_image_is_refused(tmp_path: Path, kind: str, ending: str, bits: int) -> None:
    write_cityscapes(tmp_path)
    replace(tmp_path, kind, f"{ending}.png", grey(bits, size=(48, 63)))
    with pytest.raises(BadSampleError, match=rf"{TRAIN_FRAME}: the label .* is 48 x 63 pixels, .* image is 48 x 64"):
        CityscapesDataset("train", tmp_path)[0]


def test_a_folder_that_is_empty_or_a_step_too_high_is_refused_with_the_layout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no frame of the split 'train'.*leftImg8bit/\{train,val\}/CITY"):
        CityscapesDataset("train", tmp_path)
    write_cityscapes(tmp_path / "inner")
    with pytest.raises(ValueError, match=r"holds no frame.*gtFine_labelIds\.png"):
        CityscapesDataset("validation", tmp_path)


def test_other_numbers_of_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_classes is 20; .* \[7, 8, 16, 19\]"):
        CityscapesDataset("train", tmp_path, num_classes=20)


def test_hidden_files_of_other_systems_are_no_frames(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    path = file_of(tmp_path, "train", TRAIN_FRAME, "leftImg8bit", "leftImg8bit.png")
    path.with_name(f"._{path.name}").write_bytes(b"")
    assert len(CityscapesDataset("train", tmp_path)) == 2


def test_a_pickled_data_set_reads_the_same(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    dataset = CityscapesDataset("train", tmp_path, derive=["normals"], num_classes=8)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.labels == dataset.labels
    assert all(torch.equal(copy[1]["labels"][name], label) for name, label in dataset[1]["labels"].items())
