"""Where a room is looked at from: free of furniture, at the height of eyes, with something to see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .layout import Room

FOV_DEGREES = (50.0, 80.0)
EYE_HEIGHT = (1.1, 1.9)  # metres
WALL_DISTANCE = 0.3
FURNITURE_DISTANCE = 0.25
# A look at the rooms set: the nearest thing is seldom closer than 0.5 m, and its median depth seldom below 1.6 m.
MIN_DEPTH = 0.45
MIN_MEDIAN_DEPTH = 1.6
MIN_FURNITURE_SHARE = 0.12
NUM_TRIES = 80
NUM_PROBES = 13  # rays along each side of the frame


@dataclass(frozen=True)
class Camera:
    """Position in metres; rows of `axes` are right, up and backward (towards the camera) in the room's frame."""

    position: np.ndarray
    axes: np.ndarray
    fov_degrees: float  # horizontal; frames are square

    def rays(self, size: int) -> np.ndarray:
        """Unit directions through the centres of the pixels (size, size, 3), in the room's frame."""
        tangent = np.tan(np.radians(self.fov_degrees) / 2)
        at = ((np.arange(size) + 0.5) / size * 2 - 1) * tangent
        local = np.stack(np.broadcast_arrays(at[None, :], -at[:, None], -1.0), axis=-1)
        return local / np.linalg.norm(local, axis=-1, keepdims=True) @ self.axes


def make_cameras(room: Room, num_views: int, rng: np.random.Generator) -> list[Camera]:
    """Up to `num_views` cameras: fewer in a room too crowded to stand in."""
    cameras = []
    for _ in range(num_views):
        for _ in range(NUM_TRIES):
            camera = _propose(room, rng)
            if is_free(room, camera.position) and _is_worth_it(room, camera):
                cameras.append(camera)
                break
    return cameras


def is_free(room: Room, position: np.ndarray) -> bool:
    """Whether a point is in the room and clear of its walls and furniture."""
    inside = (position > WALL_DISTANCE).all() and (position < np.array(room.size) - WALL_DISTANCE).all()
    boxes = _boxes(room)
    near = ((position > boxes[:, 0] - FURNITURE_DISTANCE) & (position < boxes[:, 1] + FURNITURE_DISTANCE)).all(axis=1)
    return bool(inside and not near.any())


def look(position: np.ndarray, target: np.ndarray, fov_degrees: float) -> Camera:
    """An upright camera that looks at a point which is not straight above or below."""
    backward = (position - target) / np.linalg.norm(position - target)
    right = np.cross([0.0, 1.0, 0.0], backward)
    right /= np.linalg.norm(right)
    return Camera(position, np.stack([right, np.cross(backward, right), backward]), fov_degrees)


def box_distances(origin: np.ndarray, directions: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Distance from `origin` along unit `directions` (N, 3) to each box (M, 2, 3); inf where it is missed. (N, M)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        to_planes = (boxes[None] - origin) / directions[:, None, None, :]
    enters, leaves = to_planes.min(axis=2).max(axis=2), to_planes.max(axis=2).min(axis=2)
    return np.where((enters <= leaves) & (leaves > 0), np.maximum(enters, 0), np.inf)


def _boxes(room: Room) -> np.ndarray:
    return np.stack([placement.box for placement in room.placements] or [np.full((2, 3), -1.0)])


def _propose(room: Room, rng: np.random.Generator) -> Camera:
    width, height, length = room.size
    position = rng.uniform([WALL_DISTANCE, 0, WALL_DISTANCE], [width - WALL_DISTANCE, 0, length - WALL_DISTANCE])
    position[1] = rng.uniform(EYE_HEIGHT[0], min(EYE_HEIGHT[1], height - 0.5))
    standing = [p for p in room.placements if p.position[1] < 1.0 and p.size[1] > 0.2]
    if standing and rng.random() < 0.8:
        target = standing[int(rng.integers(len(standing)))].box.mean(axis=0) + rng.normal(0, 0.3, size=3)
    else:
        target = rng.uniform([0, 0.5, 0], [width, 1.5, length])
    away = target - position
    # A little lower than the target, between looking well down and hardly up: floors are seen more than ceilings.
    reach = max(np.hypot(away[0], away[2]), 0.2)
    away[1] = np.clip(away[1] - 0.07 * reach, -0.7 * reach, 0.08 * reach)
    return look(position, position + away + [1e-6, 0, 1e-6], float(rng.uniform(*FOV_DEGREES)))


def _is_worth_it(room: Room, camera: Camera) -> bool:
    """Judged by rays against the furniture's boxes."""
    rays = camera.rays(NUM_PROBES).reshape(-1, 3)
    distance = box_distances(camera.position, rays, _boxes(room))
    furniture = np.isfinite(distance).any(axis=1)
    num_seen = len(np.unique(distance.argmin(axis=1)[furniture]))
    to_walls = np.where(rays > 0, np.array(room.size) - camera.position, -camera.position) / rays
    depth = np.minimum(distance.min(axis=1), to_walls.min(axis=1)) * -(rays @ camera.axes[2])
    return bool(
        depth.min() > MIN_DEPTH
        and np.median(depth) > MIN_MEDIAN_DEPTH
        and furniture.mean() > MIN_FURNITURE_SHARE
        and num_seen >= 2
    )
