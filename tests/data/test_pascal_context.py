"""PASCAL-Context: known values come back in our units, and every bad file is named with the rule it breaks."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from layouts.pascal_context import FRAMES, WITHOUT_PERSON, thing, write_parts, write_pascal_context
from mt_adapters.data import BadSampleError
from mt_adapters.data.pascal_context import INDOOR_CLASSES, PARTS, PascalContextDataset

SIZE = (48, 64)
HALF = 32
FIRST = "2008_000002"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pascal_context(tmp_path, SIZE)
    return tmp_path


def test_known_values_come_back_in_ids_and_unit_vectors(folder: Path) -> None:
    dataset = PascalContextDataset("train", folder)
    labels = dataset[0]["labels"]
    assert labels.keys() == {"semseg", "parts", "saliency", "normals", "edges"}
    assert (labels["semseg"][0] == 255).all()
    assert (labels["semseg"][1:, :HALF] == 15).all()
    assert (labels["semseg"][1:, HALF:] == 0).all()
    parts = torch.zeros(SIZE, dtype=torch.int64)
    parts[4:8], parts[8:12], parts[12:16] = 1, 6, 2
    assert torch.equal(labels["parts"], parts), "head 1, foot 6, torso 2; a bird's eye is no part of a person"
    assert (labels["saliency"][:, :HALF] == 1).all()
    assert (labels["saliency"][:, HALF:] == 0).all()
    # Stored as (1, 0, 0) with x left; there is no normal in the sky.
    expected = torch.tensor([-1.0, 0.0, 0.0])[:, None, None].expand(3, SIZE[0], HALF)
    torch.testing.assert_close(labels["normals"][:, :, :HALF], expected, atol=0.005, rtol=0)
    assert not labels["normals"][:, :, HALF:].any()
    assert labels["edges"].nonzero()[:, 1].unique().tolist() == [HALF - 1, HALF]
    assert labels["edges"].sum() == 2 * SIZE[0]


def test_splits_are_those_of_the_lists_and_a_frame_without_a_person_has_no_parts(folder: Path) -> None:
    train, validation = (PascalContextDataset(split, folder) for split in ("train", "validation"))
    assert [train.name(0), train.name(1)] == list(FRAMES["train"])
    assert [validation.name(0)] == list(FRAMES["val"])
    assert train.name(1) == WITHOUT_PERSON
    assert train[1]["labels"].keys() == {"semseg", "saliency", "normals", "edges"}
    assert (train[1]["labels"]["semseg"][1:, :HALF] == 15).all(), "read from semseg/pascal-context"


def test_the_tables_hold_what_the_literature_groups() -> None:
    assert sum(len(group) for group in PARTS.values()) == 24
    assert len(PARTS) == 6
    assert len(INDOOR_CLASSES) == len(set(INDOOR_CLASSES.tolist()))
    # Wall, floor, person and tvmonitor; not sky, sea or mountain.
    assert {440, 158, 284, 427} <= set(INDOOR_CLASSES.tolist())
    assert not {360, 347, 258} & set(INDOOR_CLASSES.tolist())


def test_maps_of_the_images_shape_are_resized_and_others_refused(folder: Path) -> None:
    small = np.zeros((24, 32), dtype=np.uint8)
    small[:12] = 255
    file = folder / f"sal_distill/{FIRST}.png"
    Image.fromarray(small).save(file)
    saliency = PascalContextDataset("train", folder)[0]["labels"]["saliency"]
    assert (saliency[:24] == 1).all()
    assert (saliency[24:] == 0).all()
    Image.fromarray(np.zeros((32, 32), dtype=np.uint8)).save(file)
    with pytest.raises(BadSampleError, match=r"sal_distill.*is 32 x 32 pixels, but the image is 48 x 64"):
        PascalContextDataset("train", folder)[0]


def wrong_png(name: str, array: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: Image.fromarray(array).save(folder / f"{name}/{FIRST}.png")


def cut(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / name
        stored = file.read_bytes()
        file.write_bytes(stored[: len(stored) // 2])

    return damage


GREY = np.zeros(SIZE, dtype=np.uint8)


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (wrong_png("semseg/VOC12", GREY + np.uint8(21)), r"VOC12.*holds class id 21; ids are 0 to 20, 255"),
        (wrong_png("semseg/VOC12", GREY.astype(np.uint16)), r"VOC12.*must be an 8-bit PNG of class ids"),
        (wrong_png("normals_distill", GREY), r"normals_distill.*must be an 8-bit RGB PNG"),
        (wrong_png("sal_distill", GREY.astype(np.uint16)), r"sal_distill.*must be an 8-bit grey PNG"),
        (cut(f"normals_distill/{FIRST}.png"), r"normals_distill.*the picture is damaged"),
        (cut(f"JPEGImages/{FIRST}.jpg"), r"JPEGImages.*the picture is damaged"),
        (cut(f"pascal-context/trainval/{FIRST}.mat"), r"trainval.*no whole MATLAB file"),
        (cut(f"human_parts/{FIRST}.mat"), r"human_parts.*no whole MATLAB file"),
        (lambda folder: (folder / f"sal_distill/{FIRST}.png").unlink(), r"sal_distill.*cannot be read"),
        (lambda folder: (folder / f"semseg/VOC12/{FIRST}.png").unlink(), r"VOC12.*cannot be read"),
        (
            lambda folder: scipy.io.savemat(
                folder / f"pascal-context/trainval/{FIRST}.mat", {"LabelMap": GREY.astype(np.uint16) + 460}
            ),
            r"trainval.*up to 460; it must be .*0 to 459",
        ),
        (
            lambda folder: write_parts(folder / f"human_parts/{FIRST}.mat", [thing(15, SIZE, {"tail": (0, 4)})]),
            r"human_parts.*no annotation of parts \(KeyError\('tail'\)\)",
        ),
        (
            lambda folder: scipy.io.savemat(folder / f"human_parts/{FIRST}.mat", {"other": GREY}),
            r"human_parts.*it must have 'anno'",
        ),
    ],
    ids=range(13),
)
def test_a_bad_file_is_named_with_the_rule(folder: Path, damage: Callable[[Path], None], rule: str) -> None:
    damage(folder)
    with pytest.raises(BadSampleError, match=rule):
        PascalContextDataset("train", folder)[0]


def test_a_label_whose_folder_is_missing_is_left_out(folder: Path) -> None:
    (folder / "sal_distill").rename(folder / "elsewhere")
    dataset = PascalContextDataset("train", folder)
    assert "saliency" not in dataset.labels
    assert dataset[0]["labels"].keys() == {"semseg", "parts", "normals", "edges"}


def test_a_folder_that_is_not_the_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no frame of the split 'train'.*JPEGImages.*ImageSets"):
        PascalContextDataset("train", tmp_path)
