"""Renders furnished rooms with every label, as the rooms set has them: more data, other rooms, furniture or light.

    pip install -e ".[render,train]"
    apt-get install -y --no-install-recommends sweethome3d-furniture
    python examples/render_rooms.py outputs/rooms --rooms 10 --views 5 --seed 0 --size 224 --spp 16
    python examples/train_multitask.py --data_dir outputs/rooms

Other rooms, by the number of the seed; furniture that training has not seen; other light; in two processes:

    python examples/render_rooms.py outputs/rooms_unseen --rooms 30 --seed 1 --furniture_split unseen --jobs 2
    python examples/render_rooms.py outputs/rooms_seen --rooms 270 --seed 2 --furniture_split seen --light daylight
    python examples/render_rooms.py outputs/rooms_dark --rooms 30 --seed 3 --light lamps --exposure -1.5

Mitsuba's compiled variant takes a fifth of the time, but needs a recent LLVM library (14 and 15 abort, 19 works):

    apt-get install -y --no-install-recommends libllvm19
    export DRJIT_LIBLLVM_PATH=libLLVM.so.19.1
    python examples/render_rooms.py outputs/rooms --variant llvm_ad_rgb

The folder gets train.parquet and validation.parquet (every ninth room, from the second on), CREDITS.txt, which names
the authors of the furniture and has to go with the frames, and rooms/, one file per finished room. A run that was
stopped goes on with the same command; more --rooms add to those there are. A room depends on the seed and its number
only, not on --jobs. How it works: examples/rooms_renderer/README.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rooms_renderer import denoise, frames, labels, scene
from rooms_renderer.cameras import Camera, make_cameras
from rooms_renderer.furniture import FURNITURE_SPLITS, FurnitureModel, credits_text, find_libraries, read_catalogue
from rooms_renderer.layout import LIGHTS, make_room

# Validation rooms: 1, 10, 19, ... A room's split does not change when rooms are added.
VALIDATION_EVERY, VALIDATION_FIRST = 9, 1
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class Settings:
    """All that a room's pixels depend on, beside its number."""

    seed: int
    views: int
    size: int
    spp: int
    light: str
    exposure: float
    furniture_split: str
    variant: str
    libraries: tuple[str, ...]


def split_of(number: int) -> str:
    """ "train" or "validation" for a room's number."""
    return "validation" if number % VALIDATION_EVERY == VALIDATION_FIRST else "train"


def room_file(output: Path, number: int) -> Path:
    return output / "rooms" / f"{number:05d}.parquet"


def render_room(number: int, settings: Settings, output: Path, num_threads: int | None = None) -> Path:
    """Renders a room's views and writes its file, unless that is there already."""
    path = room_file(output, number)
    if path.is_file():
        return path
    mi = scene.import_mitsuba(settings.variant, num_threads)
    models = read_catalogue(map(Path, settings.libraries), settings.furniture_split)
    room = make_room(settings.seed, number, models, settings.light)
    cameras = make_cameras(room, settings.views, np.random.default_rng([settings.seed, number, 1]))
    with tempfile.TemporaryDirectory() as folder:
        built = scene.build_scene(mi, room, Path(folder))
    rows = []
    for view, camera in enumerate(cameras):
        rendered = scene.render_view(mi, built, camera, settings.size, settings.spp, seed=room.seed + view)
        row = make_frame(rendered, camera, built.class_of_id, settings.exposure)
        row.update(room=room.name, room_type=room.room_type, fov_degrees=camera.fov_degrees)
        rows.append(row)
    used = sorted({placement.model.key for placement in room.placements if placement.model})
    frames.write_frames(path, rows, notes={"furniture": used})
    return path


def make_frame(view: scene.View, camera: Camera, class_of_id: np.ndarray, exposure: float) -> dict[str, Any]:
    """The encoded picture and labels of a view."""
    hit = view.ids >= 0
    depth = labels.planar_depth(view.positions, hit, camera)
    normals = labels.camera_normals(view.normals, view.positions, hit, camera)
    light = denoise.denoise(view.radiance, view.albedo, view.mean_normals, view.mean_positions, depth)
    return frames.encode_frame(
        image=frames.expose(light, exposure),
        depth=depth,
        normals=normals,
        semseg=np.where(hit, class_of_id[view.ids], 0),
        edges=labels.edges(view.ids, depth, normals),
    )


def claim_folder(output: Path, settings: Settings) -> None:
    """Makes the folder, or checks that what is in it came from the same settings.

    Raises:
        ValueError: the folder holds rooms of other settings.
    """
    (output / "rooms").mkdir(parents=True, exist_ok=True)
    # Where libraries lie does not matter, only which they are.
    mine = {**vars(settings), "libraries": [Path(library).name for library in settings.libraries]}
    path = output / SETTINGS_FILE
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))
        differ = {name: (there.get(name), mine[name]) for name in mine if there.get(name) != mine[name]}
        if differ:
            told = "; ".join(f"{name}: {old} there, {new} asked for" for name, (old, new) in differ.items())
            raise ValueError(f"{str(output)!r} holds rooms of other settings ({told}). Name another folder.")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(mine, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def render_all(numbers: range, settings: Settings, output: Path, jobs: int) -> None:
    """Renders the rooms that are missing, `jobs` at a time, under a progress bar."""
    missing = [number for number in numbers if not room_file(output, number).is_file()]
    work = partial(render_room, settings=settings, output=output)
    with tqdm(total=len(numbers), initial=len(numbers) - len(missing), unit="room") as bar:
        if jobs == 1:
            for number in missing:
                work(number)
                bar.update()
            return
        # Fresh processes: a renderer's threads do not survive a fork.
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            for _ in pool.imap_unordered(partial(work, num_threads=1), missing):
                bar.update()


def join_rooms(numbers: range, output: Path, models: list[FurnitureModel]) -> None:
    """Writes the two splits and the credits from the files of rooms."""
    for split in ("train", "validation"):
        paths = [room_file(output, number) for number in numbers if split_of(number) == split]
        num_frames = frames.join_files(output / f"{split}.parquet", paths)
        print(f"{output / split}.parquet: {num_frames} frames of {len(paths)} rooms")
    used = {key for number in numbers for key in frames.read_notes(room_file(output, number))["furniture"]}
    text = credits_text(model for model in models if model.key in used)
    (output / "CREDITS.txt").write_text(text, encoding="utf-8")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for train.parquet, validation.parquet and CREDITS.txt")
    parser.add_argument("--rooms", type=int, default=10, help="number of rooms, at least 2: one for each split")
    parser.add_argument("--views", type=int, default=5, help="most frames of a room")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other rooms")
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels")
    parser.add_argument("--spp", type=int, default=16, help="samples per pixel: more cost time and leave less noise")
    parser.add_argument("--jobs", type=int, default=1, help="processes; a room is rendered by one of them")
    parser.add_argument("--furniture", nargs="+", default=[], help="libraries (.sh3f), or folders with some")
    parser.add_argument("--furniture_split", choices=FURNITURE_SPLITS, default="all", help="which models are used")
    parser.add_argument(
        "--light", choices=LIGHTS, default="random", help="light of windows, of lamps, or drawn per room"
    )
    parser.add_argument("--exposure", type=float, default=0.0, help="stops brighter than the automatic exposure")
    parser.add_argument("--variant", choices=scene.VARIANTS, default=scene.VARIANTS[0], help="llvm_ad_rgb is faster")
    arguments = parser.parse_args(argv)
    for name, least in (("rooms", 2), ("views", 1), ("seed", 0), ("size", 8), ("spp", 1), ("jobs", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} is {getattr(arguments, name)}, but must be at least {least}")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    try:
        scene.import_mitsuba(arguments.variant)
        libraries = find_libraries(arguments.furniture)
        models = read_catalogue(libraries, arguments.furniture_split)
        settings = Settings(
            seed=arguments.seed,
            views=arguments.views,
            size=arguments.size,
            spp=arguments.spp,
            light=arguments.light,
            exposure=arguments.exposure,
            furniture_split=arguments.furniture_split,
            variant=arguments.variant,
            libraries=tuple(map(str, libraries)),
        )
        claim_folder(arguments.output, settings)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    numbers = range(arguments.rooms)
    render_all(numbers, settings, arguments.output, arguments.jobs)
    join_rooms(numbers, arguments.output, models)


if __name__ == "__main__":
    main()
