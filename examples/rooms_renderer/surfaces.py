"""Which colour, texture and gloss each part of a room gets, as Mitsuba's dictionaries (the keys of its plugins)."""

from __future__ import annotations

import io
import re
import zipfile
from typing import Any

import numpy as np
from PIL import Image

from . import textures
from .layout import Placement
from .meshes import Material

METAL = re.compile(r"metal|chrome|steel|inox|alumin|iron|acero|silver|gold|brass", re.IGNORECASE)
LIGHT_PART = re.compile(r"bulb|shade|light|glow|neon|ampoule|lamp|glass|cristal|white|flame", re.IGNORECASE)
# By class: the textures of parts that have no picture of their own.
TEXTURES = {
    "bed": ("fabric", "fabric", "wood"),
    "sofa": ("fabric", "fabric", "plain"),
    "chair": ("fabric", "wood", "wood", "plain"),
    "table": ("wood", "wood", "plain"),
    "storage": ("wood", "wood", "plain"),
    "door": ("wood", "plain"),
    "rug": ("carpet",),
}
# Kept as catalogued more often than recoloured: a green keyboard or a blue leaf is no plausible part of a room.
KEEP_COLOUR = {"plant": 1.0, "electronics": 0.85, "objects": 0.7, "appliance": 0.75, "window": 0.8}
KEEP_COLOUR_DEFAULT = 0.35
MAX_PICTURE_SIZE = 512
MIRROR_OPACITY = 0.9

Bsdf = dict[str, Any]


def bitmap(mi: Any, picture: np.ndarray) -> dict[str, Any]:
    """A texture from sRGB uint8 (H, W, 3); row 0 is the top, v = 1."""
    return {"type": "bitmap", "bitmap": mi.Bitmap(np.ascontiguousarray(picture)), "wrap_mode": "repeat"}


def matte(mi: Any, picture: np.ndarray) -> Bsdf:
    return {"type": "twosided", "bsdf": {"type": "diffuse", "reflectance": bitmap(mi, picture)}}


def glossy(reflectance: dict[str, Any], roughness: float, metallic: float = 0.0) -> Bsdf:
    surface = {"type": "principled", "base_color": reflectance, "roughness": roughness, "metallic": metallic}
    return {"type": "twosided", "bsdf": {**surface, "specular": 0.5}}


def flat_colour(colour: tuple[float, float, float] | np.ndarray) -> dict[str, Any]:
    """A colour given in sRGB; black and white are kept off, as no surface of a room is either."""
    linear = np.clip(np.array(colour), 0, 1) ** 2.2
    return {"type": "rgb", "value": [float(c) for c in np.clip(linear, 0.015, 0.88)]}


def part_surface(mi: Any, placement: Placement, material: Material, picture: np.ndarray | None) -> tuple[Bsdf, float]:
    """The surface of one part, and how many times its coordinates are to be scaled.

    The choice depends on the piece's seed and the material's name only, so parts of one material look alike. Glass is
    drawn as a glossy opaque surface: labels are of the first thing a ray meets, and pictures should agree with them.
    """
    rng = np.random.default_rng([placement.seed, *material.name.encode()[:16]])
    semantic_class = placement.semantic_class
    if picture is not None:
        if rng.random() < 0.5 and semantic_class not in ("plant", "electronics"):
            tint = np.array(textures.hsv(rng.random(), rng.uniform(0, 0.35), 1.0))
            picture = (picture * tint).astype(np.uint8)
        return matte(mi, picture), 1.0
    if material.opacity < MIRROR_OPACITY:
        return glossy(flat_colour(textures.hsv(rng.uniform(0.4, 0.65), 0.12, rng.uniform(0.4, 0.75))), 0.12), 1.0
    if METAL.search(material.name):
        return glossy(flat_colour(np.full(3, rng.uniform(0.5, 0.85))), rng.uniform(0.25, 0.45), metallic=0.9), 1.0

    keep = rng.random() < KEEP_COLOUR.get(semantic_class, KEEP_COLOUR_DEFAULT)
    names = TEXTURES.get(semantic_class, ("plain",))
    name = str(rng.choice(names))
    if keep:
        colour = tuple(np.clip(np.array(material.colour) * rng.uniform(0.85, 1.1), 0.04, 0.95))
    else:
        colour = textures.wood_colour(rng) if name == "wood" and rng.random() < 0.7 else textures.furniture_colour(rng)
    if name == "plain" or (keep and name == "wood"):
        if rng.random() < 0.5:
            return glossy(flat_colour(colour), rng.uniform(0.3, 0.6)), 1.0
        return {"type": "twosided", "bsdf": {"type": "diffuse", "reflectance": flat_colour(colour)}}, 1.0
    return matte(mi, textures.make_texture(name, rng, colour)), 1 / textures.TEXTURE_METRES[name]


def read_picture(library: str, path: str | None) -> np.ndarray | None:
    """A texture of a library as sRGB uint8, shrunk to at most `MAX_PICTURE_SIZE` pixels; None where there is none."""
    if path is None:
        return None
    with zipfile.ZipFile(library) as archive:
        if path not in archive.namelist():
            return None
        with Image.open(io.BytesIO(archive.read(path))) as picture:
            picture.thumbnail((MAX_PICTURE_SIZE, MAX_PICTURE_SIZE))
            return np.array(picture.convert("RGB"))


def surface_colour(name: str, rng: np.random.Generator, wall: bool) -> tuple[float, float, float]:
    """The colour of a wall or a floor with texture `name`."""
    if name == "brick":
        return textures.hsv(rng.uniform(0.0, 0.05), rng.uniform(0.35, 0.6), rng.uniform(0.5, 0.75))
    if name == "planks":
        return textures.wood_colour(rng)
    if wall:
        return textures.wall_colour(rng)
    if name == "checker":
        return textures.hsv(rng.random(), rng.uniform(0, 0.1), 0.88)
    return textures.hsv(rng.random(), rng.uniform(0.03, 0.45), rng.uniform(0.4, 0.85))
