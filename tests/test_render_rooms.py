"""examples/render_rooms.py: labels and frames by their definitions, the program without Mitsuba, and a real render."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import render_rooms
from mt_adapters.data import RoomsDataset
from rooms_renderer import check, frames, labels, scene
from rooms_renderer.cameras import Camera, look
from rooms_renderer.classes import CLASSES
from rooms_renderer.denoise import denoise
from rooms_renderer.layout import Placement, Room

# Labels and frames.


def wall_view(size: int = 8, distance: float = 2.0, pitch: float = 0.3) -> tuple[scene.View, Camera]:
    """A camera that looks down at a wall z = 0 from `distance` metres; every pixel hits the wall."""
    camera = look(np.array([0, 1.5, distance]), np.array([0, 1.5 - pitch * distance, 0]), fov_degrees=60)
    rays = camera.rays(size)
    positions = camera.position + rays * (-distance / rays[..., 2:])
    # The normal points away from the camera, as on the back of a thin surface.
    normals = np.broadcast_to([0.0, 0.0, -1.0], positions.shape)
    light = np.full(positions.shape, 0.5)
    return scene.View(light, light, normals, positions, positions, normals, np.zeros((size, size), dtype=int)), camera


def test_depth_is_along_the_axis_and_not_along_the_ray() -> None:
    view, camera = wall_view()
    depth = labels.planar_depth(view.positions, view.ids >= 0, camera)
    for row in range(8):
        for column in range(8):
            away = view.positions[row, column] - camera.position
            assert depth[row, column] == pytest.approx(np.dot(away, -camera.axes[2]))
            assert depth[row, column] < np.linalg.norm(away)


def test_normals_face_the_camera_in_its_frame() -> None:
    view, camera = wall_view()
    normals = labels.camera_normals(view.normals, view.positions, view.ids >= 0, camera)
    # The camera looks down by atan(0.3), so the wall's normal leans down in its frame.
    lean = np.arctan(0.3)
    np.testing.assert_allclose(normals, np.broadcast_to([0, -np.sin(lean), np.cos(lean)], normals.shape), atol=1e-9)
    depth = labels.planar_depth(view.positions, view.ids >= 0, camera)
    np.testing.assert_allclose(labels.normals_from_depth(depth, camera), normals[1:-1, 1:-1], atol=1e-6)


def test_pixels_that_hit_nothing_have_no_label() -> None:
    view, camera = wall_view()
    hit = np.zeros((8, 8), dtype=bool)
    assert not labels.planar_depth(view.positions, hit, camera).any()
    assert not labels.camera_normals(view.normals, view.positions, hit, camera).any()


@pytest.mark.parametrize(
    ("id_step", "depth_step", "bend_degrees", "is_edge"),
    [(1, 0, 0, True), (0, 0.05, 0, False), (0, 0.07, 0, True), (0, 0, 40, False), (0, 0, 50, True), (0, 0, 0, False)],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_an_edge_is_a_border_a_step_or_a_crease(
    id_step: int, depth_step: float, bend_degrees: float, is_edge: bool, axis: int
) -> None:
    after = np.indices((6, 6))[axis] >= 3
    angle = np.radians(bend_degrees)
    normals = np.where(after[..., None], [np.sin(angle), 0, np.cos(angle)], [0.0, 0.0, 1.0])
    found = labels.edges(after * id_step, np.where(after, 2 * (1 + depth_step), 2.0), normals)
    expected = (np.indices((6, 6))[axis] == 3) & is_edge
    assert np.array_equal(found, expected)


def test_a_frame_is_stored_as_the_rooms_set_stores_it(tmp_path: Path) -> None:
    view, camera = wall_view()
    class_of_id = np.array([CLASSES.index("wall")])
    row = render_rooms.make_frame(view, camera, class_of_id, exposure=0.0)
    row.update(room="r000_0001", room_type="Office", fov_degrees=60.0)
    for split in ("train", "validation"):
        frames.write_frames(tmp_path / f"{split}.parquet", [row], notes={})
    stored = {name: Image.open(io.BytesIO(row[name]["bytes"])) for name in frames.PICTURES}
    assert {name: (picture.format, picture.mode) for name, picture in stored.items()} == {
        "image": ("JPEG", "RGB"),
        "depth": ("PNG", "I;16"),
        "normals": ("PNG", "RGB"),
        "semseg": ("PNG", "L"),
        "edges": ("PNG", "1"),
    }
    depth = labels.planar_depth(view.positions, view.ids >= 0, camera)
    np.testing.assert_array_equal(np.array(stored["depth"]), np.round(depth * 1000))
    frame = RoomsDataset("validation", tmp_path)[0]
    assert (frame["labels"]["semseg"] == CLASSES.index("wall")).all()
    np.testing.assert_allclose(frame["labels"]["depth"].numpy(), depth, atol=6e-4)
    lean = np.arctan(0.3)
    np.testing.assert_allclose(
        frame["labels"]["normals"][:, 4, 4].numpy(), [0, -np.sin(lean), np.cos(lean)], atol=0.01
    )
    assert frame["image"].float().mean().item() == pytest.approx(139, abs=2)


def test_exposure_is_automatic_and_stops_are_added() -> None:
    radiance = np.random.default_rng(0).uniform(0, 1, size=(16, 16, 3))
    assert frames.expose(radiance * 50).mean() == pytest.approx(frames.expose(radiance).mean(), abs=0.5)
    assert frames.expose(radiance, stops=-1).mean() < frames.expose(radiance).mean() - 20


def test_denoising_smooths_within_a_surface_and_keeps_borders() -> None:
    rng = np.random.default_rng(0)
    right = np.indices((32, 32))[1] >= 16
    clean = np.where(right, 0.2, 0.8)[..., None] * np.ones(3)
    noisy = clean * rng.gamma(4, 1 / 4, size=(32, 32, 1))
    normals = np.where(right[..., None], [1.0, 0, 0], [0, 0, 1.0])
    positions = np.dstack([np.indices((32, 32))[1] / 100, np.indices((32, 32))[0] / 100, np.zeros((32, 32))])
    light = denoise(noisy, np.ones_like(clean), normals, positions, np.ones((32, 32)))
    assert np.abs(light - clean).mean() < 0.35 * np.abs(noisy - clean).mean()
    # A blur over the border would mix the two sides to about a half.
    assert light[:, 15].mean() > 0.6
    assert light[:, 16].mean() < 0.35


# The program.


def fake_room(number: int, settings: render_rooms.Settings, output: Path, num_threads: int | None = None) -> Path:
    """Stands in for `render_room`: the frame's size tells the room."""
    view, camera = wall_view(size=16 + number)
    row = render_rooms.make_frame(view, camera, np.array([1]), exposure=0.0)
    row.update(room=f"r{number}", room_type="Office", fov_degrees=60.0)
    path = render_rooms.room_file(output, number)
    frames.write_frames(path, [row], notes={"furniture": ["Boxes#1"]})
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, furniture_library: Path) -> Callable[..., None]:
    """Runs the program with the furniture of these tests and without Mitsuba."""
    monkeypatch.setattr(render_rooms.scene, "import_mitsuba", lambda *_: None)
    monkeypatch.setattr(render_rooms, "render_room", fake_room)

    def run(output: Path, *options: object) -> None:
        render_rooms.main([str(output), "--furniture", str(furniture_library), *map(str, options)])

    return run


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_splits_share_no_room_and_keep_theirs_when_rooms_are_added(tmp_path: Path, run: Callable[..., None]) -> None:
    rooms_of = {}
    for count in (2, 12):
        run(tmp_path, "--rooms", count)
        rooms_of[count] = {
            split: set(frames.pyarrow.parquet.read_table(tmp_path / f"{split}.parquet")["room"].to_pylist())
            for split in ("train", "validation")
        }
    assert rooms_of[2] == {"train": {"r0"}, "validation": {"r1"}}
    assert rooms_of[12]["validation"] == {"r1", "r10"}
    assert len(rooms_of[12]["train"]) == 10
    assert "Creators: Ada" in (tmp_path / "CREDITS.txt").read_text()


def test_the_check_measures_what_was_rendered(tmp_path: Path, run: Callable[..., None]) -> None:
    run(tmp_path, "--rooms", 3)
    measured = check.measure(tmp_path)
    assert measured["frames"] == "3"
    assert float(measured["normals against depth, median degrees"]) < 1
    assert 1.8 < float(measured["median depth, metres"]) < 2.3
    assert measured["wall, % of pixels"] == "100.0"
    assert measured["brightness, of 255"] == "139"


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", "--rooms", 4)
    rendered = []

    def killed_in_the_third(number: int, **options: object) -> Path:
        if len(rendered) == 2:
            # What a kill leaves: a file that is not complete, under its temporary name.
            render_rooms.room_file(tmp_path / "parts", number).with_suffix(".1.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        rendered.append(number)
        return fake_room(number, **options)

    monkeypatch.setattr(render_rooms, "render_room", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", "--rooms", 4)
    assert not (tmp_path / "parts/train.parquet").exists()
    monkeypatch.setattr(
        render_rooms, "render_room", lambda number, **o: rendered.append(number) or fake_room(number, **o)
    )
    run(tmp_path / "parts", "--rooms", 4)
    assert rendered == [0, 1, 2, 3]
    ended = {name: content for name, content in files_of(tmp_path / "parts").items() if not name.endswith(".tmp")}
    assert ended == files_of(tmp_path / "whole")


def test_a_folder_of_other_settings_is_refused(tmp_path: Path, run: Callable[..., None]) -> None:
    run(tmp_path, "--rooms", 2)
    with pytest.raises(SystemExit, match="seed: 0 there, 1 asked for.*Name another folder"):
        run(tmp_path, "--rooms", 2, "--seed", 1)


@pytest.mark.parametrize("option", ["--rooms=1", "--views=0", "--size=4", "--spp=0", "--jobs=0", "--seed=-1"])
def test_a_number_that_is_too_small_is_refused(
    tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        render_rooms.parse_arguments([str(tmp_path), option])
    assert "must be at least" in capsys.readouterr().err


def test_without_mitsuba_the_program_says_how_to_install_it(
    tmp_path: Path, furniture_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mitsuba", None)
    with pytest.raises(SystemExit, match=r"pip install .*mt-adapters\[render\]"):
        render_rooms.main([str(tmp_path), "--furniture", str(furniture_library)])


# Real renders.


@pytest.mark.render
def test_a_wall_is_as_far_as_it_stands_and_pieces_are_told_apart(tmp_path: Path) -> None:
    mi = scene.import_mitsuba("scalar_rgb")
    panel = Placement("panel", "lamp", None, (1.0, 0.02, 1.0), (2.0, 2.47, 1.5), 0.0, seed=1)
    rug = Placement("procedural_rug", "rug", None, (1.0, 0.012, 1.0), (2.0, 0.0, 1.0), 0.0, seed=2)
    walls = ("brick", "plain", "plain", "plain")
    room = Room("r", "Office", (4.0, 2.5, 3.0), "planks", walls, "lamps", seed=3, placements=[panel, rug])
    built = scene.build_scene(mi, room, tmp_path)
    camera = look(np.array([2.0, 1.25, 2.25]), np.array([2.0, 1.25, 0.0]), fov_degrees=80)
    view = scene.render_view(mi, built, camera, size=48, samples=2, seed=0)
    depth = labels.planar_depth(view.positions, view.ids >= 0, camera)
    back_wall = view.ids == 0
    np.testing.assert_allclose(depth[back_wall], 2.25, rtol=1e-5)
    assert back_wall[24, 24]
    # Everything that was hit lies where its id says.
    heights = view.positions[..., 1]
    np.testing.assert_allclose(heights[view.ids == scene.FLOOR], 0, atol=1e-5)
    np.testing.assert_allclose(heights[view.ids == scene.CEILING], 2.5, rtol=1e-5)
    assert (heights[view.ids == scene.FIRST_PIECE] >= 2.4699).all()
    rug_hits = view.positions[view.ids == scene.FIRST_PIECE + 1]
    assert len(rug_hits) > 10
    assert (np.abs(rug_hits[:, [0, 2]] - [2.0, 1.0]) < 0.5001).all()
    assert view.radiance[back_wall].mean() > 0.01


@pytest.mark.render
def test_rendered_rooms_are_read_by_the_dataset_and_their_labels_agree(
    tmp_path: Path, furniture_library: Path
) -> None:
    options = ["--furniture", str(furniture_library), "--rooms=2", "--views=2", "--size=24", "--spp=2", "--seed=5"]
    render_rooms.main([str(tmp_path / "once"), *options])
    render_rooms.main([str(tmp_path / "again"), *options, "--jobs=2"])
    assert files_of(tmp_path / "once") == files_of(tmp_path / "again")
    angles = []
    for split in ("train", "validation"):
        dataset = RoomsDataset(split, tmp_path / "once")
        table = frames.pyarrow.parquet.read_table(tmp_path / "once" / f"{split}.parquet")
        assert len(dataset) == 2
        for row in range(len(dataset)):
            frame = dataset[row]["labels"]
            depth, normals = frame["depth"].numpy().astype(float), frame["normals"].numpy().transpose(1, 2, 0)
            camera = Camera(np.zeros(3), np.eye(3), table["fov_degrees"][row].as_py())
            from_depth = labels.normals_from_depth(depth, camera)
            cosine = np.clip((from_depth * normals[1:-1, 1:-1]).sum(axis=-1), -1, 1)
            angles.append(np.degrees(np.arccos(cosine)).ravel())
            assert (frame["semseg"] != 255).all()
            assert depth.min() > 0.2
            assert 0 < frame["edges"].mean() < 1
    assert np.median(np.concatenate(angles)) < 1.0
