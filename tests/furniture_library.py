"""A furniture library of a few boxes, for the tests of the rooms renderer."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rooms_renderer.furniture import FurnitureModel, read_catalogue

# Name, category, width, depth and height in centimetres, creator.
PIECES = [
    ("Sofa", "Living room", 200, 90, 85, "Ada"),
    ("Wardrobe", "Bedroom", 120, 60, 200, "Ada"),
    ("Bed", "Bedroom", 160, 200, 60, "Ben"),
    ("Table", "Living room", 120, 80, 75, "Ben"),
    ("Coffee table", "Living room", 90, 50, 45, "Ben"),
    ("Desk", "Office", 140, 70, 72, "Ada"),
    *[("Chair", "Kitchen", 45, 45 + i, 90, f"Creator {i}") for i in range(6)],
    ("Fridge", "Kitchen", 60, 60, 170, "Eve"),
    ("Lower cabinet", "Kitchen", 60, 60, 88, "Eve"),
    ("Oven", "Kitchen", 60, 60, 60, "Eve"),
    ("Bath", "Bathroom", 160, 70, 60, "Eve"),
    ("Toilets unit", "Bathroom", 40, 60, 75, "Eve"),
    ("Vase", "Miscellaneous", 12, 12, 19, "Eve"),
    ("Door", "Doors and windows", 90, 14, 205, "Eve"),
    ("Bicycle", "Vehicles", 50, 160, 90, "Nobody"),
]
CORNERS = [(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)]
QUADS = ["1 2 4 3", "5 7 8 6", "1 5 6 2", "3 4 8 7", "1 3 7 5", "2 6 8 4"]
BOX_OBJ = "\n".join(
    ["mtllib box.mtl", *(f"v {x} {y} {z}" for x, y, z in CORNERS), "usemtl red", *(f"f {quad}" for quad in QUADS)]
)
PAINTED_OBJ = "\n".join(
    ["mtllib painted.mtl", *(f"v {x} {y} {z}" for x, y, z in CORNERS), "vt 0 0", "vt 1 0", "vt 1 1", "vt 0 1"]
    + ["usemtl red", *(" ".join(["f", *(f"{v}/{i}" for i, v in enumerate(quad.split(), 1))]) for quad in QUADS)]
)
STRIPES = np.repeat(np.array([[[200, 0, 0]], [[0, 0, 200]]], dtype=np.uint8), 4, axis=0).repeat(8, axis=1)


def write_library(path: Path) -> Path:
    """A furniture library as Sweet Home 3D reads it, in which every model is a box; the bed's has a picture on it."""
    lines = ["name=Boxes", "license=Creative Commons Attribution 3.0 license"]
    picture = io.BytesIO()
    Image.fromarray(STRIPES).save(picture, format="PNG")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("boxes/box.obj", BOX_OBJ)
        archive.writestr("boxes/box.mtl", "newmtl red\nKd 0.8 0.1 0.1\nd 1\n")
        archive.writestr("boxes/painted.obj", PAINTED_OBJ)
        archive.writestr("boxes/painted.mtl", "newmtl red\nKd 1 1 1\nmap_Kd ../pictures/stripes.png\n")
        archive.writestr("pictures/stripes.png", picture.getvalue())
        for number, (name, category, width, depth, height, creator) in enumerate(PIECES, start=1):
            model = "painted" if name == "Bed" else "box"
            entry = {"id": f"Boxes#{number}", "name": name, "category": category, "model": f"/boxes/{model}.obj"}
            entry |= {"width": width, "depth": depth, "height": height, "creator": creator}
            lines += [f"{field}#{number}={value}" for field, value in entry.items()]
        archive.writestr("PluginFurnitureCatalog.properties", "\n".join(lines).encode("latin-1"))
    return path


@pytest.fixture(scope="session")
def furniture_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_library(tmp_path_factory.mktemp("furniture") / "Boxes.sh3f")


@pytest.fixture(scope="session")
def furniture_models(furniture_library: Path) -> list[FurnitureModel]:
    return read_catalogue([furniture_library])
