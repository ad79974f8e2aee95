"""From a model's name and category to its kind (how it is placed) and its class (what the label says)."""

from __future__ import annotations

import re
from dataclasses import dataclass

# The ids of the rooms set, in their order; `mt_adapters.data.rooms.ROOMS_CLASSES` is the same list.
CLASSES: tuple[str, ...] = (
    "void",
    "wall",
    "floor",
    "ceiling",
    "window",
    "door",
    "bed",
    "sofa",
    "chair",
    "table",
    "storage",
    "appliance",
    "electronics",
    "lamp",
    "plant",
    "picture",
    "rug",
    "objects",
)


@dataclass(frozen=True)
class Rule:
    """Models whose name matches `names` are of `kind`; categories None means any category that belongs indoors."""

    kind: str
    semantic_class: str
    names: str
    categories: tuple[str, ...] | None = None
    # Bounds on the catalogue's height in metres tell, say, a standing lamp from one for the table.
    min_height: float = 0.0
    max_height: float = 99.0


INDOOR = ("Bathroom", "Bedroom", "Doors and windows", "Kitchen", "Lights", "Living room", "Miscellaneous", "Office")
# Too large, for a garden or a workshop, worn by people, or flat on the ground: none of these furnishes a room.
LEFT_OUT = re.compile(
    r"elevator|garage|shutter|railing|chimney|container|cone|porch|lamppost|street|park |flashlight|camping|outdoor"
    r"|stone lantern|mower|furnace|fence|sleeping|screen door|escalator|staircase|barrel|pallet|fitness|contemporary"
    r"|sidewalk|window blind|dress$|short$|trousers|jacket|skirt|socket$|watch|ring$|glove|hanging clothes|urinal"
    r"|wood logs|shower|smoke|tatami|wall hanger|cctv|surveillance|toilet paper|number lock|emergency|chandelier",
    re.IGNORECASE,
)

# The first rule that matches decides, so special names stand above general ones.
RULES: tuple[Rule, ...] = (
    Rule("window", "window", r"window", ("Doors and windows",)),
    Rule("door", "door", r"door", ("Doors and windows",)),
    Rule("curtain", "window", r"curtain"),
    Rule("picture_small", "picture", r"^frame "),
    Rule("bedside", "table", r"bedside"),
    Rule("desk_chair", "chair", r"chair", ("Office",)),
    Rule("desk", "table", r"desk(?! lamp)|table", ("Office",)),
    Rule("bed", "bed", r"\bbed\b|bunk|crib|futon(?! couch)|mattress", ("Bedroom",)),
    Rule("sofa", "sofa", r"sofa|couch"),
    Rule("armchair", "chair", r"armchair|puff|ottoman|wheelchair"),
    Rule("bar_stool", "chair", r"bar chair|bar stool|high chair|stool", ("Kitchen", "Living room"), min_height=0.7),
    Rule("chair", "chair", r"chair|stool|bench(?! press)|seat", ("Kitchen", "Living room", "Office")),
    Rule("television", "electronics", r"^tv(?! stand| remote)|wall flat tv"),
    Rule("tv_stand", "storage", r"tv stand|television cabinet"),
    Rule("computer", "electronics", r"laptop|imac|ibook|tablet|printer|\bphone|projector"),
    Rule("hifi", "electronics", r"stereo|speaker|radio|mp3|playstation|dvd|joystick|remote control|camera|headphones"),
    Rule("kitchen_wall_unit", "storage", r"upper .*cabinet|glass door cabinet|upper cabinet", ("Kitchen",)),
    Rule("hood", "appliance", r"hood", ("Kitchen",)),
    Rule("fridge", "appliance", r"fridge|refrigerator|freezer"),
    Rule("kitchen_unit", "storage", r"cabinet|island", ("Kitchen",)),
    Rule("kitchen_unit", "storage", r"^sink", ("Kitchen",)),
    Rule("cooker", "appliance", r"oven|stove|washing machine|dryer", ("Kitchen",), min_height=0.5),
    Rule(
        "kitchen_device",
        "appliance",
        r"microwave|toaster|mixer|coffee (?:brewer|maker|machine)|fryer|oven|blender|boiler|grill|cooker$|squeezer"
        r"|sandwich|scale",
        ("Kitchen",),
        min_height=0.03,
    ),
    Rule("coffee_table", "table", r"table(?! lamp| fan| tennis)", ("Living room", "Bedroom"), max_height=0.62),
    Rule("games_table", "table", r"pool table|football table|table tennis$|flipper", ("Miscellaneous",)),
    Rule("dining_table", "table", r"table(?! lamp| fan| tennis)|workbench", ("Living room", "Bedroom")),
    Rule("wardrobe", "storage", r"wardrobe|cupboard|clothes rack|doll house", ("Bedroom",)),
    Rule("toilet", "appliance", r"toilets? unit|bidet", ("Bathroom",)),
    Rule("bath", "appliance", r"\bbath$|bathtub", ("Bathroom",)),
    Rule("washbasin", "appliance", r"washbasin|vanity|lavatory|basin", ("Bathroom",)),
    Rule("water_heater", "appliance", r"water heater|air conditioning - internal", ("Miscellaneous",)),
    Rule("radiator", "appliance", r"radiator"),
    Rule("water_cooler", "appliance", r"water cooler"),
    Rule("shelf", "storage", r"bookcase|shelves|storage|cabinet|dresser|changing|locker$|fireplace", min_height=0.6),
    Rule("shelf", "storage", r"^box$", ("Living room", "Office"), min_height=0.6),
    Rule("chest", "storage", r"^chest$|trunck|cabinet|box$|safe|crate|locker|basket", min_height=0.25),
    Rule("ceiling_fan", "lamp", r"ceiling fan"),
    Rule("ceiling_lamp", "lamp", r"ceiling|hanging|pendant|fluorescent|track|^lamp$", ("Lights",), 0.02, 0.9),
    Rule("wall_lamp", "lamp", r"wall", ("Lights",)),
    Rule("floor_lamp", "lamp", r"lamp", ("Lights",), min_height=0.9),
    Rule("table_lamp", "lamp", r"lamp|candle|lantern", ("Lights",), max_height=0.9),
    Rule("rug", "rug", r"carpet|rug$|doormat|bathmat"),
    Rule("plant_large", "plant", r"plant|yucca|ficus|spathi|tree|bamboo|bonsai", ("Living room",), min_height=0.6),
    Rule(
        "plant_small",
        "plant",
        r"plant|cactus|bamboo|bonsai|flowers|tulip|lily|orchid|tree|spathi",
        ("Living room",),
        max_height=0.6,
    ),
    Rule("wall_object", "objects", r"switch|plug|socket|intercom|cuckoo|dart|towel rack|calendar"),
    Rule("piano", "objects", r"piano$", ("Living room",)),
    Rule(
        "floor_object",
        "objects",
        r"guitar|umbrella|treadmill|bike|fan$|ladder|punching|suitcase|dustbin|trash|recycling|extinguisher"
        r"|clothes horse|barrel|rocking horse|toy|backpack|vase|ball$|cardboard|broom|potty|gift|aquarium",
        min_height=0.2,
    ),
    Rule(
        "bathroom_object",
        "objects",
        r"bottle|soap|sponge|brush|towel|flacon|pot$|comb|medicine|lip stick",
        ("Bathroom",),
    ),
    Rule("table_object", "objects", r".", ("Kitchen", "Bedroom", "Office", "Miscellaneous", "Living room")),
)
_COMPILED = tuple((rule, re.compile(rule.names, re.IGNORECASE)) for rule in RULES)
# A "table object" that is larger than this, in metres, matched no rule because it belongs elsewhere.
LARGEST_TABLE_OBJECT = 0.55


def classify(name: str, category: str, size: tuple[float, float, float]) -> Rule | None:
    """The rule for a model of `size` (width, height, depth) in metres, or None if it does not furnish a room."""
    if category not in INDOOR or LEFT_OUT.search(name):
        return None
    for rule, pattern in _COMPILED:
        in_category = rule.categories is None or category in rule.categories
        if in_category and rule.min_height <= size[1] <= rule.max_height and pattern.search(name):
            too_large = rule.kind == "table_object" and max(size) > LARGEST_TABLE_OBJECT
            return None if too_large else rule
    return None
