"""Procedural textures: pictures that repeat without a seam, made from a random generator and a few colours.

Every function returns sRGB uint8 (H, W, 3); `TEXTURE_METRES` is the length of one side in the room.
"""

from __future__ import annotations

import colorsys

import numpy as np

Colour = tuple[float, float, float]
SIZE = 256
TEXTURE_METRES = {
    "plain": 1.0,
    "plaster": 2.0,
    "carpet": 1.0,
    "planks": 1.6,
    "tiles": 1.2,
    "checker": 1.0,
    "marble": 2.0,
    "brick": 1.0,
    "stripes": 0.8,
    "wood": 0.8,
    "fabric": 0.25,
    "rug": 1.0,
    "canvas": 1.0,
    "outdoors": 1.0,
}


def hsv(hue: float, saturation: float, value: float) -> Colour:
    return colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(max(value, 0), 1))


def wall_colour(rng: np.random.Generator) -> Colour:
    """A light pastel or an off-white, as on most walls."""
    return hsv(rng.random(), rng.uniform(0.02, 0.3), rng.uniform(0.72, 0.95))


def wood_colour(rng: np.random.Generator) -> Colour:
    return hsv(rng.uniform(0.05, 0.11), rng.uniform(0.25, 0.65), rng.uniform(0.3, 0.8))


def furniture_colour(rng: np.random.Generator) -> Colour:
    """Off-white, grey or dark for two in five, otherwise any hue."""
    if rng.random() < 0.4:
        return hsv(rng.random(), rng.uniform(0, 0.12), rng.choice([0.15, 0.35, 0.6, 0.85, 0.92]))
    return hsv(rng.random(), rng.uniform(0.15, 0.6), rng.uniform(0.35, 0.85))


def noise(rng: np.random.Generator, scale_u: float, scale_v: float) -> np.ndarray:
    """Smooth periodic noise (SIZE, SIZE), mean 0, deviation 1; scales are the size of its blobs in pixels."""
    frequency = np.fft.fftfreq(SIZE)
    envelope = np.exp(-2 * ((frequency[None, :] * scale_u) ** 2 + (frequency[:, None] * scale_v) ** 2) * 4)
    field = np.fft.ifft2(np.fft.fft2(rng.standard_normal((SIZE, SIZE))) * envelope).real
    return (field - field.mean()) / max(field.std(), 1e-9)


def make_texture(name: str, rng: np.random.Generator, colour: Colour) -> np.ndarray:
    """The texture `name` of `TEXTURE_METRES` in a colour."""
    shade = _SHADES[name](rng, np.array(colour))
    return (np.clip(shade, 0, 1) * 255 + 0.5).astype(np.uint8)


def _tint(colour: np.ndarray, brightness: np.ndarray) -> np.ndarray:
    return colour * brightness[..., None]


def _plain(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    return _tint(colour, 1 + 0.008 * noise(rng, 3, 3))


def _plaster(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    return _tint(colour, 1 + 0.03 * noise(rng, 12, 12) + 0.02 * noise(rng, 2, 2))


def _carpet(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    return _tint(colour, 1 + 0.1 * noise(rng, 1, 1) + 0.05 * noise(rng, 6, 6))


def _planks(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    """Boards along u, eight in a texture, each with its own tone, grain and joints."""
    num_boards = 8
    width = SIZE // num_boards
    brightness = 1 + 0.07 * noise(rng, 40, 1.5) + 0.04 * noise(rng, 8, 1)
    for board in range(num_boards):
        rows = slice(board * width, (board + 1) * width)
        joint = rng.integers(SIZE)
        half = SIZE // 2
        tones = rng.uniform(0.82, 1.12, size=2)
        columns = (np.arange(SIZE) - joint) % SIZE
        brightness[rows] *= np.where(columns < half, *tones)
        brightness[rows, joint] *= 0.6
        brightness[rows, (joint + half) % SIZE] *= 0.6
        brightness[board * width] *= 0.6
    return _tint(colour, brightness)


def _tiles(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    """Square tiles with light or dark joints."""
    num_tiles = int(rng.choice([2, 4, 4, 8]))
    tones = rng.uniform(0.9, 1.06, size=(num_tiles, num_tiles)).repeat(SIZE // num_tiles, 0)
    picture = _tint(colour, tones.repeat(SIZE // num_tiles, 1) + 0.03 * noise(rng, 8, 8))
    at = np.arange(SIZE) % (SIZE // num_tiles) < 3
    picture[at[:, None] | at[None, :]] = colour * rng.choice([0.6, 1.15])
    return picture


def _checker(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    cell = np.arange(SIZE) // (SIZE // 4)
    odd = (cell[:, None] + cell[None, :]) % 2 == 1
    other = colour * rng.uniform(0.1, 0.35)
    return np.where(odd[..., None], other, colour) * (1 + 0.02 * noise(rng, 8, 8))[..., None]


def _marble(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    """Veins lie where smooth noise passes zero."""
    veins = np.exp(-np.abs(noise(rng, 22, 22)) * 14) + 0.5 * np.exp(-np.abs(noise(rng, 10, 10)) * 14)
    return _tint(colour, 1 + 0.03 * noise(rng, 20, 20) - 0.3 * veins)


def _brick(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    """Twelve courses of four bricks in running bond."""
    num_rows, num_columns = 12, 4
    row = np.arange(SIZE) * num_rows // SIZE
    along = (np.arange(SIZE)[None, :] + (row[:, None] % 2) * SIZE // (2 * num_columns)) % SIZE
    column = along * num_columns // SIZE
    tone = rng.uniform(0.7, 1.15, size=(num_rows, num_columns))[row[:, None], column]
    picture = _tint(colour, tone + 0.06 * noise(rng, 2, 2))
    in_row = np.arange(SIZE) * num_rows % SIZE < num_rows * 3
    picture[(along % (SIZE // num_columns) < 3) | in_row[:, None]] = (0.72, 0.7, 0.66)
    return picture


def _stripes(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    odd = (np.arange(SIZE) // (SIZE // int(rng.choice([4, 8, 16])))) % 2 == 1
    other = colour * rng.uniform(0.75, 0.92)
    return np.where(odd[None, :, None], other, colour) * (1 + 0.01 * noise(rng, 3, 3))[..., None]


def _wood(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    rings = np.sin(np.arange(SIZE)[:, None] / SIZE * 2 * np.pi * rng.integers(5, 12) + 2.5 * noise(rng, 50, 14))
    return _tint(colour, 1 + 0.08 * rings + 0.07 * noise(rng, 30, 1))


def _fabric(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    thread = np.sin(np.arange(SIZE) / SIZE * 2 * np.pi * 48)
    return _tint(colour, 1 + 0.05 * thread[None, :] * thread[:, None] + 0.06 * noise(rng, 2, 2))


def _rug(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    """Bands or frames in three colours; spread once over the whole rug."""
    palette = np.stack([colour, furniture_colour(rng), furniture_colour(rng)])
    ramp = np.minimum(np.arange(SIZE), SIZE - 1 - np.arange(SIZE)) / SIZE * 2
    across = np.minimum(ramp[:, None], ramp[None, :]) if rng.random() < 0.6 else np.tile(ramp, (SIZE, 1))
    edges = np.sort(rng.uniform(0.05, 0.8, size=int(rng.integers(2, 7))))
    picture = palette[np.searchsorted(edges, across) % 3]
    return picture * (1 + 0.08 * noise(rng, 1, 1))[..., None]


def _canvas(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    """An abstract painting: a few soft fields of colour inside a white border."""
    palette = np.stack([colour, furniture_colour(rng), furniture_colour(rng), furniture_colour(rng)])
    fields = np.stack([noise(rng, 40, 40) for _ in palette]).argmax(axis=0)
    picture = palette[fields] * (1 + 0.05 * noise(rng, 3, 1))[..., None]
    border = np.minimum(np.arange(SIZE), SIZE - 1 - np.arange(SIZE)) < SIZE * rng.uniform(0, 0.14)
    picture[border[:, None] | border[None, :]] = 0.93
    return picture


def _outdoors(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    """What a window shows, out of focus: sky above, greenery or houses below. Row 0 is the top."""
    horizon = SIZE * rng.uniform(0.5, 0.75) + 8 * noise(rng, 40, 400)
    below = np.clip((np.arange(SIZE)[:, None] - horizon) / 12, 0, 1)[..., None]
    sky = colour + (1 - colour) * np.linspace(0, 1, SIZE)[:, None, None] * 0.8
    ground = np.array(hsv(rng.uniform(0.15, 0.4), rng.uniform(0.1, 0.5), rng.uniform(0.25, 0.6)))
    return sky * (1 - below) + ground * below * (1 + 0.2 * noise(rng, 14, 14))[..., None]


_SHADES = {
    "plain": _plain,
    "plaster": _plaster,
    "carpet": _carpet,
    "planks": _planks,
    "tiles": _tiles,
    "checker": _checker,
    "marble": _marble,
    "brick": _brick,
    "stripes": _stripes,
    "wood": _wood,
    "fabric": _fabric,
    "rug": _rug,
    "canvas": _canvas,
    "outdoors": _outdoors,
}
