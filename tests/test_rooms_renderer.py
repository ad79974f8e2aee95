"""The parts of the rooms renderer that need no Mitsuba: catalogue, meshes, layout, cameras."""

from pathlib import Path

import numpy as np
import pytest

from furniture_library import PIECES, STRIPES
from mt_adapters.data.rooms import ROOMS_CLASSES
from rooms_renderer.cameras import box_distances, is_free, make_cameras
from rooms_renderer.classes import CLASSES, classify
from rooms_renderer.furniture import FurnitureModel, credits_text, find_libraries, read_catalogue
from rooms_renderer.layout import Room, make_room, overlap
from rooms_renderer.meshes import box_uv, load_parts, parse_mtl, parse_obj, smooth_normals, write_ply
from rooms_renderer.recipes import PLACED, PROCEDURAL, RECIPES
from rooms_renderer.surfaces import read_picture
from rooms_renderer.textures import TEXTURE_METRES, make_texture

NUM_ROOMS = 24


@pytest.fixture(scope="module")
def rooms(furniture_models: list[FurnitureModel]) -> list[Room]:
    return [make_room(0, number, furniture_models) for number in range(NUM_ROOMS)]


# Catalogue, classes, credits.


def test_the_classes_are_those_of_the_rooms_set() -> None:
    assert CLASSES == ROOMS_CLASSES


@pytest.mark.parametrize(
    ("name", "category", "height", "kind", "semantic_class"),
    [
        ("Corner sofa", "Living room", 0.8, "sofa", "sofa"),
        ("Armchair", "Living room", 0.8, "armchair", "chair"),
        ("Bedside table", "Bedroom", 0.48, "bedside", "table"),
        ("Table", "Living room", 0.74, "dining_table", "table"),
        ("Table", "Living room", 0.5, "coffee_table", "table"),
        ("Upper cabinet", "Kitchen", 0.7, "kitchen_wall_unit", "storage"),
        ("Television cabinet", "Living room", 1.6, "tv_stand", "storage"),
        ("TV", "Living room", 0.5, "television", "electronics"),
        ("Toilets unit", "Bathroom", 0.8, "toilet", "appliance"),
        ("Lamp", "Lights", 0.4, "ceiling_lamp", "lamp"),
        ("Desk lamp", "Lights", 0.4, "table_lamp", "lamp"),
        ("Double window 3 panes", "Doors and windows", 2.0, "window", "window"),
        ("Yucca", "Living room", 1.8, "plant_large", "plant"),
        ("Oriental rug", "Living room", 0.02, "rug", "rug"),
        ("Book", "Miscellaneous", 0.02, "table_object", "objects"),
    ],
)
def test_a_name_gives_the_kind_and_the_class(
    name: str, category: str, height: float, kind: str, semantic_class: str
) -> None:
    rule = classify(name, category, (0.5, height, 0.5))
    assert rule is not None
    assert (rule.kind, rule.semantic_class) == (kind, semantic_class)


@pytest.mark.parametrize(("name", "category"), [("Bicycle", "Vehicles"), ("Garage door", "Doors and windows")])
def test_what_belongs_in_no_room_is_left_out(name: str, category: str) -> None:
    assert classify(name, category, (0.5, 0.5, 0.5)) is None


def test_every_kind_has_a_place_and_a_class(furniture_models: list[FurnitureModel]) -> None:
    kinds = {kind for recipe in RECIPES.values() for item in recipe.items for kind in item.kinds}
    assert kinds <= set(PLACED)
    assert {model.semantic_class for model in furniture_models} | set(PROCEDURAL.values()) <= set(CLASSES)


def test_a_library_is_read_in_metres_with_its_licence(furniture_models: list[FurnitureModel]) -> None:
    assert len(furniture_models) == len(PIECES) - 1
    sofa = next(model for model in furniture_models if model.name == "Sofa")
    assert (sofa.width, sofa.depth, sofa.height) == (2.0, 0.9, 0.85)
    assert (sofa.creator, sofa.licence) == ("Ada", "CC-BY 3.0")


def test_credits_name_the_creators_of_the_given_models_only(furniture_models: list[FurnitureModel]) -> None:
    text = credits_text(model for model in furniture_models if model.name in ("Sofa", "Bed"))
    assert "Boxes (CC-BY 3.0), 2 models used. Creators: Ada, Ben\n" in text
    assert text.endswith("total 2\n")
    assert "Eve" not in text


def test_seen_and_unseen_furniture_share_nothing(
    furniture_library: Path, furniture_models: list[FurnitureModel]
) -> None:
    seen, unseen = (read_catalogue([furniture_library], split) for split in ("seen", "unseen"))
    keys = [{model.key for model in part} for part in (seen, unseen)]
    assert keys[0] | keys[1] == {model.key for model in furniture_models}
    assert not keys[0] & keys[1]
    # Chairs are the only kind with enough models to be split: a fifth of six, rounded.
    assert [model.name for model in unseen] == ["Chair"]


def test_missing_furniture_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="apt-get install .* sweethome3d-furniture"):
        find_libraries([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match="--furniture"):
        find_libraries([tmp_path])


def test_a_file_that_is_no_library_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.sh3f").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"broken\.sh3f"):
        read_catalogue([tmp_path / "broken.sh3f"])


# Meshes and textures.


def test_a_model_fills_its_size_and_stands_on_its_base(furniture_models: list[FurnitureModel]) -> None:
    (part,) = load_parts(furniture_models[0], 2.0, 0.85, 0.9)
    assert part.material.colour == (0.8, 0.1, 0.1)
    assert part.corners_F33.shape == (12, 3, 3)
    np.testing.assert_allclose(part.corners_F33.min(axis=(0, 1)), [-1, 0, -0.45], atol=1e-9)
    np.testing.assert_allclose(part.corners_F33.max(axis=(0, 1)), [1, 0.85, 0.45], atol=1e-9)


def test_a_model_brings_its_picture(furniture_models: list[FurnitureModel]) -> None:
    bed = next(model for model in furniture_models if model.name == "Bed")
    (part,) = load_parts(bed, 1.6, 0.6, 2.0)
    assert part.uv_from_file
    np.testing.assert_array_equal(part.uv_F32[0], [(0, 0), (1, 0), (1, 1)])
    np.testing.assert_array_equal(read_picture(bed.library, part.material.texture), STRIPES)
    assert read_picture(bed.library, "pictures/missing.png") is None


def test_a_ply_file_holds_each_corner_with_v_from_the_top(tmp_path: Path) -> None:
    corners = np.arange(18, dtype=float).reshape(2, 3, 3)
    normals = np.broadcast_to([0.0, 0, 1], corners.shape)
    uv = np.broadcast_to([0.25, 0.1], (2, 3, 2))
    write_ply(tmp_path / "two.ply", corners, normals, uv)
    header, _, body = (tmp_path / "two.ply").read_bytes().partition(b"end_header\n")
    assert b"element vertex 6\n" in header
    assert b"element face 2\n" in header
    vertices = np.frombuffer(body, dtype="<f4", count=6 * 8).reshape(6, 8)
    np.testing.assert_allclose(vertices[4], [*corners[1, 1], 0, 0, 1, 0.25, 0.9], rtol=1e-6)
    assert len(body) == 6 * 8 * 4 + 2 * 13


def test_negative_indices_and_polygons_are_read() -> None:
    positions, uvs, faces, files = parse_obj("v 0 0 0\nv 1 0 0\nv 1 1 0\nvt 0 0\nv 0 1 0\nf -4/1 -3/1 -2/-1 4/1\n")
    assert positions.shape == (4, 3)
    assert uvs.shape == (1, 2)
    assert faces["default"].positions == [(0, 1, 2), (0, 2, 3)]
    assert faces["default"].uvs == [(0, 0, 0), (0, 0, 0)]
    assert files == []


def test_a_material_knows_its_picture_and_how_clear_it_is() -> None:
    material = parse_mtl("newmtl glass\nKd 1 0.5 0\nd 0.3\nmap_Kd ../pictures/a.png\n", "library/model")["glass"]
    assert material.colour == (1, 0.5, 0)
    assert material.opacity == 0.3
    assert material.texture == "library/pictures/a.png"


@pytest.mark.parametrize(("bend_degrees", "smooth"), [(20, True), (60, False)])
def test_normals_are_smooth_over_gentle_bends_only(bend_degrees: float, smooth: bool) -> None:
    angle = np.radians(bend_degrees)
    flat = np.array([[(0, 0, 0), (1, 0, 0), (0, 0, -1)]], dtype=float)
    bent = np.array([[(0, 0, 0), (0, 0, -1), (-np.cos(angle), -np.sin(angle), 0)]])
    normals = smooth_normals(np.concatenate([flat, bent]))
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1)
    # The first corner is shared by both faces, the second belongs to the flat one alone.
    half_way = [np.sin(-angle / 2), np.cos(angle / 2), 0]
    np.testing.assert_allclose(normals[0, 0], half_way if smooth else [0, 1, 0], atol=1e-9)
    np.testing.assert_allclose(normals[0, 1], [0, 1, 0], atol=1e-9)


def test_box_coordinates_are_metres_along_the_face() -> None:
    wall = np.array([[(5, 0, 0), (5, 0, 2), (5, 3, 0)]], dtype=float)
    np.testing.assert_allclose(box_uv(wall), [[(0, 0), (2, 0), (0, 3)]])


@pytest.mark.parametrize("name", TEXTURE_METRES)
def test_a_texture_is_a_picture_that_depends_on_its_seed_only(name: str) -> None:
    first, again, other = (make_texture(name, np.random.default_rng(seed), (0.6, 0.4, 0.2)) for seed in (1, 1, 2))
    assert first.dtype == np.uint8
    assert first.shape[2] == 3
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


# Layout and cameras.


def test_a_room_depends_on_seed_and_number_only(furniture_models: list[FurnitureModel], rooms: list[Room]) -> None:
    assert make_room(0, 3, furniture_models) == rooms[3]
    assert make_room(1, 3, furniture_models) != rooms[3]
    assert len({room.name for room in rooms}) == NUM_ROOMS


def test_rooms_are_furnished_with_the_right_things(rooms: list[Room]) -> None:
    assert {room.room_type for room in rooms} >= {"Living room", "Bedroom", "Kitchen"}
    bedrooms = [room for room in rooms if room.room_type == "Bedroom"]
    assert all(any(piece.kind == "bed" for piece in room.placements) for room in bedrooms)
    assert np.mean([len(room.placements) for room in rooms]) > 6


def test_furniture_neither_overlaps_nor_leaves_the_room(rooms: list[Room]) -> None:
    for room in rooms:
        boxes = np.stack([piece.box for piece in room.placements if piece.semantic_class != "rug"])
        assert (boxes[:, 0] >= -1e-5).all()
        assert (boxes[:, 1] <= np.array(room.size) + 1e-5).all()
        for index, box in enumerate(boxes):
            assert not overlap(box, np.delete(boxes, index, axis=0))


def test_a_turned_box_holds_its_corners(rooms: list[Room]) -> None:
    piece = max((p for room in rooms for p in room.placements), key=lambda p: abs(np.sin(2 * p.yaw)))
    cosine, sine = np.cos(piece.yaw), np.sin(piece.yaw)
    for x in (-0.5, 0.5):
        for z in (-0.5, 0.5):
            x_metres, z_metres = x * piece.size[0], z * piece.size[2]
            corner = np.array(piece.position) + [
                x_metres * cosine + z_metres * sine,
                0,
                z_metres * cosine - x_metres * sine,
            ]
            assert (corner >= piece.box[0] - 1e-9).all()
            assert (corner <= piece.box[1] + 1e-9).all()


def test_cameras_stand_in_the_room_and_in_no_furniture(rooms: list[Room]) -> None:
    for number, room in enumerate(rooms):
        cameras = make_cameras(room, 5, np.random.default_rng(number))
        assert len(cameras) <= 5
        for camera in cameras:
            assert (camera.position > 0).all()
            assert (camera.position < np.array(room.size)).all()
            for piece in room.placements:
                assert not ((camera.position > piece.box[0]) & (camera.position < piece.box[1])).all()
            assert 50 <= camera.fov_degrees <= 80
            np.testing.assert_allclose(camera.axes @ camera.axes.T, np.eye(3), atol=1e-9)
            assert camera.axes[0, 1] == pytest.approx(0)
    assert not is_free(rooms[0], rooms[0].placements[-1].box.mean(axis=0))


def test_rays_meet_a_box_at_the_right_distance() -> None:
    box = np.array([[[-1, -1, 3], [1, 1, 4]]], dtype=float)
    directions = np.array([[0, 0, 1], [0, 0, -1], [1, 0, 0]], dtype=float)
    assert box_distances(np.zeros(3), directions, box).ravel().tolist() == [3, np.inf, np.inf]


def test_unknown_light_is_refused(furniture_models: list[FurnitureModel]) -> None:
    with pytest.raises(ValueError, match="there is: random, daylight, lamps"):
        make_room(0, 0, furniture_models, light="candles")
