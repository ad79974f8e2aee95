import io
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from layouts.omnidata import CAMERA, FRAMES, ID_ROW, NUM_CLASSES, file_of, write_omnidata
from layouts.tilted_plane import NORMAL
from mt_adapters.data.derived import Intrinsics, points_from_depth
from mt_adapters.data.frames import SPLITS
from mt_adapters.data.nyuv2 import NYU40_CLASSES
from mt_adapters.data.omnidata import COMPONENTS, REPLICA_CLASSES, OmnidataDataset
from mt_adapters.data.pictures import BadSampleError
from mt_adapters.tasks import get_task

LABELS = ["semseg", "depth", "normals", "edges"]


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("split", SPLITS)
def test_frames_are_read_back_in_metres_ids_and_unit_vectors(tmp_path: Path, split: str, component: str) -> None:
    known = write_omnidata(tmp_path, component=component)
    dataset = OmnidataDataset(split, tmp_path, component=component)
    assert [dataset.name(index) for index in range(len(dataset))] == FRAMES[component][split]
    for index, frame in enumerate(dataset.frames):
        sample, expected = dataset[index], known[frame]
        assert list(sample["labels"]) == list(dataset.labels) == LABELS
        assert torch.equal(sample["image"], expected["image"])
        assert torch.equal(sample["labels"]["semseg"], expected["semseg"])
        # The distances of Hypersim are rounded.
        depth_error = 1 / 1024 if component == "hypersim" else 0
        torch.testing.assert_close(sample["labels"]["depth"], expected["depth"], rtol=1e-6, atol=depth_error)
        torch.testing.assert_close(sample["labels"]["normals"], expected["normals"], rtol=0, atol=0.005)
        torch.testing.assert_close(sample["labels"]["edges"], expected["edges"], rtol=1e-6, atol=0)
        for name, label in sample["labels"].items():
            num_labels = len(dataset.labels[name] or "?")
            get_task(name, num_labels=num_labels).check_label(label[None], 1, 48, 64)


@pytest.mark.parametrize("component", NUM_CLASSES)
def test_red_is_the_class_and_neither_0_nor_255_is_one(tmp_path: Path, component: str) -> None:
    write_omnidata(tmp_path, component=component)
    dataset = OmnidataDataset("train", tmp_path, component=component)
    semseg = dataset[0]["labels"]["semseg"]
    assert semseg[ID_ROW, :4].tolist() == [255, 0, 1, 2]
    assert semseg[ID_ROW + 1, :3].tolist() == [255, 255, 255]
    assert semseg[25, 10] == NUM_CLASSES[component] - 1
    assert len(dataset.labels["semseg"]) == NUM_CLASSES[component]


def test_the_classes_are_those_of_their_sources() -> None:
    assert (REPLICA_CLASSES[0], REPLICA_CLASSES[30], REPLICA_CLASSES[-1]) == ("backpack", "ceiling", "set-of-clothing")
    assert COMPONENTS["hypersim"].classes == NYU40_CLASSES


def test_depth_of_hypersim_is_that_of_the_plane_seen_by_a_tilted_camera(tmp_path: Path) -> None:
    write_omnidata(tmp_path, component="hypersim")
    dataset = OmnidataDataset("train", tmp_path, component="hypersim")
    depth = dataset[0]["labels"]["depth"].double()
    rays = dataset._rays(dataset.frames[0], 48, 64).double()
    points = rays * (-depth / rays[2])
    distances = -torch.einsum("c,chw->hw", torch.tensor(NORMAL).double(), points)
    torch.testing.assert_close(distances[1:], torch.full((47, 64), 2.0).double(), rtol=0, atol=0.002)


def test_the_rays_of_an_untilted_hypersim_camera_are_those_of_a_pinhole(tmp_path: Path) -> None:
    write_omnidata(tmp_path, component="hypersim")
    dataset = OmnidataDataset("train", tmp_path, component="hypersim")
    dataset._cameras["ai_001_001"] = [0.5, 0.0, 0.0, 0.0, 0.375, 0.0, 0.0, 0.0, -1.0]
    pinhole = points_from_depth(torch.ones(48, 64), Intrinsics(64.0, 64.0, 32.0, 24.0))
    torch.testing.assert_close(dataset._rays("ai_001_001-cam_01/point_7_view_0", 48, 64), pinhole)


def test_replica_without_planar_depth_uses_distances_and_the_field_of_view(tmp_path: Path) -> None:
    known = write_omnidata(tmp_path, component="replica")
    shutil.rmtree(tmp_path / "depth_zbuffer")
    dataset = OmnidataDataset("train", tmp_path, component="replica")
    depth = dataset[1]["labels"]["depth"]
    torch.testing.assert_close(depth[1:], known[dataset.frames[1]]["depth"][1:], rtol=0, atol=1.5 / 512)


def test_hypersim_without_depth_needs_no_cameras_and_with_it_says_where_they_are(tmp_path: Path) -> None:
    write_omnidata(tmp_path, component="hypersim")
    path = tmp_path / "metadata_camera_parameters.csv"
    path.write_text("scene_name,M_cam_from_uv_00\nai_001_001,x\n")
    with pytest.raises(ValueError, match=rf"{path.name}': needs the columns scene_name and .*M_cam_from_uv_22"):
        OmnidataDataset("train", tmp_path, component="hypersim")
    path.write_text(f"scene_name,{','.join(f'M_cam_from_uv_{r}{c}' for r in range(3) for c in range(3))}\n")
    with pytest.raises(BadSampleError, match=rf"{path.name}': has no line for the scene 'ai_001_001'"):
        OmnidataDataset("train", tmp_path, component="hypersim")[0]
    path.unlink()
    with pytest.raises(ValueError, match=rf"there is no {path.name} .*apple/ml-hypersim"):
        OmnidataDataset("train", tmp_path, component="hypersim")
    shutil.rmtree(tmp_path / "depth_euclidean")
    dataset = OmnidataDataset("train", tmp_path, component="hypersim")
    assert list(dataset[0]["labels"]) == ["semseg", "normals", "edges"]


def test_scenes_are_those_of_the_split_file(tmp_path: Path) -> None:
    write_omnidata(tmp_path, component="replica")
    (tmp_path / "train_val_test_replica.csv").write_text("id,train,val,test\noffice_0,1,0,0\nroom_0,0,1,0\n")
    assert OmnidataDataset("train", tmp_path, component="replica").frames == FRAMES["replica"]["validation"]
    write_omnidata(tmp_path, component="hypersim")
    (tmp_path / "train_val_test_hypersim.csv").unlink()
    with pytest.raises(ValueError, match=r"there is no train_val_test_hypersim.csv .*EPFL-VILAB/omnidata"):
        OmnidataDataset("train", tmp_path, component="hypersim")


def test_an_unknown_component_or_a_derived_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"unknown component 'clevr'; known are \['taskonomy', 'replica', 'hypersim'\]"
    ):
        OmnidataDataset("train", tmp_path, component="clevr")
    with pytest.raises(ValueError, match=r"cannot derive \['edges'\]"):
        OmnidataDataset("train", tmp_path, derive=["edges"], component="replica")


def test_a_set_says_of_which_component_it_is(tmp_path: Path) -> None:
    for component, licence in (
        ("taskonomy", "non-commercial"),
        ("replica", "non-commercial"),
        ("hypersim", "CC BY-SA"),
    ):
        write_omnidata(tmp_path, component=component)
        dataset = OmnidataDataset("train", tmp_path, component=component)
        assert dataset.summary.lower().startswith(component)
        assert licence in dataset.summary


@pytest.mark.parametrize(
    ("domain", "content", "rule"),
    [
        ("semantic", np.full((48, 64, 3), 102, np.uint8), "holds class id 102; ids are 0 to 101, 255"),
        ("semantic", np.ones((48, 64), np.uint8), "must be an 8-bit RGB PNG whose red is the class id"),
        ("semantic", None, "cannot be read"),
        ("depth_zbuffer", np.ones((48, 64), np.uint8), "must be a 16-bit grey PNG of depth in 1/512 m"),
        ("normal", np.full((48, 64, 3), 255, np.uint8), "0.73 off unit length"),
        ("edge_texture", None, "cannot be read"),
    ],
    ids=range(6),
)
def test_a_wrong_file_is_named_with_the_rule(
    tmp_path: Path, domain: str, content: np.ndarray | None, rule: str
) -> None:
    write_omnidata(tmp_path)
    path = file_of(tmp_path, "replica", FRAMES["replica"]["train"][0], domain)
    path.unlink()
    if content is not None:
        path.write_bytes(png(content))
    dataset = OmnidataDataset("train", tmp_path, component="replica")
    assert list(dataset[1]["labels"]) == LABELS
    with pytest.raises(BadSampleError, match=rf"replica/frl_apartment_1/{path.name}'\W.*({rule})"):
        dataset[0]


def test_a_folder_of_another_component_is_refused_with_the_layout(tmp_path: Path) -> None:
    write_omnidata(tmp_path, component="hypersim")
    with pytest.raises(ValueError, match=r"holds no frame of the split 'train'.*rgb/COMPONENT/SCENE"):
        OmnidataDataset("train", tmp_path, component="replica")


def test_a_pickled_data_set_reads_the_same(tmp_path: Path) -> None:
    write_omnidata(tmp_path, component="hypersim")
    dataset = OmnidataDataset("train", tmp_path, component="hypersim")
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy._cameras["ai_001_001"] == list(CAMERA)
    assert all(torch.equal(copy[1]["labels"][name], label) for name, label in dataset[1]["labels"].items())
