"""What stands in a room of each type, and how many of each kind; the tables to edit for other rooms."""

from __future__ import annotations

from dataclasses import dataclass

# Shares of the shipped sample's frames: 435, 260, 240, 155 and 110 of 1,200.
ROOM_TYPES: dict[str, int] = {"Living room": 435, "Bedroom": 260, "Kitchen": 240, "Office": 155, "Bathroom": 110}


@dataclass(frozen=True)
class Item:
    """`low` to `high` pieces of one of the kinds, each with the probability `chance`."""

    kinds: tuple[str, ...]
    low: int = 1
    high: int = 1
    chance: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """Ranges of width and length in metres, the textures of the surfaces, and the furniture, the largest first."""

    width: tuple[float, float]
    length: tuple[float, float]
    floors: tuple[str, ...]
    walls: tuple[str, ...]
    items: tuple[Item, ...]


# How a kind is placed: see the functions of these names in layout.py.
_PLACES = {
    "against_wall": "bed bedside wardrobe shelf chest tv_stand desk sofa piano fridge kitchen_unit cooker toilet bath "
    "washbasin water_cooler",
    "in_wall": "window door curtain radiator",
    "on_wall": "hood kitchen_wall_unit wall_lamp wall_object water_heater painting",
    "under_ceiling": "ceiling_lamp ceiling_fan panel",
    "in_the_middle": "dining_table coffee_table games_table",
    "at_table": "chair desk_chair",
    "anywhere": "armchair bar_stool floor_lamp floor_object plant_large",
    "on_top": "television computer hifi kitchen_device table_lamp plant_small table_object bathroom_object "
    "picture_small",
    "on_floor": "rug procedural_rug",
}
PLACED: dict[str, str] = {kind: place for place, kinds in _PLACES.items() for kind in kinds.split()}
# Kinds made here, without a model: width, height and depth in metres are drawn in layout.py.
PROCEDURAL: dict[str, str] = {"painting": "picture", "panel": "lamp", "procedural_rug": "rug"}

_OPENINGS = (Item(("door",), 1, 1), Item(("window",), 1, 2, 0.85))
_EXTRAS = (
    Item(("plant_large",), 1, 2, 0.5),
    Item(("floor_object",), 1, 2, 0.5),
    Item(("radiator",), 1, 1, 0.35),
    Item(("painting",), 1, 2, 0.35),
    Item(("wall_object",), 1, 2, 0.5),
    Item(("curtain",), 1, 1, 0.25),
)
_PAINT = ("plain", "plain", "plain", "plaster", "plaster", "stripes", "brick", "marble")

RECIPES: dict[str, Recipe] = {
    "Living room": Recipe(
        (3.6, 6.4),
        (4.2, 7.0),
        ("planks", "planks", "planks", "carpet", "tiles", "marble"),
        _PAINT,
        (
            *_OPENINGS,
            Item(("sofa",), 1, 2),
            Item(("shelf",), 1, 2, 0.7),
            Item(("tv_stand",), 1, 1, 0.5),
            Item(("dining_table",), 1, 2, 0.85),
            Item(("coffee_table",), 1, 2, 0.9),
            Item(("piano", "games_table"), 1, 1, 0.12),
            Item(("armchair",), 1, 2, 0.7),
            Item(("chair",), 1, 4, 0.8),
            Item(("floor_lamp",), 1, 1, 0.3),
            Item(("chest",), 1, 1, 0.25),
            Item(("procedural_rug", "rug"), 1, 1, 0.6),
            *_EXTRAS,
            Item(("television",), 1, 1, 0.7),
            Item(("table_lamp",), 1, 2, 0.6),
            Item(("plant_small",), 1, 2, 0.5),
            Item(("hifi",), 1, 2, 0.4),
            Item(("picture_small",), 1, 1, 0.2),
            Item(("table_object",), 2, 7),
            Item(("ceiling_lamp", "ceiling_fan"), 1, 1, 0.3),
        ),
    ),
    "Bedroom": Recipe(
        (3.2, 5.4),
        (3.4, 5.8),
        ("planks", "planks", "carpet", "carpet", "tiles"),
        _PAINT,
        (
            *_OPENINGS,
            Item(("bed",), 1, 1),
            Item(("wardrobe",), 1, 1, 0.9),
            Item(("bedside",), 1, 2, 0.7),
            Item(("shelf",), 1, 1, 0.4),
            Item(("chest",), 1, 1, 0.4),
            Item(("desk", "coffee_table"), 1, 1, 0.6),
            Item(("chair", "armchair"), 1, 2, 0.6),
            Item(("procedural_rug", "rug"), 1, 1, 0.6),
            *_EXTRAS,
            Item(("floor_lamp",), 1, 1, 0.2),
            Item(("table_lamp",), 1, 2, 0.8),
            Item(("computer", "television"), 1, 1, 0.3),
            Item(("plant_small",), 1, 1, 0.3),
            Item(("table_object",), 1, 6),
            Item(("ceiling_lamp", "ceiling_fan"), 1, 1, 0.3),
        ),
    ),
    "Kitchen": Recipe(
        (3.0, 5.2),
        (3.2, 5.6),
        ("tiles", "tiles", "checker", "planks", "marble"),
        ("plain", "plain", "plaster", "tiles", "tiles", "brick"),
        (
            *_OPENINGS,
            Item(("fridge",), 1, 1, 0.9),
            Item(("cooker",), 1, 2),
            Item(("kitchen_unit",), 2, 5),
            Item(("kitchen_wall_unit",), 1, 3, 0.9),
            Item(("hood",), 1, 1, 0.5),
            Item(("dining_table",), 1, 1, 0.95),
            Item(("chair",), 1, 4, 0.7),
            Item(("bar_stool",), 1, 2, 0.5),
            Item(("shelf",), 1, 1, 0.3),
            Item(("water_heater",), 1, 1, 0.25),
            Item(("wall_object",), 1, 2, 0.4),
            Item(("radiator",), 1, 1, 0.3),
            Item(("rug",), 1, 1, 0.3),
            Item(("floor_object",), 1, 1, 0.4),
            Item(("kitchen_device",), 1, 4),
            Item(("plant_small",), 1, 1, 0.3),
            Item(("table_object",), 2, 8),
            Item(("ceiling_lamp",), 1, 1, 0.3),
        ),
    ),
    "Office": Recipe(
        (3.2, 5.6),
        (3.6, 6.2),
        ("carpet", "carpet", "planks", "tiles"),
        ("plain", "plain", "plaster", "brick"),
        (
            *_OPENINGS,
            Item(("desk",), 2, 3),
            Item(("shelf",), 1, 2, 0.9),
            Item(("chest",), 1, 1, 0.4),
            Item(("desk_chair",), 1, 2),
            Item(("sofa", "armchair"), 1, 1, 0.3),
            Item(("chair",), 1, 2, 0.4),
            Item(("water_cooler",), 1, 1, 0.2),
            Item(("procedural_rug",), 1, 1, 0.2),
            *_EXTRAS,
            Item(("computer",), 1, 4),
            Item(("table_lamp",), 1, 2, 0.6),
            Item(("plant_small",), 1, 1, 0.5),
            Item(("table_object",), 1, 4),
            Item(("ceiling_lamp",), 1, 2, 0.3),
        ),
    ),
    "Bathroom": Recipe(
        (2.6, 4.0),
        (2.8, 4.6),
        ("tiles", "tiles", "checker", "marble"),
        ("tiles", "tiles", "plain", "marble"),
        (
            Item(("door",), 1, 1),
            Item(("window",), 1, 1, 0.5),
            Item(("bath",), 1, 1, 0.85),
            Item(("washbasin",), 1, 2),
            Item(("toilet",), 1, 2),
            Item(("cooker",), 1, 1, 0.3),
            Item(("chest", "shelf"), 1, 1, 0.5),
            Item(("radiator",), 1, 1, 0.6),
            Item(("water_heater",), 1, 1, 0.4),
            Item(("wall_object", "painting"), 1, 1, 0.4),
            Item(("rug", "procedural_rug"), 1, 1, 0.7),
            Item(("plant_large", "floor_object"), 1, 1, 0.5),
            Item(("bathroom_object",), 1, 3),
            Item(("ceiling_lamp",), 1, 1, 0.2),
        ),
    ),
}
