import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from layouts.tilted_plane import NORMAL
from layouts.vkitti2 import CAMERA, COLORS, DEPTHS, FRAMES, ID_ROW, SHARED, file_of, write_vkitti2
from mt_adapters.data.cityscapes import CLASS_SETS
from mt_adapters.data.frames import SPLITS
from mt_adapters.data.pictures import BadSampleError
from mt_adapters.data.vkitti2 import VARIATIONS, VirtualKitti2Dataset
from mt_adapters.tasks import get_task

FILES = {"image": ("rgb", "rgb", "jpg"), "semseg": ("classSegmentation", "classgt"), "depth": ("depth", "depth")}
TRAIN_FRAME = FRAMES["train"][0]


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def rgb(color: tuple[int, int, int], size: tuple[int, int] = (48, 64)) -> bytes:
    return png(np.full((*size, 3), color, dtype=np.uint8))


@pytest.mark.parametrize("split", SPLITS)
def test_frames_are_read_back_in_metres_and_class_ids(tmp_path: Path, split: str) -> None:
    known = write_vkitti2(tmp_path)
    dataset = VirtualKitti2Dataset(split, tmp_path)
    assert [dataset.name(index) for index in range(len(dataset))] == sorted(FRAMES[split])
    for index, frame in enumerate(dataset.frames):
        sample = dataset[index]
        assert (sample["image"].float() - known[frame]["image"].float()).abs().max() < 8
        assert list(sample["labels"]) == ["semseg", "depth"]
        assert torch.equal(sample["labels"]["semseg"], known[frame]["semseg"])
        assert torch.equal(sample["labels"]["depth"], known[frame]["depth"])
        assert torch.equal(sample["labels"]["depth"][0, : len(DEPTHS)], torch.tensor(list(DEPTHS.values())))


def test_each_colour_is_the_class_that_its_source_says_in_the_order_of_cityscapes(tmp_path: Path) -> None:
    write_vkitti2(tmp_path)
    dataset = VirtualKitti2Dataset("train", tmp_path)
    assert dataset[0]["labels"]["semseg"][ID_ROW, : len(COLORS)].tolist() == list(SHARED)
    assert dataset.labels["semseg"] == tuple(CLASS_SETS[8])
    dataset = VirtualKitti2Dataset("train", tmp_path, num_classes=14)
    assert dataset[0]["labels"]["semseg"][ID_ROW, : len(COLORS)].tolist() == [*range(14), 255]
    assert dataset.labels["semseg"] == tuple(COLORS)[:14]


def test_all_labels_are_valid_for_their_tasks(tmp_path: Path) -> None:
    write_vkitti2(tmp_path)
    dataset = VirtualKitti2Dataset("train", tmp_path, derive=["normals", "edges"])
    labels = dataset[1]["labels"]
    assert labels.keys() == dataset.labels.keys() == {"semseg", "depth", "normals", "edges"}
    for name, label in labels.items():
        get_task(name, num_labels=8).check_label(label[None], 1, 48, 64)


def test_normals_derived_from_depth_are_those_of_the_plane(tmp_path: Path) -> None:
    write_vkitti2(tmp_path)
    normals = VirtualKitti2Dataset("train", tmp_path, derive=["normals"])[0]["labels"]["normals"]
    is_labelled = (normals != 0).any(dim=0)
    assert is_labelled[3:-1, 1:-1].all()
    torch.testing.assert_close(normals[:, is_labelled].mean(dim=1), torch.tensor(NORMAL), rtol=0, atol=0.005)
    assert (normals[:, is_labelled].T @ torch.tensor(NORMAL)).min() > 0.99


def test_the_camera_is_the_one_of_the_frame_half_a_pixel_on(tmp_path: Path) -> None:
    write_vkitti2(tmp_path)
    dataset = VirtualKitti2Dataset("train", tmp_path)
    focal_x, focal_y, column, row = CAMERA
    for camera in (0, 1):
        for number in (0, 1):
            found = dataset._intrinsics(f"Scene01/clone/Camera_{camera}/0000{number}", 48, 64)
            assert found == (focal_x + camera, focal_y + 2 * number, column + 0.5, row + 0.5)


def test_derived_edges_are_borders_of_all_classes_and_steps_in_depth(tmp_path: Path) -> None:
    write_vkitti2(tmp_path)
    edges = VirtualKitti2Dataset("train", tmp_path, derive=["edges"])[0]["labels"]["edges"]
    # Terrain, GuardRail and Misc, too, which are not among the 8 classes.
    assert edges[ID_ROW, :13].eq(1).all()
    # Undefined is no region, but has a depth, so a label: no edge.
    assert edges[ID_ROW, len(COLORS) - 1] == 0
    assert edges[0, : len(DEPTHS)].tolist() == [0, 1, 1, 1, 0]
    assert not edges[35].any()


def test_scene_02_is_validation_and_the_options_choose_other_frames(tmp_path: Path) -> None:
    write_vkitti2(tmp_path)
    both = VirtualKitti2Dataset("validation", tmp_path, cameras=(0, 1))
    assert both.frames == ["Scene02/fog/Camera_0/00000", "Scene02/fog/Camera_1/00000"]
    right = VirtualKitti2Dataset("train", tmp_path, cameras=(1,), variations=("clone",))
    assert right.frames == ["Scene01/clone/Camera_1/00000", "Scene01/clone/Camera_1/00001"]
    turned = VirtualKitti2Dataset("validation", tmp_path, validation_scenes=("Scene01", "Scene20"))
    assert turned.frames == FRAMES["train"]
    assert len(VirtualKitti2Dataset("train", tmp_path, validation_scenes=())) == 4
    with pytest.raises(ValueError, match="holds no frame of the split 'validation'"):
        VirtualKitti2Dataset("validation", tmp_path, validation_scenes=())
    assert len(VARIATIONS) == 10


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("num_classes", 19, r"num_classes names \[19\]; Virtual KITTI 2 has \[8, 14\]"),
        ("variations", ["snow"], r"variations names \['snow'\]; .*15-deg-left"),
        ("cameras", [2], r"cameras names \[2\]; .*\[0, 1\]"),
        ("validation_scenes", ["Scene03"], r"validation_scenes names \['Scene03'\]; .*Scene01"),
    ],
)
def test_unknown_options_are_refused_with_the_known_ones(
    tmp_path: Path, option: str, value: int | list, rule: str
) -> None:
    with pytest.raises(ValueError, match=rule):
        VirtualKitti2Dataset("train", tmp_path, **{option: value})


def test_a_set_without_depth_or_classes_lacks_them(tmp_path: Path) -> None:
    write_vkitti2(tmp_path)
    for folder in tmp_path.glob("*/*/frames/depth"):
        shutil.rmtree(folder)
    dataset = VirtualKitti2Dataset("train", tmp_path, derive=["edges"])
    assert list(dataset[0]["labels"]) == list(dataset.labels) == ["semseg", "edges"]
    with pytest.raises(ValueError, match=r"derives 'normals' from depth, but there is no \['.*frames.depth'\]"):
        VirtualKitti2Dataset("train", tmp_path, derive=["normals"])
    for folder in tmp_path.glob("*/*/frames/classSegmentation"):
        shutil.rmtree(folder)
    assert list(VirtualKitti2Dataset("train", tmp_path).labels) == []


def test_a_variation_that_alone_lacks_a_label_is_damaged(tmp_path: Path) -> None:
    write_vkitti2(tmp_path)
    shutil.rmtree(tmp_path / "Scene01/clone/frames/depth")
    dataset = VirtualKitti2Dataset("train", tmp_path)
    assert "depth" in dataset[2]["labels"]
    with pytest.raises(BadSampleError, match=r"clone/frames/depth/Camera_0/depth_00000\.png'.*cannot be read"):
        dataset[0]


@pytest.mark.parametrize(
    ("label", "content", "rule"),
    [
        ("image", png(np.zeros((48, 64), np.uint8)), "must be an 8-bit RGB image"),
        ("semseg", png(np.zeros((48, 64), np.uint8)), "must be an 8-bit RGB PNG of the colours of classes"),
        (
            "semseg",
            rgb((210, 0, 201)),
            r"holds the colour \(210, 0, 201\), which is of no class.*'Terrain'",
        ),
        ("semseg", rgb((255, 255, 255)), r"holds the colour \(255, 255, 255\), which is of no class"),
        ("semseg", lambda stored: stored[:-40], "the picture is damaged"),
        ("depth", png(np.zeros((48, 64), np.uint8)), "must be a 16-bit grey PNG of centimetres"),
        ("depth", rgb((0, 0, 0)), "must be a 16-bit grey PNG of centimetres"),
        ("depth", lambda stored: stored[:-40], "the picture is damaged"),
        ("depth", None, "cannot be read"),
        ("semseg", None, "cannot be read"),
    ],
    ids=range(10),
)
def test_a_wrong_file_is_named_with_the_rule(
    tmp_path: Path, label: str, content: bytes | Callable | None, rule: str
) -> None:
    write_vkitti2(tmp_path)
    path = file_of(tmp_path, TRAIN_FRAME, *FILES[label])
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    dataset = VirtualKitti2Dataset("train", tmp_path)
    assert dataset[1]["labels"].keys() == {"semseg", "depth"}
    with pytest.raises(BadSampleError, match=rf"clone/frames/.*{path.name}'\W.*({rule})"):
        dataset[0]


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (None, "cannot be read"),
        ("frame cameraID K[0,0] K[1,1] K[0,2] K[1,2]\n1 0 725 725 620.5 187\n", "has no line for frame 0, camera 0"),
        ("0 0 725 725 620.5\n", r"the line '0 0 725 725 620.5' must be frame, camera, K\[0,0\]"),
        ("0 0 725 725 620.5 x\n", "the line '0 0 725 725 620.5 x' must be"),
    ],
)
def test_a_wrong_camera_file_is_named_with_the_rule(tmp_path: Path, content: str | None, rule: str) -> None:
    write_vkitti2(tmp_path)
    path = tmp_path / "Scene01/clone/intrinsic.txt"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(BadSampleError, match=rf"Scene01/clone/intrinsic\.txt'\W.*({rule})"):
        VirtualKitti2Dataset("train", tmp_path, derive=["normals"])[0]
    assert VirtualKitti2Dataset("train", tmp_path)[0]["labels"].keys() == {"semseg", "depth"}


@pytest.mark.parametrize(("label", "content"), [("semseg", rgb((0, 0, 0), (48, 63))), ("depth", None)])
def test_a_label_of_another_size_than_the_image_is_refused(tmp_path: Path, label: str, content: bytes | None) -> None:
    write_vkitti2(tmp_path)
    path = file_of(tmp_path, TRAIN_FRAME, *FILES[label])
    path.write_bytes(content or png(np.zeros((48, 63), np.uint16)))
    with pytest.raises(BadSampleError, match=rf"{TRAIN_FRAME}: the label '{label}' is 48 x 63 .* image is 48 x 64"):
        VirtualKitti2Dataset("train", tmp_path)[0]


def test_a_folder_that_is_empty_or_a_step_too_high_is_refused_with_the_layout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no frame of the split 'train'.*SceneXX/VARIATION/frames/rgb"):
        VirtualKitti2Dataset("train", tmp_path)
    write_vkitti2(tmp_path / "inner")
    with pytest.raises(ValueError, match=r"holds no frame.*classgt_\*\.png"):
        VirtualKitti2Dataset("validation", tmp_path)


def test_a_pickled_data_set_reads_the_same(tmp_path: Path) -> None:
    write_vkitti2(tmp_path)
    dataset = VirtualKitti2Dataset("train", tmp_path, derive=["normals"], num_classes=14)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.labels == dataset.labels
    assert all(torch.equal(copy[1]["labels"][name], label) for name, label in dataset[1]["labels"].items())
