import io
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torch.utils.data import DataLoader

from layouts.nyuv2 import (
    CAMERA,
    ENDINGS,
    FOLDER_FRAMES,
    FRAMES,
    IDS_ROW,
    NAMES,
    NAMES_ROW,
    NORMAL_ROW,
    NORMALS,
    class_of_name,
    file_of,
    write_nyuv2_folders,
    write_nyuv2_mat,
)
from layouts.tilted_plane import NORMAL
from mt_adapters.data.frames import SPLITS
from mt_adapters.data.nyuv2 import NYU13_CLASSES, NYU40_CLASSES, NyuV2Dataset
from mt_adapters.data.pictures import BadSampleError
from mt_adapters.tasks import get_task

ALL_FOUR = ["semseg", "depth", "normals", "edges"]
DERIVED = ["normals", "edges"]
# From the table of 13 classes in class13Mapping.mat, by name.
IN_13 = {"wall": "wall", "floor": "floor", "cabinet": "furniture", "bed": "bed", "chair": "chair", "sofa": "sofa"}
IN_13 |= {"table": "table", "door": "wall", "window": "window", "bookshelf": "furniture", "picture": "picture"}
IN_13 |= {"desk": "table", "ceiling": "ceiling", "books": "books", "television": "tv", "lamp": "objects"}


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("split", SPLITS)
def test_frames_of_the_authors_file_are_read_back_the_right_way_round(tmp_path: Path, split: str) -> None:
    known = write_nyuv2_mat(tmp_path)
    dataset = NyuV2Dataset(split, tmp_path)
    raw = NyuV2Dataset(split, tmp_path, raw_depth=True)
    assert [dataset.name(index) for index in range(len(dataset))] == FRAMES[split]
    for index, frame in enumerate(dataset.frames):
        sample = dataset[index]
        assert list(sample["labels"]) == list(dataset.labels) == ["semseg", "depth"]
        assert torch.equal(sample["image"], known[frame]["image"])
        assert torch.equal(sample["labels"]["semseg"], known[frame]["semseg"])
        assert torch.equal(sample["labels"]["depth"], known[frame]["depth"])
        assert torch.equal(raw[index]["labels"]["depth"], known[frame]["raw_depth"])
        with Image.open(io.BytesIO(dataset.image_bytes(index))) as picture:
            assert np.array_equal(np.array(picture), known[frame]["image"].permute(1, 2, 0).numpy())


def test_names_become_classes_by_the_mapping_file_and_0_has_no_label(tmp_path: Path) -> None:
    write_nyuv2_mat(tmp_path)
    semseg = NyuV2Dataset("train", tmp_path)[0]["labels"]["semseg"]
    assert semseg[NAMES_ROW, : len(NAMES)].tolist() == [255, *(class_of_name(code) - 1 for code in NAMES[1:])]
    dataset = NyuV2Dataset("train", tmp_path, num_classes=13)
    coarse = dataset[0]["labels"]["semseg"]
    assert dataset.labels["semseg"] == NYU13_CLASSES
    assert coarse[NAMES_ROW, 0] == 255
    for fine, place in zip(semseg.flatten().tolist(), coarse.flatten().tolist(), strict=True):
        name = "" if fine == 255 else NYU40_CLASSES[fine]
        assert name not in IN_13 or NYU13_CLASSES[place] == IN_13[name]


def test_the_13_classes_of_the_40_are_those_of_the_source(tmp_path: Path) -> None:
    write_nyuv2_folders(tmp_path)
    coarse = NyuV2Dataset("train", tmp_path, num_classes=13)[0]["labels"]["semseg"][IDS_ROW, :41].tolist()
    assert coarse[0] == 255
    found = {name: NYU13_CLASSES[place] for name, place in zip(NYU40_CLASSES, coarse[1:], strict=True)}
    assert {name: found[name] for name in IN_13} == IN_13
    assert set(found.values()) == set(NYU13_CLASSES)
    assert (len(NYU40_CLASSES), len(NYU13_CLASSES)) == (40, 13)


def test_the_invented_border_of_full_frames_has_no_depth(tmp_path: Path) -> None:
    known = write_nyuv2_mat(tmp_path, size=(480, 640))
    labels = NyuV2Dataset("validation", tmp_path)[0]["labels"]
    # MATLAB's 45:471 and 41:601.
    rows, columns = torch.nonzero(labels["depth"], as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (44, 470, 40, 600)
    assert (labels["depth"] > 0).sum() == 427 * 561
    assert torch.equal(labels["depth"][44:471, 40:601], known["0005"]["depth"][44:471, 40:601])
    assert torch.equal(labels["semseg"], known["0005"]["semseg"])
    focal_x, focal_y, center_x, center_y = CAMERA
    camera = NyuV2Dataset("validation", tmp_path)._intrinsics("0005", 480, 640)
    assert camera == pytest.approx((focal_x, focal_y, center_x - 0.5, center_y - 0.5))


def test_normals_derived_from_depth_are_those_of_the_plane(tmp_path: Path) -> None:
    write_nyuv2_mat(tmp_path)
    normals = NyuV2Dataset("train", tmp_path, derive=["normals"])[0]["labels"]["normals"]
    is_labelled = (normals != 0).any(dim=0)
    assert is_labelled[1:-1, 1:-1].all()
    assert (normals[:, is_labelled].T @ torch.tensor(NORMAL)).min() > 0.9999


def test_derived_edges_are_borders_of_instances_of_any_name(tmp_path: Path) -> None:
    write_nyuv2_mat(tmp_path)
    edges = NyuV2Dataset("train", tmp_path, derive=["edges"])[0]["labels"]["edges"]
    # Two instances of one name, and two names.
    assert edges[35].nonzero().flatten().tolist() == [19]
    assert edges[29].eq(1).all()
    # Next to a pixel without a label is no edge; where two names meet is one, even where both are of one class.
    assert class_of_name(1) == class_of_name(41)
    assert edges[NAMES_ROW, 0] == 0
    assert edges[NAMES_ROW, 1 : len(NAMES)].eq(1).all()
    assert not edges[15, :19].any()


def test_all_labels_are_valid_for_their_tasks(tmp_path: Path) -> None:
    write_nyuv2_mat(tmp_path)
    write_nyuv2_folders(tmp_path / "folders", paper="ASTMT")
    for folder, options in ((tmp_path, {"derive": DERIVED}), (tmp_path / "folders", {})):
        for num_classes in (40, 13):
            labels = NyuV2Dataset("train", folder, num_classes=num_classes, **options)[1]["labels"]
            assert list(labels) == ALL_FOUR
            for name, label in labels.items():
                get_task(name, num_labels=num_classes).check_label(label[None], 1, 48, 64)


@pytest.mark.parametrize("paper", ENDINGS)
@pytest.mark.parametrize("split", SPLITS)
def test_folders_of_every_paper_are_read_back_in_metres_ids_and_unit_vectors(
    tmp_path: Path, split: str, paper: str
) -> None:
    known = write_nyuv2_folders(tmp_path, paper=paper)
    dataset = NyuV2Dataset(split, tmp_path)
    assert dataset.frames == FOLDER_FRAMES[split]
    for index, frame in enumerate(dataset.frames):
        sample, expected = dataset[index], known[frame]
        assert list(sample["labels"]) == list(dataset.labels) == ALL_FOUR
        assert (sample["image"].float() - expected["image"].float()).abs().max() < 8
        assert torch.equal(sample["labels"]["semseg"], expected["semseg"])
        assert torch.equal(sample["labels"]["depth"], expected["depth"])
        assert torch.equal(sample["labels"]["edges"], expected["edges"])
        normals = sample["labels"]["normals"]
        if paper == "ASTMT":
            # Away from where the blocks of JPEG have both.
            assert (normals[:, 36:].permute(1, 2, 0) @ torch.tensor(NORMAL)).min() > 0.99
            assert not normals[:, 18:30, 34:46].any()
        else:
            torch.testing.assert_close(normals, expected["normals"], rtol=0, atol=0.006)
            vectors = normals[:, NORMAL_ROW, : len(NORMALS)].T
            torch.testing.assert_close(vectors, torch.tensor(list(NORMALS.values())), rtol=0, atol=0.006)
            assert not vectors[-1].any()
            assert vectors[:-1].norm(dim=1).sub(1).abs().max() < 1e-6


def test_black_and_grey_of_pictured_normals_have_no_label(tmp_path: Path) -> None:
    write_nyuv2_folders(tmp_path, paper="InvPT")
    codes = np.full((48, 64, 3), (128, 128, 255), np.uint8)
    codes[0], codes[1], codes[2] = 0, 127, (127, 128, 128)
    file_of(tmp_path, "InvPT", "0003", "normals").write_bytes(png(codes))
    normals = NyuV2Dataset("train", tmp_path)[0]["labels"]["normals"]
    assert not normals[:, :3].any()
    assert normals[2, 3:].min() > 0.99


def test_labels_whose_folder_is_not_there_are_left_out(tmp_path: Path) -> None:
    write_nyuv2_folders(tmp_path)
    shutil.rmtree(tmp_path / "normals")
    shutil.rmtree(tmp_path / "edge")
    dataset = NyuV2Dataset("train", tmp_path)
    assert list(dataset.labels) == list(dataset[0]["labels"]) == ["semseg", "depth"]


def test_options_of_the_authors_file_are_refused_for_folders(tmp_path: Path) -> None:
    write_nyuv2_folders(tmp_path)
    for options in ({"derive": ["normals"]}, {"raw_depth": True}):
        with pytest.raises(ValueError, match="derive and raw_depth are for nyu_depth_v2_labeled.mat, which is not in"):
            NyuV2Dataset("train", tmp_path, **options)
    with pytest.raises(ValueError, match=r"num_classes is 41; NYU Depth V2 has sets of \[13, 40\] classes"):
        NyuV2Dataset("train", tmp_path, num_classes=41)


@pytest.mark.parametrize(
    ("paper", "kind", "content", "rule"),
    [
        ("MTI-Net", "images", png(np.zeros((48, 64), np.uint8)), "must be an 8-bit RGB image"),
        ("MTI-Net", "images", None, "cannot be read"),
        ("MTI-Net", "segmentation", png(np.full((48, 64), 41, np.uint8)), "holds class id 41; ids are 0 to 40"),
        ("MTI-Net", "segmentation", png(np.zeros((48, 64), np.uint16)), "must be an 8-bit grey PNG of class ids"),
        ("MTI-Net", "segmentation", lambda stored: stored[:-40], "the picture is damaged"),
        ("MTI-Net", "depth", lambda stored: stored[:-40], "is no whole .npy file of numbers"),
        ("MTI-Net", "depth", b"no array", "is no whole .npy file of numbers"),
        ("MTI-Net", "depth", npy(np.full((48, 64), -1.0)), "must be depth in metres, floating point"),
        ("MTI-Net", "depth", npy(np.full((48, 64), np.nan)), "must be depth in metres"),
        ("MTI-Net", "depth", npy(np.full((48, 64), 2500, np.uint16)), "must be depth in metres, floating point"),
        ("MTI-Net", "depth", None, "cannot be read"),
        ("MTI-Net", "normals", npy(np.zeros((3, 48, 64), np.float32)), r"shape \(3, 48, 64\); it must be .*\(H,W,3\)"),
        ("MTI-Net", "normals", npy(np.full((48, 64, 3), 128.0)), r"length 221.70; it must hold unit vectors"),
        ("MTI-Net", "normals", npy(np.full((48, 64, 3), np.nan)), "length inf; it must hold unit vectors"),
        ("MTI-Net", "edge", npy(np.full((48, 64), 255.0)), r"must be edges \(H,W\) in \[0,1\]"),
        ("InvPT", "normals", png(np.full((48, 64, 3), 255, np.uint8)), "length 1.73; it must hold unit vectors"),
        ("InvPT", "edge", png(np.zeros((48, 64, 3), np.uint8)), "must be an 8-bit grey PNG of edges"),
        ("ASTMT", "segmentation", lambda stored: stored[:-40], "is no whole MATLAB file"),
        ("ASTMT", "segmentation", b"no MATLAB file", "is no whole MATLAB file"),
        ("ASTMT", "depth", None, "cannot be read"),
    ],
    ids=range(20),
)
def test_a_wrong_file_is_named_with_the_rule(
    tmp_path: Path, paper: str, kind: str, content: bytes | Callable | None, rule: str
) -> None:
    write_nyuv2_folders(tmp_path, paper=paper)
    path = file_of(tmp_path, paper, "0007", kind)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    dataset = NyuV2Dataset("train", tmp_path)
    assert list(dataset[0]["labels"]) == ALL_FOUR
    with pytest.raises(BadSampleError, match=rf"{kind}/{path.name}'\W.*({rule})"):
        dataset[1]


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ({"groundTruth": np.ones((48, 64))}, r"has the variables \['groundTruth'\]; it must have 'segmentation'"),
        ({"segmentation": np.full((48, 64), 0.5)}, r"it must be \(H,W\) whole numbers"),
        ({"segmentation": np.full((48, 64), 41.0)}, "holds class id 41; ids are 0 to 40"),
    ],
)
def test_a_matlab_file_with_other_content_is_named_with_the_rule(tmp_path: Path, content: dict, rule: str) -> None:
    write_nyuv2_folders(tmp_path, paper="ASTMT")
    scipy.io.savemat(file_of(tmp_path, "ASTMT", "0003", "segmentation"), content)
    with pytest.raises(BadSampleError, match=rf"segmentation/0003.mat'\W.*({rule})"):
        NyuV2Dataset("train", tmp_path)[0]


def test_a_label_of_another_size_than_the_image_is_refused(tmp_path: Path) -> None:
    write_nyuv2_folders(tmp_path)
    file_of(tmp_path, "MTI-Net", "0003", "depth").write_bytes(npy(np.ones((48, 63))))
    with pytest.raises(BadSampleError, match=r"0003: the label 'depth' is 48 x 63 .* image is 48 x 64"):
        NyuV2Dataset("train", tmp_path)[0]


def test_a_variable_of_the_authors_file_that_is_missing_damaged_or_of_another_type_is_named(tmp_path: Path) -> None:
    write_nyuv2_mat(tmp_path)
    path = tmp_path / "nyu_depth_v2_labeled.mat"
    with h5py.File(path, "a") as file:
        del file["labels"], file["depths"]
        file["labels"] = np.zeros((5, 64, 48), np.uint8)
        file["rawDepths"][1, 0, 0] = -1
    dataset = NyuV2Dataset("train", tmp_path)
    with pytest.raises(BadSampleError, match=r"labeled.mat', labels\[1\]: is uint8 .* it must be uint16 with 2 axes"):
        dataset.read(0, ["semseg"])
    with pytest.raises(BadSampleError, match=r"labeled.mat', depths\[1\]: cannot be read"):
        dataset.read(0, ["depth"])
    with pytest.raises(BadSampleError, match=r"labeled.mat', frame 0002: must be depth in metres"):
        NyuV2Dataset("train", tmp_path, raw_depth=True).read(0, ["depth"])
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(BadSampleError, match=r"labeled.mat', images\[1\]: cannot be read"):
        NyuV2Dataset("train", tmp_path)[0]


def test_a_code_that_is_no_name_and_a_frame_that_the_file_lacks_are_refused(tmp_path: Path) -> None:
    write_nyuv2_mat(tmp_path)
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "a") as file:
        file["labels"][1, 5, 5] = 895
    with pytest.raises(BadSampleError, match=r"labeled.mat', frame 0002: holds class id 895; ids are 0 to 894"):
        NyuV2Dataset("train", tmp_path)[0]
    scipy.io.savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([[6]], np.uint16)})
    with pytest.raises(BadSampleError, match=r"labeled.mat', images\[5\]: cannot be read"):
        NyuV2Dataset("train", tmp_path)[0]


def test_wrong_splits_and_mappings_are_refused(tmp_path: Path) -> None:
    write_nyuv2_mat(tmp_path)
    scipy.io.savemat(tmp_path / "classMapping40.mat", {"mapClass": np.ones((1, 893), np.uint8)})
    with pytest.raises(ValueError, match="classMapping40.mat maps 893 names; NYU Depth V2 has 894"):
        NyuV2Dataset("train", tmp_path)
    for wrong in (0, 41):
        scipy.io.savemat(tmp_path / "classMapping40.mat", {"mapClass": np.full((1, 894), wrong, np.uint8)})
        with pytest.raises(ValueError, match="classMapping40.mat': mapClass must hold whole numbers from 1 to 40"):
            NyuV2Dataset("train", tmp_path)
    write_nyuv2_mat(tmp_path)
    scipy.io.savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([[1450]], np.uint16)})
    with pytest.raises(ValueError, match="splits.mat': trainNdxs must hold whole numbers from 1 to 1449"):
        NyuV2Dataset("train", tmp_path)
    (tmp_path / "splits.mat").unlink()
    with pytest.raises(ValueError, match="splits.mat': cannot be read"):
        NyuV2Dataset("train", tmp_path)


def test_a_folder_that_is_empty_or_a_step_too_high_is_refused_with_the_layout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no frame of the split 'train'.*nyu_depth_v2_labeled.mat.*gt_sets"):
        NyuV2Dataset("train", tmp_path)
    write_nyuv2_folders(tmp_path / "inner")
    with pytest.raises(ValueError, match="holds no frame"):
        NyuV2Dataset("validation", tmp_path)
    with pytest.raises(ValueError, match="there is no folder .*nowhere"):
        NyuV2Dataset("train", tmp_path / "nowhere", derive=DERIVED)
    with pytest.raises(ValueError, match="needs data_dir"):
        NyuV2Dataset("train", None)


def test_worker_processes_and_copies_open_the_file_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nyuv2_mat(tmp_path)
    dataset = NyuV2Dataset("train", tmp_path, derive=DERIVED)
    assert dataset._mat._opened is None
    here = dataset[0]["labels"]
    opened = dataset._mat._opened[1]
    dataset.read(1, ["depth"])
    assert dataset._mat._opened[1] is opened
    with monkeypatch.context() as patch:
        patch.setattr("mt_adapters.data.arrays.os.getpid", lambda: 0)
        dataset.read(1, ["depth"])
    assert dataset._mat._opened[0] == 0
    assert dataset._mat._opened[1] is not opened
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy._mat._opened is None
    loader = DataLoader(dataset, batch_size=None, num_workers=2)
    for labels in (copy[0]["labels"], next(iter(loader))["labels"]):
        assert labels.keys() == here.keys()
        for name, label in labels.items():
            torch.testing.assert_close(label, here[name], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("module", "name"), [("h5py", "nyu_depth_v2_labeled.mat"), ("scipy.io", "classMapping40.mat")]
)
def test_a_missing_dependency_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    write_nyuv2_mat(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{name}' needs {module[:5]}.*: pip install \"mt-adapters\[datasets\]\""):
        NyuV2Dataset("train", tmp_path)
