"""Furniture models as triangles: OBJ and MTL files to parts of one material each, scaled and smoothed.

Legend: `F` triangles, `V` vertices, `P` pairs of corners that share a vertex. Model frame: x right, y up, z to the
front; metres; the origin is the middle of the base.
"""

from __future__ import annotations

import posixpath
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from .furniture import FurnitureModel

# Faces that bend by less than this are one curved surface; from 45 degrees on, labels call it a crease.
SMOOTH_DEGREES = 40.0
MIN_TRIANGLE_AREA = 1e-10  # square metres


@dataclass(frozen=True)
class Material:
    """What an MTL file says of a part; colour is RGB in [0, 1], texture the path of a picture in the library."""

    name: str
    colour: tuple[float, float, float] = (0.7, 0.7, 0.7)
    opacity: float = 1.0
    texture: str | None = None


@dataclass
class Part:
    """Triangles of one material."""

    material: Material
    corners_F33: np.ndarray
    normals_F33: np.ndarray
    uv_F32: np.ndarray
    # Coordinates from the file fit its texture; otherwise they are metres, for procedural textures.
    uv_from_file: bool = False


@dataclass
class _Faces:
    """Corners of the triangles of one material: indices of positions and of texture coordinates (-1 = none)."""

    positions: list[tuple[int, int, int]] = field(default_factory=list)
    uvs: list[tuple[int, int, int]] = field(default_factory=list)


@lru_cache(maxsize=64)
def load_parts(model: FurnitureModel, width: float, height: float, depth: float) -> tuple[Part, ...]:
    """The model's parts, scaled to fill exactly `width` x `height` x `depth` metres.

    Raises:
        ValueError: the OBJ file has no triangle.
    """
    with zipfile.ZipFile(model.library) as archive:
        text = archive.read(model.model_path).decode("latin-1")
        positions_V3, uvs_V2, faces, material_files = parse_obj(text)
        materials = {}
        for name in material_files:
            path = posixpath.normpath(posixpath.join(posixpath.dirname(model.model_path), name))
            if path in archive.namelist():
                materials.update(parse_mtl(archive.read(path).decode("latin-1"), posixpath.dirname(path)))
    if not faces:
        raise ValueError(f"The file {model.model_path!r} of {model.library!r} holds no triangle.")

    positions_V3 = positions_V3 @ np.array(model.rotation).reshape(3, 3).T
    used = np.unique(np.concatenate([np.array(part.positions).ravel() for part in faces.values()]))
    low, high = positions_V3[used].min(axis=0), positions_V3[used].max(axis=0)
    middle = np.array([(low[0] + high[0]) / 2, low[1], (low[2] + high[2]) / 2])
    positions_V3 = (positions_V3 - middle) * (np.array([width, height, depth]) / np.maximum(high - low, 1e-6))

    parts = []
    for name, part in faces.items():
        index_F3 = np.array(part.positions)
        corners_F33 = positions_V3[index_F3]
        area_F = np.linalg.norm(_cross(corners_F33), axis=1) / 2
        keep = area_F > MIN_TRIANGLE_AREA
        if not keep.any():
            continue
        corners_F33, uv_index_F3 = corners_F33[keep], np.array(part.uvs)[keep]
        from_file = len(uvs_V2) > 0 and (uv_index_F3 >= 0).all()
        parts.append(
            Part(
                material=materials.get(name, Material(name)),
                corners_F33=corners_F33,
                normals_F33=smooth_normals(corners_F33),
                uv_F32=uvs_V2[uv_index_F3] if from_file else box_uv(corners_F33),
                uv_from_file=from_file,
            )
        )
    return tuple(parts)


def parse_obj(text: str) -> tuple[np.ndarray, np.ndarray, dict[str, _Faces], list[str]]:
    """Positions (V, 3), texture coordinates (V, 2), triangles per material name, names of MTL files."""
    positions: list[Sequence[str]] = []
    uvs: list[Sequence[str]] = []
    faces: dict[str, _Faces] = defaultdict(_Faces)
    material_files: list[str] = []
    current = faces["default"]
    for line in text.splitlines():
        keyword, _, rest = line.partition(" ")
        if keyword == "v":
            positions.append(rest.split()[:3])
        elif keyword == "vt":
            uvs.append(rest.split()[:2])
        elif keyword == "f":
            corners = [corner.split("/") for corner in rest.split()]
            # Negative indices count from the last one read.
            at = [int(corner[0]) - 1 if corner[0][0] != "-" else len(positions) + int(corner[0]) for corner in corners]
            uv_at = [_uv_index(corner, len(uvs)) for corner in corners]
            for i in range(1, len(at) - 1):
                current.positions.append((at[0], at[i], at[i + 1]))
                current.uvs.append((uv_at[0], uv_at[i], uv_at[i + 1]))
        elif keyword == "usemtl":
            current = faces[rest.strip()]
        elif keyword == "mtllib":
            material_files.append(rest.strip())
    return (
        np.array(positions, dtype=float).reshape(-1, 3),
        np.array(uvs, dtype=float).reshape(-1, 2),
        {name: part for name, part in faces.items() if part.positions},
        material_files,
    )


def _uv_index(corner: list[str], num_uvs: int) -> int:
    if len(corner) < 2 or not corner[1]:
        return -1
    index = int(corner[1])
    return index - 1 if index > 0 else num_uvs + index


def parse_mtl(text: str, folder: str) -> dict[str, Material]:
    """The materials of an MTL file that lies in `folder` of its library."""
    entries: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    for line in text.splitlines():
        keyword, _, rest = line.strip().partition(" ")
        if keyword == "newmtl":
            current = entries[rest.strip()] = {}
        elif keyword:
            current[keyword] = rest.strip()
    materials = {}
    for name, entry in entries.items():
        picture = entry.get("map_Kd", "")
        red, green, blue = (min(max(float(c), 0.0), 1.0) for c in entry.get("Kd", "0.7 0.7 0.7").split()[:3])
        materials[name] = Material(
            name=name,
            colour=(red, green, blue),
            opacity=float(entry["d"].split()[-1]) if "d" in entry else 1 - float(entry.get("Tr", "0")),
            texture=posixpath.normpath(posixpath.join(folder, picture)) if picture else None,
        )
    return materials


def smooth_normals(corners_F33: np.ndarray, smooth_degrees: float = SMOOTH_DEGREES) -> np.ndarray:
    """Unit normals per corner (F, 3, 3): the area-weighted mean over the faces around it that bend but little."""
    area_normal_F3 = _cross(corners_F33)
    face_normal_F3 = area_normal_F3 / np.linalg.norm(area_normal_F3, axis=1, keepdims=True)
    # Files repeat vertices where textures or objects meet; positions within a tenth of a millimetre are one vertex.
    _, vertex = np.unique(np.round(corners_F33.reshape(-1, 3) * 1e4).astype(np.int64), axis=0, return_inverse=True)
    vertex = vertex.ravel()
    order = np.argsort(vertex, kind="stable")
    count_V = np.bincount(vertex)
    start_V = np.cumsum(count_V) - count_V
    # Every corner is paired with every corner of its vertex, itself included.
    num_partners = count_V[vertex]
    corner_P = np.repeat(np.arange(len(vertex)), num_partners)
    nth_P = np.arange(len(corner_P)) - np.repeat(np.cumsum(num_partners) - num_partners, num_partners)
    face_P, partner_face_P = corner_P // 3, order[start_V[vertex[corner_P]] + nth_P] // 3
    cosine_P = (face_normal_F3[face_P] * face_normal_F3[partner_face_P]).sum(axis=1)
    smooth_P = cosine_P > np.cos(np.radians(smooth_degrees))
    normals = np.zeros((len(vertex), 3))
    for axis in range(3):
        weights = area_normal_F3[partner_face_P[smooth_P], axis]
        normals[:, axis] = np.bincount(corner_P[smooth_P], weights=weights, minlength=len(vertex))
    return (normals / np.linalg.norm(normals, axis=1, keepdims=True)).reshape(-1, 3, 3)


def box_uv(corners_F33: np.ndarray) -> np.ndarray:
    """Texture coordinates in metres (F, 3, 2): each face is projected along the axis that it faces most."""
    axis_F = np.abs(_cross(corners_F33)).argmax(axis=1)
    u_of_axis, v_of_axis = np.array([2, 0, 0]), np.array([1, 2, 1])
    faces = np.arange(len(corners_F33))[:, None]
    corners = np.arange(3)[None, :]
    u = corners_F33[faces, corners, u_of_axis[axis_F][:, None]]
    v = corners_F33[faces, corners, v_of_axis[axis_F][:, None]]
    return np.stack([u, v], axis=-1)


def write_ply(path: Path, corners_F33: np.ndarray, normals_F33: np.ndarray, uv_F32: np.ndarray) -> None:
    """A binary PLY file; no vertex is shared, so each corner keeps its own normal."""
    num_faces = len(corners_F33)
    names = ("x", "y", "z", "nx", "ny", "nz", "u", "v")
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {3 * num_faces}"]
    header += [f"property float {name}" for name in names]
    header += [f"element face {num_faces}", "property list uchar int vertex_indices", "end_header", ""]
    # Mitsuba's v grows downwards from the first row of a picture.
    flipped_uv_F32 = np.stack([uv_F32[..., 0], 1 - uv_F32[..., 1]], axis=-1)
    vertices = np.concatenate([corners_F33, normals_F33, flipped_uv_F32], axis=2).reshape(-1, 8).astype("<f4")
    triangles = np.empty(num_faces, dtype=[("count", "u1"), ("corners", "<i4", 3)])
    triangles["count"] = 3
    triangles["corners"] = np.arange(3 * num_faces).reshape(-1, 3)
    path.write_bytes("\n".join(header).encode() + vertices.tobytes() + triangles.tobytes())


def _cross(corners_F33: np.ndarray) -> np.ndarray:
    """Twice the area times the unit normal of each triangle (F, 3)."""
    return np.cross(corners_F33[:, 1] - corners_F33[:, 0], corners_F33[:, 2] - corners_F33[:, 0])
