import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from layouts.taskonomy import (
    DEPTHS,
    EDGE_ROW,
    EDGES,
    FOLDERS,
    FRAMES,
    ID_ROW,
    NORMAL_ROW,
    NORMALS,
    NUM_CODES,
    file_of,
    write_taskonomy,
)
from mt_adapters.data.frames import SPLITS
from mt_adapters.data.pictures import BadSampleError
from mt_adapters.data.taskonomy import TASKONOMY_CLASSES, TINY, TaskonomyDataset, read_split
from mt_adapters.tasks import get_task

LABELS = ["semseg", "depth", "normals", "edges"]
DOMAINS = {
    "image": "rgb",
    "semseg": "segment_semantic",
    "depth": "depth_zbuffer",
    "normals": "normal",
    "edges": "edge_texture",
}
FRAME = FRAMES["train"][0]


def png(array: np.ndarray, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=format)
    return buffer.getvalue()


def write_medium(folder: Path, ends: str) -> None:
    rows = [
        "id,train,val,test",
        "hanson,1,0,0",
        "darden,0,1,0",
        "allensville,0,0,1",
        "tomkins,1,0,0",
        "muleshoe,0,1,0",
    ]
    folder.mkdir(exist_ok=True)
    (folder / "train_val_test_medium.csv").write_bytes(ends.join(rows).encode())


@pytest.mark.parametrize("folders", FOLDERS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_layout_is_read_back_in_metres_ids_and_unit_vectors(tmp_path: Path, split: str, folders: str) -> None:
    known = write_taskonomy(tmp_path, folders=folders)
    dataset = TaskonomyDataset(split, tmp_path)
    assert [dataset.name(index) for index in range(len(dataset))] == FRAMES[split]
    for index, frame in enumerate(dataset.frames):
        sample, expected = dataset[index], known[frame]
        assert list(sample["labels"]) == list(dataset.labels) == LABELS
        assert torch.equal(sample["image"], expected["image"])
        assert torch.equal(sample["labels"]["semseg"], expected["semseg"])
        assert torch.equal(sample["labels"]["depth"], expected["depth"])
        torch.testing.assert_close(sample["labels"]["normals"], expected["normals"], rtol=0, atol=0.005)
        torch.testing.assert_close(sample["labels"]["edges"], expected["edges"], rtol=1e-6, atol=0)


def test_each_code_means_what_its_source_says(tmp_path: Path) -> None:
    write_taskonomy(tmp_path)
    labels = TaskonomyDataset("train", tmp_path)[0]["labels"]
    assert labels["semseg"][ID_ROW, :NUM_CODES].tolist() == [255, *range(17)]
    assert TASKONOMY_CLASSES[0] == "background"
    assert TASKONOMY_CLASSES[3 - 1] == "chair"
    assert len(TASKONOMY_CLASSES) == 17
    assert labels["depth"][0, : len(DEPTHS)].tolist() == list(DEPTHS.values())
    vectors = labels["normals"][:, NORMAL_ROW, : len(NORMALS)].T
    torch.testing.assert_close(vectors, torch.tensor(list(NORMALS.values())), rtol=0, atol=0.006)
    assert not vectors[-1].any()
    torch.testing.assert_close(vectors[:-1].norm(dim=1), torch.ones(len(NORMALS) - 1))
    torch.testing.assert_close(labels["edges"][EDGE_ROW, : len(EDGES)], torch.tensor(list(EDGES.values())))


def test_all_labels_are_valid_for_their_tasks(tmp_path: Path) -> None:
    write_taskonomy(tmp_path)
    for edges in ("edge_texture", "edge_occlusion"):
        for name, label in TaskonomyDataset("train", tmp_path, edges=edges)[0]["labels"].items():
            get_task(name, num_labels=17).check_label(label[None], 1, 48, 64)


def test_distance_along_the_ray_becomes_planar_depth_where_that_is_all_there_is(tmp_path: Path) -> None:
    known = write_taskonomy(tmp_path)
    shutil.rmtree(tmp_path / "depth_zbuffer")
    depth = TaskonomyDataset("train", tmp_path)[0]["labels"]["depth"]
    torch.testing.assert_close(depth[1:], known[FRAME]["depth"][1:], rtol=0, atol=1.5 / 512)
    assert depth[0, 0] == depth[0, len(DEPTHS) - 1] == 0


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (None, "cannot be read"),
        ("{}", "is no JSON with field_of_view_rads"),
        ("no json", "is no JSON with field_of_view_rads"),
        (json.dumps({"field_of_view_rads": 60.0}), r"is 60.0; it must be in \(0, pi\)"),
    ],
)
def test_a_wrong_camera_file_is_named_with_the_rule(tmp_path: Path, content: str | None, rule: str) -> None:
    write_taskonomy(tmp_path)
    path = file_of(tmp_path, FOLDERS["domains"], FRAME, "point_info", "json")
    path.unlink()
    if content is not None:
        path.write_text(content)
    # Planar depth needs no camera.
    assert "depth" in TaskonomyDataset("train", tmp_path)[0]["labels"]
    shutil.rmtree(tmp_path / "depth_zbuffer")
    with pytest.raises(BadSampleError, match=rf"{path.name}'\W.*({rule})"):
        TaskonomyDataset("train", tmp_path)[0]


def test_occlusion_edges_have_a_scale_of_their_own_and_no_label_in_holes(tmp_path: Path) -> None:
    write_taskonomy(tmp_path)
    edges = TaskonomyDataset("train", tmp_path, edges="edge_occlusion")[0]["labels"]["edges"]
    # 0.00625 * 65535 is 409.59375; the stored codes are those of the texture by 20.
    torch.testing.assert_close(edges[30, 40], torch.tensor(150 / 409.59375))
    assert edges[EDGE_ROW, len(EDGES) - 1] == 1
    assert torch.isnan(edges).nonzero().tolist() == [[0, 0], [0, len(DEPTHS) - 1]]
    for domain in ("depth_zbuffer", "depth_euclidean"):
        shutil.rmtree(tmp_path / domain)
    assert not TaskonomyDataset("train", tmp_path, edges="edge_occlusion")[0]["labels"]["edges"].isnan().any()


def test_holes_of_another_size_than_the_occlusion_edges_are_refused(tmp_path: Path) -> None:
    write_taskonomy(tmp_path)
    file_of(tmp_path, FOLDERS["domains"], FRAME, "depth_zbuffer").write_bytes(png(np.ones((48, 63), np.uint16)))
    dataset = TaskonomyDataset("train", tmp_path, edges="edge_occlusion")
    with pytest.raises(BadSampleError, match=r"edge_occlusion.png': is \(48, 64\), but depth.*\(48, 63\)"):
        dataset.read(0, ["edges"])


@pytest.mark.parametrize("ends", ["\r", "\n", "\r\n"])
@pytest.mark.parametrize("place", [".", "splits_taskonomy"])
def test_buildings_are_those_of_the_split_file_whose_lines_end_in_any_way(
    tmp_path: Path, place: str, ends: str
) -> None:
    write_taskonomy(tmp_path)
    write_medium(tmp_path / place, ends)
    assert TaskonomyDataset("train", tmp_path, subset="medium").frames == [FRAMES["train"][2]]
    assert TaskonomyDataset("validation", tmp_path, subset="medium").frames == FRAMES["validation"]
    # A building that its authors' readers leave out, even where it is there.
    shutil.copytree(tmp_path / "rgb/hanson", tmp_path / "rgb/tomkins")
    assert len(TaskonomyDataset("train", tmp_path, subset="medium")) == 1


def test_the_tiny_split_is_the_official_one() -> None:
    assert (len(TINY["train"]), len(TINY["validation"])) == (25, 5)
    assert not set(TINY["train"]) & set(TINY["validation"])


def test_a_missing_or_wrong_split_file_is_refused(tmp_path: Path) -> None:
    write_taskonomy(tmp_path)
    with pytest.raises(ValueError, match=r"there is no train_val_test_full.csv.*splits_taskonomy.zip"):
        TaskonomyDataset("train", tmp_path, subset="full")
    path = tmp_path / "train_val_test_full.csv"
    for content in ("", "hanson,1,0,0\n", "id,val\nhanson,1\n"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"full.csv' is no split file; its first line must be id,train,val,test"):
            read_split(path, "train")


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"subset": "huge"}, "unknown subset 'huge'.*'tiny'"),
        ({"edges": "keypoints2d"}, "edges names 'keypoints2d'.*'edge_occlusion'"),
        ({"derive": ["normals"]}, r"cannot derive \['normals'\]"),
    ],
)
def test_unknown_options_are_refused_with_the_known_ones(tmp_path: Path, options: dict, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        TaskonomyDataset("train", tmp_path, **options)


def test_a_frame_without_a_class_picture_lacks_the_label_as_in_the_true_set(tmp_path: Path) -> None:
    write_taskonomy(tmp_path)
    file_of(tmp_path, FOLDERS["domains"], FRAME, "segment_semantic").unlink()
    dataset = TaskonomyDataset("train", tmp_path)
    assert list(dataset[0]["labels"]) == LABELS[1:]
    assert list(dataset[1]["labels"]) == LABELS
    # A building without any is not as published.
    shutil.rmtree(tmp_path / "segment_semantic/allensville")
    with pytest.raises(BadSampleError, match="segmentsemantic.png': cannot be read"):
        dataset[1]


def test_a_domain_that_is_not_there_leaves_its_label_out(tmp_path: Path) -> None:
    write_taskonomy(tmp_path)
    for domain in ("segment_semantic", "normal", "edge_texture"):
        shutil.rmtree(tmp_path / domain)
    dataset = TaskonomyDataset("train", tmp_path)
    assert list(dataset.labels) == list(dataset[0]["labels"]) == ["depth"]
    assert list(TaskonomyDataset("train", tmp_path, edges="edge_occlusion").labels) == ["depth", "edges"]


@pytest.mark.parametrize(
    ("label", "content", "rule"),
    [
        ("image", png(np.zeros((48, 64), np.uint8)), "must be an 8-bit RGB image"),
        ("semseg", png(np.full((48, 64), 18, np.uint8)), "holds class id 18; ids are 0 to 17"),
        ("semseg", png(np.zeros((48, 64), np.uint16)), "must be an 8-bit grey PNG of class ids"),
        ("semseg", lambda stored: stored[:-40], "the picture is damaged"),
        ("depth", png(np.zeros((48, 64), np.uint8)), "must be a 16-bit grey PNG of depth in 1/512 m"),
        ("depth", lambda stored: stored[:-40], "the picture is damaged"),
        ("depth", None, "cannot be read"),
        ("normals", png(np.full((48, 64, 3), 255, np.uint8)), "0.73 off unit length"),
        ("normals", png(np.full((48, 64, 3), 128, np.uint8), "JPEG"), "is JPEG .* must be an 8-bit RGB PNG"),
        ("normals", None, "cannot be read"),
        ("edges", png(np.zeros((48, 64), np.uint8)), "must be a 16-bit grey PNG of edges"),
        ("edges", None, "cannot be read"),
    ],
    ids=range(12),
)
def test_a_wrong_file_is_named_with_the_rule(
    tmp_path: Path, label: str, content: bytes | Callable | None, rule: str
) -> None:
    write_taskonomy(tmp_path)
    path = file_of(tmp_path, FOLDERS["domains"], FRAME, DOMAINS[label])
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    dataset = TaskonomyDataset("train", tmp_path)
    assert list(dataset[1]["labels"]) == LABELS
    with pytest.raises(BadSampleError, match=rf"allensville/{path.name}'\W.*({rule})"):
        dataset[0]


def test_a_label_of_another_size_than_the_image_is_refused(tmp_path: Path) -> None:
    write_taskonomy(tmp_path)
    file_of(tmp_path, FOLDERS["domains"], FRAME, "segment_semantic").write_bytes(png(np.ones((24, 32), np.uint8)))
    with pytest.raises(BadSampleError, match=rf"{FRAME}: the label 'semseg' is 24 x 32 .* image is 48 x 64"):
        TaskonomyDataset("train", tmp_path)[0]


def test_a_folder_that_is_empty_or_a_step_too_high_is_refused_with_the_layout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no frame of the split 'train'.*rgb/BUILDING/point_\*"):
        TaskonomyDataset("train", tmp_path)
    write_taskonomy(tmp_path / "inner")
    with pytest.raises(ValueError, match=r"holds no frame"):
        TaskonomyDataset("validation", tmp_path)
    with pytest.raises(ValueError, match="there is no folder .*nowhere"):
        TaskonomyDataset("train", tmp_path / "nowhere")


def test_a_pickled_data_set_reads_the_same(tmp_path: Path) -> None:
    write_taskonomy(tmp_path, folders="buildings")
    dataset = TaskonomyDataset("train", tmp_path)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.labels == dataset.labels
    assert all(torch.equal(copy[1]["labels"][name], label) for name, label in dataset[1]["labels"].items())
