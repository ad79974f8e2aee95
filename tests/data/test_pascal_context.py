"""PASCAL-Context: known values come back in our units, and every bad file is named with the rule it breaks."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from layouts.pascal_context import FRAMES, WITHOUT_PERSON, thing, write_parts, write_pascal_context
from mt_adapters.data import BadSampleError
from mt_adapters.data.pascal_context import (
    INDOOR_CLASSES,
    PART_CLASSES,
    PART_IDS,
    PascalContextDataset,
    borders,
    fitted,
)
from mt_adapters.tasks import get_task

SIZE = (48, 64)
HALF = 32
FIRST = "2008_000002"
TASKS = [get_task({"name": name, "type": "semseg", "num_labels": n}) for name, n in (("semseg", 21), ("parts", 7))]
TASKS += [get_task({"name": "saliency", "type": "semseg", "num_labels": 2}), get_task("normals"), get_task("edges")]


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
    # There is no normal in the sky, nor where the picture is black.
    expected = torch.zeros(3, *SIZE)
    expected[0, :16, :HALF], expected[1, 16:32, :HALF], expected[2, 32:-1, :HALF] = -1, 1, 1
    torch.testing.assert_close(labels["normals"], expected, atol=0.005, rtol=0)
    assert not labels["normals"][:, -1].any()
    assert not labels["normals"][:, :, HALF:].any()
    # The border is two pixels thick and thinned to one, which also takes its upper end.
    assert labels["edges"].nonzero().tolist() == [[row, HALF - 1] for row in range(1, SIZE[0])]
    for task in TASKS:
        task.check_label(labels[task.name][None], 1, *SIZE)


# Class ids, and the edges that cv2.Laplacian (OpenCV 5.0) and skimage.morphology.thin (0.26) make of them; in the
# second map the Laplacian is also zero where ids rise evenly from side to side.
EDGES = [
    (
        "11111112222222 11111112222222 11111112222222 11111112222222 11133333332222 11133333332222 11144333332222",
        ".............. ......#....... .......#...... ......#.#..... .....#.##..... ...##....#.... .....#...#....",
    ),
    (
        "332233332 332233332 111133331 111133331 112233112 112233112",
        "..##..... .#..#..#. .#.#...#. ..##...#. ..#.###.. ...#.....",
    ),
]


@pytest.mark.parametrize(("ids", "edges"), EDGES, ids=range(2))
def test_edges_are_those_of_the_authors_reader(ids: str, edges: str) -> None:
    classes = np.array([[int(number) for number in row] for row in ids.split()])
    assert ["".join(".#"[pixel] for pixel in row) for row in borders(classes).astype(int)] == edges.split()


def test_a_label_map_of_floating_point_is_read(folder: Path) -> None:
    file = folder / f"pascal-context/trainval/{FIRST}.mat"
    before = PascalContextDataset("train", folder)[0]["labels"]["edges"]
    scipy.io.savemat(file, {"LabelMap": scipy.io.loadmat(file)["LabelMap"].astype(np.float64)})
    assert torch.equal(PascalContextDataset("train", folder)[0]["labels"]["edges"], before)


def test_a_copy_in_another_process_reads_the_same(folder: Path) -> None:
    dataset = PascalContextDataset("train", folder)
    labels, copied = dataset[0]["labels"], pickle.loads(pickle.dumps(dataset))[0]["labels"]
    assert labels.keys() == copied.keys()
    assert all(torch.equal(labels[name], copied[name]) for name in labels)


def test_a_part_of_a_later_person_covers_that_of_an_earlier_one(folder: Path) -> None:
    people = [thing(15, SIZE, {"hair": (0, 8)}), thing(15, SIZE, {"ruleg": (4, 12)})]
    write_parts(folder / f"human_parts/{FIRST}.mat", people)
    parts = PascalContextDataset("train", folder)[0]["labels"]["parts"][:, 0]
    assert parts[:13].tolist() == [1] * 4 + [5] * 8 + [0]


def test_splits_are_those_of_the_lists_and_a_frame_without_a_person_has_no_parts(folder: Path) -> None:
    train, validation = (PascalContextDataset(split, folder) for split in ("train", "validation"))
    assert [train.name(0), train.name(1)] == list(FRAMES["train"])
    assert [validation.name(0)] == list(FRAMES["val"])
    assert train.name(1) == WITHOUT_PERSON
    assert train[1]["labels"].keys() == {"semseg", "saliency", "normals", "edges"}
    assert (train[1]["labels"]["semseg"][1:, :HALF] == 15).all(), "read from semseg/pascal-context"


def test_the_tables_hold_what_the_literature_groups() -> None:
    # HUMAN_PART[6] of the authors' reader, from left to right: 0 to 6.
    stored = (
        "hair1 head1 lear1 lebrow1 leye1 lfoot6 lhand4 llarm4 llleg6 luarm3 luleg5 mouth1 neck2 nose1 rear1 rebrow1 "
    )
    stored += "reye1 rfoot6 rhand4 rlarm4 rlleg6 ruarm3 ruleg5 torso2"
    assert {f"{part}{number}" for part, number in PART_IDS.items()} == set(stored.split())
    assert PART_CLASSES == ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")
    # The names that both nyu_classes.json and context_classes.json have, but for "unknown", and tvmonitor.
    assert len(set(INDOOR_CLASSES.tolist())) == len(INDOOR_CLASSES) == 170
    assert INDOOR_CLASSES.sum() == 37556
    assert 431 not in INDOOR_CLASSES
    # Wall, floor, person and tvmonitor; not sky, sea or mountain.
    assert {440, 158, 284, 427} <= set(INDOOR_CLASSES.tolist())
    assert not {360, 347, 258} & set(INDOOR_CLASSES.tolist())


def test_every_map_of_the_images_shape_is_resized(folder: Path) -> None:
    before = PascalContextDataset("train", folder)[0]["labels"]
    for name in ("semseg/VOC12", "normals_distill", "sal_distill"):
        file = folder / f"{name}/{FIRST}.png"
        with Image.open(file) as picture:
            picture.resize((3 * SIZE[1], 3 * SIZE[0]), Image.Resampling.NEAREST).save(file)
    file = folder / f"pascal-context/trainval/{FIRST}.mat"
    scipy.io.savemat(file, {"LabelMap": scipy.io.loadmat(file)["LabelMap"].repeat(3, axis=0).repeat(3, axis=1)})
    parts = {"head": (12, 24), "lfoot": (24, 36), "torso": (36, 48)}
    write_parts(folder / f"human_parts/{FIRST}.mat", [thing(15, (3 * SIZE[0], 3 * SIZE[1]), parts)])
    labels = PascalContextDataset("train", folder)[0]["labels"]
    assert labels.keys() == before.keys()
    assert all(torch.equal(labels[name], before[name]) for name in labels)


def test_a_resized_map_takes_the_nearest_pixel() -> None:
    large = np.zeros((9, 12), dtype=np.uint8)
    large[1::3, 1::3] = np.arange(12).reshape(3, 4)
    assert np.array_equal(fitted(large, (3, 4), Path("map")), np.arange(12).reshape(3, 4))


@pytest.mark.parametrize(("size", "fits"), [((24, 32), True), ((25, 32), True), ((26, 32), False), ((32, 32), False)])
def test_a_map_of_another_shape_by_more_than_a_pixel_is_refused(size: tuple[int, int], fits: bool) -> None:
    map_ = np.zeros(size, dtype=np.uint8)
    if fits:
        assert fitted(map_, SIZE, Path("map.png")).shape == SIZE
        return
    with pytest.raises(BadSampleError, match=rf"map\.png.*is {size[0]} x {size[1]} pixels, but the image is 48 x 64"):
        fitted(map_, SIZE, Path("map.png"))


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
            r"trainval.*LabelMap holds class id 460; ids are 0 to 459",
        ),
        (
            lambda folder: scipy.io.savemat(
                folder / f"pascal-context/trainval/{FIRST}.mat", {"LabelMap": GREY.astype(np.int16) - 1}
            ),
            r"trainval.*LabelMap holds class id -1; ids are 0 to 459",
        ),
        (
            lambda folder: scipy.io.savemat(folder / f"pascal-context/trainval/{FIRST}.mat", {"LabelMap": GREY + 0.5}),
            r"trainval.*LabelMap: is float64 .* whole numbers",
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
    ids=range(15),
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
