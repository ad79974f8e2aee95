"""A random room: its size, its surfaces and light, and furniture that neither overlaps nor leaves it.

Frame: x along the width, y up, z along the length; the room fills [0, width] x [0, height] x [0, length] metres. A
placement's yaw turns a model's front from +z towards +x.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from .furniture import FurnitureModel
from .recipes import PLACED, PROCEDURAL, RECIPES, ROOM_TYPES

Size = tuple[float, float, float]
# Position, yaw and size of a piece.
Spot = tuple[np.ndarray, float, Size]

LIGHTS = ("random", "daylight", "lamps")
NUM_TRIES = 40
WALL_GAP = 0.01  # metres; two surfaces in one plane would flicker
DOOR_CLEARANCE = 0.8
HIGHEST_BASE = 1.5
WINDOW_THICKNESS = 0.1
# Nothing that hangs may reach the height of a head.
LOWEST_HANGING = 1.9


@dataclass(frozen=True)
class Placement:
    """A piece of furniture: position is the middle of its base, size its width, height and depth, in metres."""

    kind: str
    semantic_class: str
    model: FurnitureModel | None  # None = procedural
    size: Size
    position: Size
    yaw: float  # radians
    seed: int  # of its colours and textures

    @property
    def box(self) -> np.ndarray:
        """Lowest and highest corner (2, 3) of the box along the axes that holds it."""
        width, height, depth = self.size
        cosine, sine = abs(np.cos(self.yaw)), abs(np.sin(self.yaw))
        half = np.array([width * cosine + depth * sine, 0, width * sine + depth * cosine]) / 2
        return np.stack([self.position - half, self.position + half + [0, height, 0]])


@dataclass
class Room:
    name: str
    room_type: str
    size: Size  # width, height, length in metres
    floor: str
    walls: tuple[str, str, str, str]
    light: str
    seed: int
    placements: list[Placement] = field(default_factory=list)


def make_room(seed: int, number: int, models: list[FurnitureModel], light: str = "random") -> Room:
    """Room `number` of the recipe `seed`; the same arguments give the same room.

    Raises:
        ValueError: unknown light.
    """
    if light not in LIGHTS:
        raise ValueError(f"Unknown light {light!r}; there is: {', '.join(LIGHTS)}.")
    rng = np.random.default_rng([seed, number])
    shares = np.array(list(ROOM_TYPES.values()))
    room_type = str(rng.choice(list(ROOM_TYPES), p=shares / shares.sum()))
    recipe = RECIPES[room_type]
    size = (rng.uniform(*recipe.width), rng.uniform(2.35, 2.9), rng.uniform(*recipe.length))
    main_wall, accent = rng.choice(recipe.walls, size=2)
    accent_wall = rng.integers(4) if rng.random() < 0.35 else -1
    drawn_light = str(rng.choice(["daylight", "lamps", "both"], p=[0.35, 0.35, 0.3]))
    room = Room(
        name=f"r{seed:03d}_{number:04d}",
        room_type=room_type,
        size=size,
        floor=str(rng.choice(recipe.floors)),
        walls=tuple(str(accent if wall == accent_wall else main_wall) for wall in range(4)),
        light=drawn_light if light == "random" else light,
        seed=int(rng.integers(2**31)),
    )
    layout = _Layout(room, rng, models)
    layout.add("panel", int(rng.integers(1, 4)))
    for item in recipe.items:
        if rng.random() < item.chance:
            count = int(rng.integers(item.low, item.high + 1))
            for kind in rng.choice(item.kinds, size=count):
                layout.add(str(kind), 1)
    return room


def overlap(box: np.ndarray, others: np.ndarray) -> bool:
    """Whether a box (2, 3) shares volume with one of the boxes (N, 2, 3)."""
    return bool(((box[0] < others[:, 1]) & (box[1] > others[:, 0])).all(axis=1).any())


class _Layout:
    """Places pieces one by one; a method named in `PLACED` proposes where, `_fits` decides."""

    def __init__(self, room: Room, rng: np.random.Generator, models: list[FurnitureModel]) -> None:
        self.room, self.rng = room, rng
        self.by_kind: dict[str, list[FurnitureModel]] = defaultdict(list)
        for model in models:
            self.by_kind[model.kind].append(model)
        # Boxes that are kept free, such as the floor before a door.
        self.kept_free: list[np.ndarray] = []

    def add(self, kind: str, count: int) -> None:
        """Adds up to `count` pieces of a kind; one that fits nowhere, or has no model, is left out."""
        propose = getattr(self, PLACED[kind])
        for _ in range(count):
            for _ in range(NUM_TRIES):
                model = self._choose(kind)
                if model is None and kind not in PROCEDURAL:
                    return
                size = self._draw_size(kind) if model is None else (model.width, model.height, model.depth)
                semantic_class = PROCEDURAL[kind] if model is None else model.semantic_class
                spot = propose(kind, size, model)
                if spot is None:
                    continue
                position, yaw, size = spot
                seed = int(self.rng.integers(2**31))
                placement = Placement(kind, semantic_class, model, size, tuple(map(float, position)), yaw, seed)
                if self._fits(placement):
                    self.room.placements.append(placement)
                    break

    def _choose(self, kind: str) -> FurnitureModel | None:
        candidates = self.by_kind[kind]
        return candidates[int(self.rng.integers(len(candidates)))] if candidates else None

    def _draw_size(self, kind: str) -> Size:
        if kind == "panel":
            return (self.rng.uniform(0.3, 1.2), 0.02, self.rng.uniform(0.3, 0.6))
        if kind == "painting":
            return (self.rng.uniform(0.3, 1.1), self.rng.uniform(0.3, 0.8), 0.03)
        return (self.rng.uniform(0.8, 2.4), 0.012, self.rng.uniform(0.6, 1.7))

    def _fits(self, placement: Placement) -> bool:
        box = placement.box
        if (box[0] < -1e-6).any() or (box[1] > np.array(self.room.size) + 1e-6).any():
            return False
        # Rugs are walked and stood on, so they only keep off each other.
        rug = placement.semantic_class == "rug"
        boxes = [other.box for other in self.room.placements if (other.semantic_class == "rug") == rug]
        boxes += [] if rug else self.kept_free
        return not boxes or not overlap(box, np.stack(boxes))

    # Proposals: position, yaw and size, or None when there is nowhere to try.

    def against_wall(self, kind: str, size: Size, model: FurnitureModel | None) -> Spot | None:
        """The back at a wall, on the floor or at the height of the catalogue."""
        elevation = model.elevation if model and kind == "washbasin" else 0.0
        if kind == "bedside" and self.rng.random() < 0.8:
            beds = [p for p in self.room.placements if p.kind == "bed"]
            if beds:
                return self._beside(beds[0], size)
        # Kitchen units stand side by side: half of the tries continue the row of the last one.
        rows = [p for p in self.room.placements if p.kind in ("kitchen_unit", "cooker", "fridge")]
        if kind in ("kitchen_unit", "cooker") and rows and self.rng.random() < 0.8:
            return self._beside(rows[int(self.rng.integers(len(rows)))], size)
        return self._at_wall(size, elevation)

    def in_wall(self, kind: str, size: Size, model: FurnitureModel | None) -> Spot | None:
        """Doors and windows, as thin as a frame; the floor before a door is kept free."""
        elevation = model.elevation if model else 0.0
        width, height, depth = size
        height = min(height, self.room.size[1] - elevation - 0.05)
        size = (width, height, min(depth, WINDOW_THICKNESS) if kind != "radiator" else depth)
        position, yaw, size = self._at_wall(size, elevation)
        if kind == "door" and self._fits(Placement(kind, "door", model, size, tuple(position), yaw, seed=0)):
            ahead = _direction(yaw) * (size[2] / 2 + WALL_GAP + DOOR_CLEARANCE / 2)
            free = (size[0], size[1], DOOR_CLEARANCE)
            self.kept_free.append(Placement(kind, "door", None, free, tuple(position + ahead), yaw, seed=0).box)
        return position, yaw, size

    def on_wall(self, kind: str, size: Size, model: FurnitureModel | None) -> Spot | None:
        """Hung at the catalogue's height, or at the height of the eyes."""
        low, high = {"painting": (1.1, 1.6), "wall_lamp": (1.5, 1.9), "hood": (1.5, 1.8)}.get(kind, (1.0, 1.6))
        elevation = model.elevation if model and model.elevation > 0 else self.rng.uniform(low, high)
        return self._at_wall(size, min(elevation, self.room.size[1] - size[1] - 0.02))

    def under_ceiling(self, kind: str, size: Size, model: FurnitureModel | None) -> Spot | None:
        height = self.room.size[1]
        if height - size[1] < LOWEST_HANGING and kind != "panel":
            size = (size[0], height - LOWEST_HANGING, size[2])
        return self._inside(size, height - size[1] - 1e-3, yaw=self._right_angle())

    def in_the_middle(self, kind: str, size: Size, model: FurnitureModel | None) -> Spot | None:
        """On the floor; half of the coffee tables stand before a sofa."""
        sofas = [p for p in self.room.placements if p.kind == "sofa"]
        if kind == "coffee_table" and sofas and self.rng.random() < 0.6:
            sofa = sofas[int(self.rng.integers(len(sofas)))]
            gap = (sofa.size[2] + size[2]) / 2 + self.rng.uniform(0.3, 0.5)
            return np.array(sofa.position) + _direction(sofa.yaw) * gap, sofa.yaw, size
        return self._inside(size, 0.0, self._right_angle(), margin=0.3)

    def anywhere(self, kind: str, size: Size, model: FurnitureModel | None) -> Spot | None:
        return self._inside(size, 0.0, self.rng.uniform(-np.pi, np.pi), margin=0.02)

    def on_floor(self, kind: str, size: Size, model: FurnitureModel | None) -> Spot | None:
        return self._inside((size[0], max(size[1], 0.01), size[2]), 0.0, self._right_angle(), margin=0.1)

    def at_table(self, kind: str, size: Size, model: FurnitureModel | None) -> Spot | None:
        """Facing a side of a table or a desk, a little turned, in two of three cases."""
        tables = [p for p in self.room.placements if p.kind in ("dining_table", "desk")]
        if not tables or self.rng.random() < 0.33:
            return self._inside(size, 0.0, self.rng.uniform(-np.pi, np.pi), margin=0.05)
        table = tables[int(self.rng.integers(len(tables)))]
        side = 0.0 if table.kind == "desk" else self.rng.choice([0, 0.5, 1, 1.5]) * np.pi
        direction = table.yaw + side
        ahead = _direction(direction)
        long, short = (table.size[0], table.size[2]) if side % np.pi == 0 else (table.size[2], table.size[0])
        along = _direction(direction + np.pi / 2) * self.rng.uniform(-0.35, 0.35) * long
        position = np.array(table.position) + ahead * (short / 2 + size[2] / 2 + self.rng.uniform(0.08, 0.3)) + along
        return position, direction + np.pi + self.rng.normal(0, 0.15), size

    def on_top(self, kind: str, size: Size, model: FurnitureModel | None) -> Spot | None:
        """On a table, or on low storage; a television prefers its stand."""
        wanted = ("table", "storage") if kind != "bathroom_object" else ("table", "storage", "appliance")
        bases = [p for p in self.room.placements if p.semantic_class in wanted and _is_base(p)]
        stands = [p for p in bases if p.kind == "tv_stand"]
        if kind == "television" and stands:
            bases = stands
        if not bases:
            return None
        base = bases[int(self.rng.integers(len(bases)))]
        free = (np.array(base.size) - np.array(size))[[0, 2]] / 2 - 0.02
        if (free < 0).any():
            return None
        right, ahead = self.rng.uniform(-1, 1, size=2) * free
        offset = _direction(base.yaw + np.pi / 2) * right + _direction(base.yaw) * ahead + [0, base.size[1] + 1e-3, 0]
        return np.array(base.position) + offset, base.yaw + self.rng.normal(0, 0.25), size

    def _at_wall(self, size: Size, elevation: float) -> Spot:
        """The back at a random place of a random wall."""
        width, _, length = self.room.size
        wall = int(self.rng.integers(4))
        yaw = wall * np.pi / 2
        wall_length = width if wall % 2 == 0 else length
        half = size[0] / 2 + WALL_GAP
        along = self.rng.uniform(half, wall_length - half) if wall_length > 2 * half else wall_length / 2
        inward = size[2] / 2 + WALL_GAP
        x, z = [(along, inward), (inward, along), (along, length - inward), (width - inward, along)][wall]
        return np.array([x, elevation, z]), yaw, size

    def _beside(self, other: Placement, size: Size) -> Spot:
        """At the same wall as `other`, to its left or right."""
        side = self.rng.choice([-1, 1]) * ((other.size[0] + size[0]) / 2 + 2e-3)
        back = (size[2] - other.size[2]) / 2
        position = np.array(other.position) + _direction(other.yaw + np.pi / 2) * side + _direction(other.yaw) * back
        return position * [1, 0, 1], other.yaw, size

    def _inside(self, size: Size, base: float, yaw: float, margin: float = 0.05) -> Spot:
        """Anywhere, at least `margin` metres off the walls."""
        reach = np.array([size[0], size[2]]).max() / 2 + margin
        low, high = np.minimum(reach, self.centre), np.maximum(2 * self.centre - reach, self.centre)
        x, z = self.rng.uniform(low, high)
        return np.array([x, base, z]), yaw, size

    def _right_angle(self) -> float:
        return int(self.rng.integers(4)) * np.pi / 2

    @property
    def centre(self) -> np.ndarray:
        """Middle of the floor (x, z)."""
        return np.array([self.room.size[0], self.room.size[2]]) / 2


def _direction(yaw: float) -> np.ndarray:
    return np.array([np.sin(yaw), 0.0, np.cos(yaw)])


def _is_base(placement: Placement) -> bool:
    """Whether things can stand on its top: no taller than the eyes, and the catalogue names no lower surface."""
    if placement.model is None or placement.size[1] > HIGHEST_BASE:
        return False
    return placement.model.top == 0 or placement.model.top > placement.size[1] - 0.02
