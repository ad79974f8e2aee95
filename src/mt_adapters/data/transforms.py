"""Joint geometry: the image and all its labels go through one crop, one resize and one flip.

NumPy and Pillow do the work: on maps this small the threads of torch cost more than they save.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mt_adapters.data.pictures import StoredLabel
from mt_adapters.tasks import Task

# How far a crop may be stretched on its way to the target's shape, as width over height.
STRETCH = (3 / 4, 4 / 3)
# Luma of red, green and blue, and the NTSC colour space YIQ (FCC, 1953; Y, I, Q in rows).
GREY = np.array([0.299, 0.587, 0.114])
RGB_TO_YIQ = np.array([GREY, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


class Box(NamedTuple):
    """A part of an image in continuous pixel coordinates: pixel i covers [i, i + 1)."""

    left: float
    top: float
    right: float
    bottom: float


class EvalTransform:
    """Resizes the whole image and its labels, and normalises the image.

    Called with a sample `{"image": uint8 (3, H, W) or a picture in RGB, "labels": {...}}` it returns
    `{"pixel_values": float32 (3, h, w), "labels": {task name: (..., h, w)}}`. A task whose label the sample lacks is
    absent from the result.

    Args:
        tasks: the tasks whose labels are wanted.
        size: (height, width) of the result in pixels.
        image_mean, image_std: per RGB channel, for an image in [0, 1].

    Raises:
        ValueError: a label whose height and width are not the image's.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        size: tuple[int, int],
        image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        if min(size) < 1:
            raise ValueError(f"size is {size}; it must be a positive (height, width) in pixels.")
        self.tasks = tuple(tasks)
        self.size = size
        self.image_mean = np.array(image_mean, dtype=np.float32)[:, None, None]
        self.image_std = np.array(image_std, dtype=np.float32)[:, None, None]

    def __call__(self, sample: Mapping[str, Any], rng: np.random.Generator | None = None) -> dict[str, Any]:
        """`rng` has no effect; it lets both transforms be called alike."""
        picture = as_picture(sample["image"])
        image, labels = self._resize(picture, sample["labels"], Box(0, 0, picture.width, picture.height))
        pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)).astype(np.float32) / 255
        return {"pixel_values": torch.from_numpy((pixels - self.image_mean) / self.image_std), "labels": labels}

    def _resize(
        self, picture: Image.Image, stored: Mapping[str, Any], box: Box, mirrored: bool = False
    ) -> tuple[Image.Image, dict[str, Tensor]]:
        """The box of the image, bilinear and antialiased, and of the labels, nearest."""
        height, width = self.size
        source_width, source_height = picture.size
        picture = picture.resize((width, height), Image.Resampling.BILINEAR, box=box)
        if mirrored:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

        # One grid for all labels: they show the same source pixels, also where rounding could go either way.
        rows = nearest_indices(box.top, box.bottom, height, source_height)
        columns = nearest_indices(box.left, box.right, width, source_width)
        columns = columns[::-1] if mirrored else columns
        labels = {}
        for task in self.tasks:
            if task.name not in stored:
                continue
            label = stored[task.name]
            label_size = label.size if isinstance(label, StoredLabel) else tuple(label.shape[-2:])
            if label_size != (source_height, source_width):
                raise ValueError(
                    f"The label {task.name!r} is {label_size}, but the image is {source_height} x "
                    f"{source_width}; labels must have the image's height and width."
                )
            # Ours: depth keeps its metres and normals their directions. A zoom narrows the field of view, it does not
            # bring the scene nearer.
            if isinstance(label, StoredLabel):
                value = label.decode(label.codes.take(rows, axis=0).take(columns, axis=1))
            else:
                value = torch.from_numpy(label.numpy().take(rows, axis=-2).take(columns, axis=-1))
            labels[task.name] = task.mirror_values(value) if mirrored else value
        return picture, labels


class TrainTransform(EvalTransform):
    """A random crop, resized, flipped and with its colours jittered; all randomness comes from the `rng` of the call.

    Input, result and errors are those of `EvalTransform`; the labels follow the crop and are mirrored with the image
    (`Task.mirror_values`).

    Args:
        tasks: the tasks whose labels are wanted.
        size: (height, width) of the result in pixels.
        scale: smallest and largest share of the image's area that is cropped, within (0, 1]. The crop is stretched by
            3/4 to 4/3, less where it would leave the image.
        flip: mirror every other sample left-right.
        color_jitter: largest relative change of brightness, contrast and saturation, and largest shift of the hue in
            turns (0 to 0.5). Zero switches one off.
        image_mean, image_std: per RGB channel, for an image in [0, 1].

    Example:
        >>> from mt_adapters.data import RoomsDataset
        >>> from mt_adapters.tasks import get_task
        >>> transform = TrainTransform([get_task("depth")], size=(96, 96))
        >>> sample = transform(RoomsDataset("train")[0], np.random.default_rng(0))
        >>> sample["pixel_values"].shape, sample["labels"]["depth"].shape
        (torch.Size([3, 96, 96]), torch.Size([96, 96]))
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        size: tuple[int, int],
        scale: tuple[float, float] = (0.5, 1.0),
        flip: bool = True,
        color_jitter: tuple[float, float, float, float] = (0.2, 0.2, 0.2, 0.1),
        image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        super().__init__(tasks, size, image_mean, image_std)
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale is {scale}; it must be (smallest, largest) share of the area, within (0, 1].")
        if not (all(0 <= strength <= 1 for strength in color_jitter[:3]) and 0 <= color_jitter[3] <= 0.5):
            raise ValueError(
                f"color_jitter is {color_jitter}; the first three strengths go from 0 to 1, the hue's to 0.5."
            )
        self.scale = scale
        self.flip = flip
        self.color_jitter = color_jitter

    def __call__(self, sample: Mapping[str, Any], rng: np.random.Generator | None = None) -> dict[str, Any]:
        if rng is None:
            raise ValueError(
                "TrainTransform needs a random generator: call transform(sample, np.random.default_rng(0))."
            )
        source = as_picture(sample["image"])
        box = self._random_box(source.height, source.width, rng)
        picture, labels = self._resize(source, sample["labels"], box, mirrored=self.flip and rng.random() < 0.5)
        # All four are drawn, whatever is switched off: the crops to come do not depend on the colour settings.
        change = rng.uniform(-1, 1, size=4) * self.color_jitter
        return {"pixel_values": self._jitter_and_normalize(picture, change), "labels": labels}

    def _random_box(self, height: int, width: int, rng: np.random.Generator) -> Box:
        share = rng.uniform(*self.scale)
        target_aspect = self.size[1] / self.size[0]
        # Outside these bounds a crop of this share would be wider or higher than the image.
        low, high = np.clip(np.multiply(STRETCH, target_aspect), share * width / height, width / height / share)
        aspect = np.exp(rng.uniform(np.log(low), np.log(high)))
        area = share * height * width
        crop_width = min(float(np.sqrt(area * aspect)), width)
        crop_height = min(float(np.sqrt(area / aspect)), height)
        left = rng.uniform(0, width - crop_width)
        top = rng.uniform(0, height - crop_height)
        return Box(left, top, min(left + crop_width, width), min(top + crop_height, height))

    def _jitter_and_normalize(self, picture: Image.Image, change: np.ndarray) -> Tensor:
        """(3,h,w) float32; `change` are those of brightness, contrast and saturation, and the shift of the hue."""
        width, height = picture.size
        # One column per pixel: what follows is one small matrix product over all of them.
        pixels = np.asarray(picture).reshape(-1, 3).astype(np.float32).T
        brightness, contrast, saturation = 1 + change[:3]
        saturate = saturation * np.eye(3) + (1 - saturation) * np.outer(np.ones(3), GREY)
        matrix = hue_rotation(2 * np.pi * change[3]) @ saturate * contrast * brightness
        offset = (1 - contrast) * brightness * (GREY.astype(np.float32) @ pixels).mean()
        mean, std = self.image_mean.reshape(3, 1) * 255, self.image_std.reshape(3, 1) * 255
        values = (matrix / std).astype(np.float32) @ pixels
        values += ((offset - mean) / std).astype(np.float32)
        # Clipped as colours from 0 to 255, after the normalisation that went into the matrix.
        np.clip(values, (-mean / std).astype(np.float32), ((255 - mean) / std).astype(np.float32), out=values)
        return torch.from_numpy(values.reshape(3, height, width))


def as_picture(image: Tensor | Image.Image) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.fromarray(image.permute(1, 2, 0).numpy())


def hue_rotation(angle: float) -> np.ndarray:
    """The matrix (3,3) on RGB that turns colours about the grey axis and keeps their luma, by an angle in radians.

    It turns the plane of chrominance of the YIQ space, and so stands for a shift of the hue by that angle.
    """
    turn = np.eye(3)
    turn[1:, 1:] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return np.linalg.inv(RGB_TO_YIQ) @ turn @ RGB_TO_YIQ


def nearest_indices(start: float, stop: float, num_target: int, num_source: int) -> np.ndarray:
    """Source pixels under the centres of `num_target` equal steps over [start, stop): int64 (num_target,)."""
    centres = start + (np.arange(num_target) + 0.5) * ((stop - start) / num_target)
    # Rounding may carry the last centre of a tiny crop onto the border itself.
    return np.floor(centres).astype(np.int64).clip(0, num_source - 1)
