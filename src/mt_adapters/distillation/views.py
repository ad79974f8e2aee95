"""Fixed random views of images with a teacher's features: computed once, kept in memory-mapped files.

The teacher is most of the cost of a distillation. Its features of a few views of every image are computed once; the
student then sees them many times over, with other colours each time.

Shapes: V views, B batch, C channels, h w size of a map, S side of the student's image.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import tqdm
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel

from mt_adapters.backbones import get_family
from mt_adapters.data import TrainTransform
from mt_adapters.distillation.images import Images
from mt_adapters.distillation.matching import feature_maps

STATE_FILE, IMAGE_FILE = "views.json", "images.npy"
# Batches between two notes of how far the files are filled.
FLUSH_INTERVAL = 16
NO_JITTER = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class ViewSettings:
    """What the views are.

    Args:
        num_views: of each image.
        image_size, teacher_image_size: side of the square that student and teacher see, in pixels.
        teacher_maps: which of the teacher's feature maps, counted from 0 in the order of the family's.
        crop_scale: smallest and largest share of the image that a view shows.
        batch_size: images the teacher sees at a time.
        seed: of crops and flips.
    """

    num_views: int
    image_size: int
    teacher_image_size: int
    teacher_maps: tuple[int, ...]
    crop_scale: tuple[float, float]
    batch_size: int = 16
    seed: int = 0


def teacher_channels(teacher: PreTrainedModel, teacher_maps: Sequence[int]) -> list[int]:
    """Channels of those of the teacher's feature maps.

    Raises:
        ValueError: if the teacher has no such map.
    """
    family = get_family(teacher.config.model_type)
    channels = family.map_channels(teacher.config)
    if not teacher_maps or not all(0 <= number < len(channels) for number in teacher_maps):
        raise ValueError(
            f"teacher_maps is {list(teacher_maps)}; this {family.model_type} teacher has the maps 0 to "
            f"{len(channels) - 1}: give some of these"
        )
    return [channels[number] for number in teacher_maps]


class CroppedImages(Dataset[tuple[Tensor, Tensor]]):
    """View v of image i, at `v * len(images) + i`: the student's pixels uint8, and the teacher's, normalised."""

    def __init__(self, images: Images, settings: ViewSettings) -> None:
        student, teacher = settings.image_size, settings.teacher_image_size
        self.images, self.settings = images, settings
        # Same shape and same random numbers: both show the same crop.
        self.student = TrainTransform(
            (), (student, student), settings.crop_scale, True, NO_JITTER, image_mean=(0.0,) * 3, image_std=(1.0,) * 3
        )
        self.teacher = TrainTransform((), (teacher, teacher), settings.crop_scale, True, NO_JITTER)

    def __len__(self) -> int:
        return self.settings.num_views * len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        view, number = divmod(index, len(self.images))
        sample = {"image": self.images[number], "labels": {}}
        student, teacher = (
            transform(sample, np.random.default_rng((self.settings.seed, view, number)))["pixel_values"]
            for transform in (self.student, self.teacher)
        )
        return (student * 255).round().to(torch.uint8), teacher


class TeacherViews(Dataset[dict[str, Any]]):
    """Views of images with the teacher's feature maps, made where `folder` does not hold them yet.

    `views[i]` is `{"image": uint8 (3,S,S), "features": [float16 (h,w,C), ...]}`, one map per entry of `teacher_maps`.
    Being killed costs the last few batches: the files are filled in order, and on the next call from where they end.
    Files of other settings, images or weights are made anew.

    Args:
        teacher: in eval mode, on its device.
        digest: of the teacher's weights.
        autocast: gives the context in which the teacher runs.
        num_workers: processes that read images.

    Raises:
        ValueError: if the teacher has no such map, needs a larger image, or gives numbers that float16 cannot hold.
    """

    def __init__(
        self,
        folder: Path,
        images: Images,
        teacher: PreTrainedModel,
        settings: ViewSettings,
        digest: str = "",
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        num_workers: int = 0,
    ) -> None:
        side = settings.teacher_image_size
        teacher_channels(teacher, settings.teacher_maps)
        get_family(teacher.config.model_type).check_image_size(teacher.config, side, side)
        with torch.inference_mode(), autocast():
            maps = feature_maps(teacher, torch.zeros(1, 3, side, side, device=teacher.device))
        self.shapes = [maps[number].permute(0, 2, 3, 1).shape[1:] for number in settings.teacher_maps]
        self.folder, self.cropped, self.settings = folder, CroppedImages(images, settings), settings
        self.seconds = 0.0
        fingerprint = hashlib.sha256(images.fingerprint.encode()).hexdigest()
        self._make({**asdict(settings), "images": fingerprint, "teacher": digest}, teacher, autocast, num_workers)

    def __len__(self) -> int:
        return len(self.cropped)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Copies, because a tensor may not share memory that is read-only.
        features = [torch.from_numpy(array[index].copy()) for array in self.features]
        return {"image": torch.from_numpy(self.pixels[index].copy()), "features": features}

    def statistics(self, num_samples: int = 1024) -> list[tuple[Tensor, Tensor]]:
        """Mean and standard deviation (C,) of each map's channels, over at most so many views at equal distances."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(num_samples, len(self))).astype(np.int64))
        result = []
        for array in self.features:
            values_VhwC = torch.from_numpy(array[chosen]).double()
            result.append((values_VhwC.mean((0, 1, 2)).float(), values_VhwC.std((0, 1, 2), correction=0).float()))
        return result

    def _make(self, identity: dict, teacher: PreTrainedModel, autocast: Callable, num_workers: int) -> None:
        identity, state = json.loads(json.dumps(identity)), self._read_state()
        if state.get("identity") != identity:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            state = {"identity": identity, "done": 0, "seconds": 0.0}
        mode = "r" if state["done"] == len(self) else "r+" if state["done"] else "w+"
        side = self.settings.image_size
        self.pixels = self._open(IMAGE_FILE, mode, (3, side, side), np.uint8)
        self.features = [
            self._open(f"features_{number}.npy", mode, shape, np.float16)
            for number, shape in zip(self.settings.teacher_maps, self.shapes, strict=True)
        ]
        if mode != "r":
            self._fill(state, teacher, autocast, num_workers)
        self.seconds = state["seconds"]

    def _fill(self, state: dict[str, Any], teacher: PreTrainedModel, autocast: Callable, num_workers: int) -> None:
        started = time.perf_counter() - state["seconds"]
        # Whole batches are done: the batches to come are those of a run that was never stopped.
        todo = Subset(self.cropped, range(state["done"], len(self)))
        loader = DataLoader(todo, self.settings.batch_size, num_workers=num_workers)
        progress = tqdm(total=len(self), initial=state["done"], desc=f"teacher's views ({self.folder.name})")
        for number, (pixels_B3SS, teacher_B3HW) in enumerate(loader, start=1):
            part = slice(state["done"], state["done"] + len(pixels_B3SS))
            with torch.inference_mode(), autocast():
                maps = feature_maps(teacher, teacher_B3HW.to(teacher.device))
            self.pixels[part] = pixels_B3SS.numpy()
            for array, index in zip(self.features, self.settings.teacher_maps, strict=True):
                values_BChw = maps[index].half()
                if not values_BChw.isfinite().all():
                    raise ValueError(
                        f"map {index} of the teacher holds NaN or more than {torch.finfo(torch.half).max:g}, the "
                        "largest number in float16: choose other teacher_maps, e.g. only the last one"
                    )
                array[part] = values_BChw.permute(0, 2, 3, 1).cpu().numpy()
            state["done"] = part.stop
            progress.update(len(pixels_B3SS))
            if number % FLUSH_INTERVAL == 0 or part.stop == len(self):
                state["seconds"] = time.perf_counter() - started
                self._write_state(state)
        progress.close()

    def _open(self, name: str, mode: str, shape: tuple[int, ...], dtype: type) -> Any:
        return np.lib.format.open_memmap(self.folder / name, mode=mode, dtype=dtype, shape=(len(self), *shape))

    def _read_state(self) -> dict[str, Any]:
        file = self.folder / STATE_FILE
        return json.loads(file.read_text()) if file.is_file() else {}

    def _write_state(self, state: dict[str, Any]) -> None:
        """Says what is filled, once it is on the disk."""
        for array in (self.pixels, *self.features):
            array.flush()
        temporary = self.folder / f".{STATE_FILE}.partial"
        temporary.write_text(json.dumps(state))
        os.replace(temporary, self.folder / STATE_FILE)
