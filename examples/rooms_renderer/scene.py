"""A room as a Mitsuba scene, and one view of it: noisy light, and what each pixel's middle hits.

Mitsuba is handed over as `mi`, so that everything else works and is tested without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import surfaces, textures
from .cameras import Camera
from .classes import CLASSES
from .layout import Placement, Room
from .meshes import Material, Part, box_uv, load_parts, smooth_normals, write_ply

# The first needs nothing but a processor; the second needs an LLVM library and takes a fifth of the time.
VARIANTS = ("scalar_rgb", "llvm_ad_rgb")
MAX_BOUNCES = 6
INSTALL_HINT = 'pip install "mt-adapters[render]"   (or: pip install mitsuba)'
LLVM_HINT = (
    "install a recent LLVM (Debian: apt-get install libllvm19), name it in the environment "
    "(DRJIT_LIBLLVM_PATH=libLLVM.so.19.1), or render with --variant scalar_rgb."
)
# Radiance by kind of light; only ratios matter, since exposure follows the picture.
PANEL, LAMP, DAYLIGHT = 9.0, 7.0, 8.0
# What is left of the lights that are "off": a room is never dark, and a sampled light costs less noise than bounces.
DIMMED = 0.12
LAMP_KINDS = ("table_lamp", "floor_lamp", "wall_lamp", "ceiling_lamp")
# Ids of the room itself; furniture counts on from FIRST_PIECE.
WALLS, FLOOR, CEILING, FIRST_PIECE = (0, 1, 2, 3), 4, 5, 6
CEILING_TINT = 0.93
NO_MATERIAL = Material("room")


@dataclass
class Scene:
    """`class_of_id` maps pieces to class ids; `id_of_shape` maps the renderer's shapes to pieces."""

    mitsuba: Any
    class_of_id: np.ndarray
    id_of_shape: np.ndarray


@dataclass
class View:
    """One rendered view: the first four are means over a pixel's samples, the rest is of its middle."""

    radiance: np.ndarray
    albedo: np.ndarray
    mean_normals: np.ndarray
    mean_positions: np.ndarray
    positions: np.ndarray
    normals: np.ndarray
    ids: np.ndarray  # of pieces, -1 = nothing hit


def import_mitsuba(variant: str, num_threads: int | None = None) -> Any:
    """The module `mitsuba`, set to one of `VARIANTS`.

    Raises:
        ImportError: it is not installed, or the variant lacks its library; says what to do.
    """
    try:
        import mitsuba
    except ImportError as error:
        raise ImportError(f"Rendering needs Mitsuba 3: {INSTALL_HINT}") from error
    try:
        mitsuba.set_variant(variant)
    except ImportError as error:
        raise ImportError(f"Mitsuba cannot use {variant!r} ({error}); {LLVM_HINT}") from error
    if num_threads is not None:
        import drjit

        drjit.set_thread_count(num_threads)
    return mitsuba


def build_scene(mi: Any, room: Room, folder: Path) -> Scene:
    """Writes the room's meshes to `folder` and loads them; the folder may go afterwards."""
    rng = np.random.default_rng(room.seed)
    shapes: dict[str, dict[str, Any]] = {}
    owners: dict[str, int] = {}

    def add(owner: int, part: Part, bsdf: dict[str, Any], uv_scale: float = 1.0, light: Any = None) -> None:
        name = f"shape{len(shapes):04d}"
        path = folder / f"{name}.ply"
        write_ply(path, part.corners_F33, part.normals_F33, part.uv_F32 * uv_scale)
        shapes[name] = {"type": "ply", "filename": str(path), "bsdf": bsdf}
        if light is not None:
            shapes[name]["emitter"] = {"type": "area", "radiance": light}
        owners[name] = owner

    class_of_id = [CLASSES.index("wall")] * 4 + [CLASSES.index("floor"), CLASSES.index("ceiling")]
    for owner, texture, quad in _shell(room):
        wall = owner in WALLS
        if owner == CEILING:
            bsdf = surfaces.matte(mi, textures.make_texture("plain", rng, (CEILING_TINT,) * 3))
        else:
            # The same seed for walls with one texture: a room is painted in one colour.
            own = np.random.default_rng([room.seed, *texture.encode()] if wall else [room.seed, owner])
            picture = textures.make_texture(texture, own, surfaces.surface_colour(texture, own, wall))
            bsdf = surfaces.matte(mi, picture)
        add(owner, quad, bsdf, 1 / textures.TEXTURE_METRES[texture])

    daylight = DAYLIGHT * (DIMMED if room.light == "lamps" else 1.0)
    electric = DIMMED if room.light == "daylight" else 1.0
    warmth = rng.uniform(0, 1)
    lamp_colour = np.array([1.0, 0.93 - 0.16 * warmth, 0.84 - 0.34 * warmth])
    for number, placement in enumerate(room.placements):
        class_of_id.append(CLASSES.index(placement.semantic_class))
        owner = FIRST_PIECE + number
        if placement.model is None:
            light = _radiance(PANEL * electric * lamp_colour) if placement.kind == "panel" else None
            add(
                owner, _placed(_box(placement.size, placement.kind), placement), _procedural(mi, placement), 1.0, light
            )
            continue
        parts = load_parts(placement.model, *placement.size)
        glowing = _glowing_part(parts) if placement.kind in LAMP_KINDS and electric == 1.0 else -1
        for index, part in enumerate(parts):
            if placement.kind == "window" and part.material.opacity < surfaces.MIRROR_OPACITY:
                continue  # The pane below takes its place.
            picture = (
                surfaces.read_picture(placement.model.library, part.material.texture) if part.uv_from_file else None
            )
            bsdf, scale = surfaces.part_surface(mi, placement, part.material, picture)
            light = _radiance(LAMP * lamp_colour) if index == glowing else None
            add(owner, _placed(part, placement), bsdf, scale, light)
        if placement.kind == "window":
            view = textures.make_texture("outdoors", np.random.default_rng(placement.seed), (0.55, 0.7, 0.95))
            outside = surfaces.bitmap(mi, view)
            radiance = {"type": "bitmap", "bitmap": _scaled(mi, view, daylight), "raw": True}
            add(owner, _pane(placement), {"type": "diffuse", "reflectance": outside}, 1.0, radiance)

    # Optimising would merge shapes of equal surfaces, and with them the pieces that labels tell apart.
    scene = mi.load_dict({"type": "scene", **shapes}, optimize=False)
    numbers = [_number_of_shape(mi, shape, index) for index, shape in enumerate(scene.shapes())]
    id_of_shape = np.full(max(numbers) + 1, -1)
    id_of_shape[numbers] = [owners[shape.id()] for shape in scene.shapes()]
    return Scene(scene, np.array(class_of_id), id_of_shape)


def _number_of_shape(mi: Any, shape: Any, index: int) -> int:
    """What the renderer's channel `shape_index` says of a shape; 0 stands for no shape."""
    if mi.variant().startswith("scalar"):
        return index + 1
    import drjit

    # Compiled variants number shapes in the order in which threads happened to load them.
    return int(drjit.reinterpret_array(mi.UInt32, mi.ShapePtr(shape))[0])


def render_view(mi: Any, scene: Scene, camera: Camera, size: int, samples: int, seed: int) -> View:
    """Renders `size` x `size` pixels; the same seed gives the same picture."""
    path = {"type": "path", "max_depth": MAX_BOUNCES, "rr_depth": 4}
    light = {"type": "aov", "aovs": "albedo:albedo,normal:sh_normal,position:position", "image": path}
    hits = {"type": "aov", "aovs": "position:position,normal:sh_normal,shape:shape_index"}
    noisy = _render(mi, scene, camera, size, light, {"type": "independent", "sample_count": samples}, seed)
    # One sample without jitter is the middle of the pixel.
    centre = {"type": "stratified", "sample_count": 1, "jitter": False}
    exact = _render(mi, scene, camera, size, hits, centre, seed)[..., -7:]
    ids = scene.id_of_shape[np.rint(exact[..., 6]).astype(int)]
    noisy = noisy[..., -12:]
    return View(
        radiance=noisy[..., 0:3],
        albedo=noisy[..., 3:6],
        mean_normals=noisy[..., 6:9],
        mean_positions=noisy[..., 9:12],
        positions=exact[..., 0:3],
        normals=exact[..., 3:6],
        ids=ids,
    )


def _render(
    mi: Any, scene: Scene, camera: Camera, size: int, integrator: dict, sampler: dict, seed: int
) -> np.ndarray:
    # Mitsuba's cameras look along +z with x to the left.
    to_world = np.eye(4)
    to_world[:3, 0], to_world[:3, 1], to_world[:3, 2] = -camera.axes[0], camera.axes[1], -camera.axes[2]
    to_world[:3, 3] = camera.position
    film = {"type": "hdrfilm", "width": size, "height": size, "component_format": "float32", "pixel_format": "rgb"}
    sensor = mi.load_dict(
        {
            "type": "perspective",
            "fov": camera.fov_degrees,
            "near_clip": 0.01,
            "to_world": mi.ScalarTransform4f(to_world),
            # A box keeps each sample in its own pixel, so the result does not depend on the order of threads.
            "film": {**film, "rfilter": {"type": "box"}},
            "sampler": sampler,
        }
    )
    return np.array(
        mi.render(scene.mitsuba, sensor=sensor, integrator=mi.load_dict(integrator), seed=seed), dtype=float
    )


def _shell(room: Room) -> list[tuple[int, str, Part]]:
    """Walls, floor and ceiling: id, texture, and two triangles that face inwards with coordinates in metres."""
    width, height, length = room.size
    a, b, c, d = (0, 0, 0), (width, 0, 0), (width, 0, length), (0, 0, length)
    up = np.array([0, height, 0])
    feet = [(a, b), (d, a), (c, d), (b, c)]  # in the order of the layout's walls: z = 0, x = 0, z = length, x = width
    walls = [
        (wall, texture, _quad(*(np.array(corner) for corner in pair), up))
        for wall, texture, pair in zip(WALLS, room.walls, feet, strict=True)
    ]
    floor = (FLOOR, room.floor, _quad(np.array(a), np.array(d), np.array([width, 0, 0])))
    ceiling = (CEILING, "plain", _quad(up, up + np.array(b), np.array([0, 0, length])))
    return [*walls, floor, ceiling]


def _quad(first: np.ndarray, second: np.ndarray, side: np.ndarray) -> Part:
    """The parallelogram first, second, second + side, first + side, with coordinates in metres along its sides."""
    corners = np.array([first, second, second + side, first + side], dtype=float)
    lengths = np.linalg.norm(second - first), np.linalg.norm(side)
    uv = np.array([(0, 0), (lengths[0], 0), lengths, (0, lengths[1])], dtype=float)
    triangles = np.array([(0, 1, 2), (0, 2, 3)])
    return Part(NO_MATERIAL, corners[triangles], smooth_normals(corners[triangles]), uv[triangles], True)


def _box(size: tuple[float, float, float], kind: str) -> Part:
    """A closed box on its base; pictures and rugs show their texture once, on the side that is looked at."""
    half_width, height, half_depth = size[0] / 2, size[1], size[2] / 2
    low, high = np.array([-half_width, 0, -half_depth]), np.array([half_width, height, half_depth])
    corner = np.array([[(low, high)[bit][axis] for axis, bit in enumerate(bits)] for bits in np.ndindex(2, 2, 2)])
    faces = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    triangles = np.array([t for f in faces for t in ((f[0], f[1], f[2]), (f[0], f[2], f[3]))])
    corners = corner[triangles]
    uv = box_uv(corners)
    if kind == "painting":
        uv = (uv - [low[0], 0]) / [size[0], size[1]]
    elif kind == "procedural_rug":
        uv = (uv - [low[0], low[2]]) / [size[0], size[2]]
    return Part(NO_MATERIAL, corners, smooth_normals(corners), uv)


def _pane(placement: Placement) -> Part:
    """What is seen through a window: a sheet at the back of its frame, a little smaller than it."""
    width, height, depth = placement.size
    left, bottom, back = -0.47 * width, 0.03 * height, -depth / 2 + 0.004
    quad = _quad(np.array([left, bottom, back]), np.array([-left, bottom, back]), np.array([0, 0.94 * height, 0]))
    quad.uv_F32 /= quad.uv_F32.max(axis=(0, 1))
    return _placed(quad, placement)


def _placed(part: Part, placement: Placement) -> Part:
    cosine, sine = np.cos(placement.yaw), np.sin(placement.yaw)
    rotation = np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]])
    corners = part.corners_F33 @ rotation.T + np.array(placement.position)
    return Part(part.material, corners, part.normals_F33 @ rotation.T, part.uv_F32, part.uv_from_file)


def _procedural(mi: Any, placement: Placement) -> dict[str, Any]:
    rng = np.random.default_rng(placement.seed)
    name = {"painting": "canvas", "procedural_rug": "rug", "panel": "plain"}[placement.kind]
    return surfaces.matte(mi, textures.make_texture(name, rng, textures.furniture_colour(rng)))


def _glowing_part(parts: tuple[Part, ...]) -> int:
    """The part of a lamp that shines: the lightest of those that are named for it, or of all."""
    named = [i for i, part in enumerate(parts) if surfaces.LIGHT_PART.search(part.material.name)]
    return max(named or range(len(parts)), key=lambda i: sum(parts[i].material.colour))


def _radiance(value: np.ndarray) -> dict[str, Any]:
    return {"type": "rgb", "value": [float(v) for v in value]}


def _scaled(mi: Any, picture: np.ndarray, factor: float) -> Any:
    """An sRGB picture as linear radiance."""
    return mi.Bitmap(((picture / 255.0) ** 2.2 * factor).astype(np.float32))
