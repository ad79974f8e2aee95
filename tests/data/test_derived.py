"""Normals and edges that are worked out: planes seen by a known camera, steps in depth, borders of classes."""

import math

import numpy as np
import pyarrow.parquet
import pytest
import torch
from torch import Tensor

from mt_adapters.data import RoomsDataset
from mt_adapters.data.derived import Intrinsics, edges_from_labels, normals_from_depth, points_from_depth
from mt_adapters.tasks import get_task

HEIGHT, WIDTH = 24, 32
CAMERA = Intrinsics(focal_x=30.0, focal_y=28.0, center_x=15.5, center_y=12.5)


def plane_depth(normal: tuple[float, float, float], distance: float) -> Tensor:
    """(H,W) planar depth of the plane n . X = -distance, seen pixel by pixel: X = z * (ray, -1)."""
    depth = torch.zeros(HEIGHT, WIDTH)
    for row in range(HEIGHT):
        for column in range(WIDTH):
            x = (column + 0.5 - CAMERA.center_x) / CAMERA.focal_x
            y = -(row + 0.5 - CAMERA.center_y) / CAMERA.focal_y
            facing = normal[0] * x + normal[1] * y - normal[2]
            depth[row, column] = -distance / facing if facing < 0 else 0.0
    return depth


@pytest.mark.parametrize(
    "normal",
    [(0.0, 0.0, 1.0), (0.6, 0.0, 0.8), (-0.6, 0.0, 0.8), (0.0, 0.6, 0.8), (0.0, -0.6, 0.8), (0.3, 0.5, 0.81)],
    ids=["facing", "right", "left", "floor", "ceiling", "slanted"],
)
def test_the_normal_of_a_plane_is_found_with_its_signs(normal: tuple[float, float, float]) -> None:
    unit = torch.tensor(normal) / torch.tensor(normal).norm()
    depth = plane_depth(tuple(unit.tolist()), distance=2.0)
    normals = normals_from_depth(depth, CAMERA)
    inner = normals[:, 1:-1, 1:-1]
    labelled = inner.norm(dim=0) > 0
    assert labelled.float().mean() > 0.5
    torch.testing.assert_close(inner[:, labelled], unit[:, None].expand(3, int(labelled.sum())), atol=1e-5, rtol=0)


def test_normals_of_a_large_picture_are_worked_out_in_double_precision() -> None:
    # Neighbours differ in the fourth digit.
    columns, rows = torch.arange(64, dtype=torch.float64), torch.arange(48, dtype=torch.float64)
    camera, unit = Intrinsics(4000.0, 4000.0, 1024.0, 512.0), torch.tensor([0.48, 0.6, 0.64], dtype=torch.float64)
    x, y = (columns + 0.5 - 1024) / 4000, -(rows + 0.5 - 512) / 4000
    depth = -50 / (unit[0] * x[None, :] + unit[1] * y[:, None] - unit[2])
    expected = unit.float()[:, None, None].expand(3, 46, 62)
    torch.testing.assert_close(normals_from_depth(depth, camera)[:, 1:-1, 1:-1], expected, atol=1e-5, rtol=0)
    stored = depth.float()
    assert torch.equal(normals_from_depth(stored, camera), normals_from_depth(stored.double(), camera))


def test_points_stand_where_the_camera_sees_them() -> None:
    points = points_from_depth(torch.full((HEIGHT, WIDTH), 3.0), CAMERA)
    # Column 15 and row 12 hold the principal point; 30 and 28 pixels from it the ray has a slope of one.
    torch.testing.assert_close(points[:, 12, 15], torch.tensor([0.0, 0.0, -3.0]))
    torch.testing.assert_close(points[0, 12, 30], torch.tensor(1.5))
    assert points[1, 0, 15] > 0 > points[1, 23, 15]


def test_borders_steps_and_unknown_depth_have_no_normal() -> None:
    depth = torch.full((HEIGHT, WIDTH), 2.0)
    depth[:, 20:] = 2.2  # More than 6 % farther.
    depth[5, 5] = 0.0
    depth[15, 7] = torch.nan
    labelled = normals_from_depth(depth, CAMERA).norm(dim=0) > 0.99
    expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    expected[1:-1, 1:-1] = True
    expected[:, 19:21] = False
    for row, column in ((5, 5), (15, 7)):
        expected[row, column - 1 : column + 2] = False
        expected[row - 1 : row + 2, column] = False
    assert torch.equal(labelled, expected)
    get_task("normals").check_label(normals_from_depth(depth, CAMERA)[None], 1, HEIGHT, WIDTH)


@pytest.mark.parametrize("size", [(1, 5), (5, 1), (2, 2)])
def test_a_map_without_an_inside_has_no_normals(size: tuple[int, int]) -> None:
    assert not normals_from_depth(torch.ones(size), CAMERA).any()


def test_edges_are_borders_of_classes_and_steps_in_depth() -> None:
    ids = torch.zeros(6, 8, dtype=torch.int64)
    ids[:, 4:] = 1
    depth = torch.ones(6, 8)
    depth[3:] = 1.0601
    both, of_ids, of_depth = (
        edges_from_labels(ids, depth),
        edges_from_labels(ids, None),
        edges_from_labels(None, depth),
    )
    assert of_ids.nonzero().tolist() == [[row, 3] for row in range(6)]
    assert of_depth.nonzero().tolist() == [[2, column] for column in range(8)]
    assert torch.equal(both, torch.maximum(of_ids, of_depth))
    # A step is more than 6 % of the nearer depth.
    assert not edges_from_labels(None, torch.where(depth > 1, 1.0599, 1.0)).any()


def test_depth_that_is_not_known_makes_no_edge() -> None:
    depth = torch.ones(5, 6)
    depth[2, 3], depth[0, 0], depth[4, 1] = 0.0, 0.0, torch.nan
    assert not edges_from_labels(torch.zeros(5, 6, dtype=torch.int64), depth).any()
    edges = edges_from_labels(None, depth)
    assert torch.equal(edges.isnan(), ~(depth > 0))
    assert not edges.nan_to_num(0.0).any()


def test_what_neither_labels_nor_depth_know_has_no_edge_label() -> None:
    ids = torch.zeros(4, 4, dtype=torch.int64)
    ids[0], ids[1, 1] = 255, 255
    depth = torch.ones(4, 4)
    depth[0, :2] = 0.0
    depth[0, 2] = torch.nan
    edges = edges_from_labels(ids, depth)
    assert edges.isnan().nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]
    assert edges.nan_to_num(0.0).sum() == 0, "a border with no label is no border"
    with pytest.raises(ValueError, match="both are None"):
        edges_from_labels(None, None)


def test_on_rendered_rooms_derived_normals_and_edges_are_near_the_labelled_ones() -> None:
    dataset = RoomsDataset("validation")
    fields_of_view = pyarrow.parquet.read_table(dataset.path)["fov_degrees"].to_pylist()
    angles, found, true, hits = [], 0, 0, 0
    for index in range(0, len(dataset), 8):
        labels = dataset[index]["labels"]
        focal = 64 / math.tan(math.radians(fields_of_view[index]) / 2)
        normals = normals_from_depth(labels["depth"], Intrinsics(focal, focal, 64.0, 64.0))
        known = normals.norm(dim=0) > 0
        cosine = (normals * labels["normals"]).sum(dim=0)[known]
        angles.append(np.median(torch.rad2deg(cosine.clamp(-1, 1).acos()).numpy()))
        edges = edges_from_labels(labels["semseg"], labels["depth"]) == 1
        near = torch.nn.functional.max_pool2d(labels["edges"][None], 3, 1, 1)[0] > 0
        found, hits, true = found + edges.sum(), hits + (edges & near).sum(), true + labels["edges"].sum()
    # Millimetres and nearest pixels at 128 x 128 leave a few degrees.
    assert np.mean(angles) < 8
    assert hits / found > 0.97, "edges where the renderer has none"
    assert found / true > 0.4, "creases and instances of one class are not found from these labels"
