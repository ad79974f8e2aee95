"""Semantic segmentation: a class per pixel."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mt_adapters.losses import cross_entropy
from mt_adapters.tasks.base import Task

IGNORE_INDEX = 255
CLASSES_AT_ONCE = 4


@dataclass(frozen=True)
class SemsegTask(Task):
    """Labels int64 (B,H,W): class ids 0 .. num_labels - 1; 255 = no label. Predictions: ids of the same shape."""

    num_labels: int = 0

    kind: ClassVar[str] = "semseg"
    output: ClassVar[str] = "class ids, int64 (H,W)"
    unlabelled: ClassVar[int] = IGNORE_INDEX

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_labels <= IGNORE_INDEX:
            raise ValueError(
                f"task {self.name!r} has num_labels={self.num_labels}; a segmentation task needs 1 to {IGNORE_INDEX} "
                f'classes: pass num_labels=... or {{"name": "{self.name}", "type": "semseg", "num_labels": ...}}'
            )

    @property
    def num_channels(self) -> int:
        return self.num_labels

    def loss(self, logits_BKHW: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(logits_BKHW, label, ignore_index=IGNORE_INDEX)

    def labelled(self, label: Tensor) -> Tensor:
        return label != IGNORE_INDEX

    def predict(self, logits_BKHW: Tensor) -> Tensor:
        return logits_BKHW.argmax(dim=1)

    def predict_at(self, logits_BKHW: Tensor, size: tuple[int, int]) -> Tensor:
        # A few classes at a time: all of them at the size of a phone's photo would take gigabytes.
        groups = logits_BKHW.split(CLASSES_AT_ONCE, dim=1)
        best_BHW, ids_BHW = self._best(groups[0], size)
        for number, group in enumerate(groups[1:], start=1):
            value_BHW, index_BHW = self._best(group, size)
            ids_BHW = torch.where(value_BHW > best_BHW, index_BHW + number * CLASSES_AT_ONCE, ids_BHW)
            best_BHW = torch.maximum(best_BHW, value_BHW)
        return ids_BHW

    def _best(self, logits_BKHW: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        if tuple(size) != tuple(logits_BKHW.shape[-2:]):
            logits_BKHW = F.interpolate(logits_BKHW.float(), size=tuple(size), mode="bilinear")
        value_BHW, index_BHW = logits_BKHW.max(dim=1)
        return value_BHW, index_BHW

    def colorize(self, map_: Tensor, like: Tensor | None = None) -> Tensor:
        # Hues a golden angle apart, lightness in three steps: neighbouring ids never look alike, for any K.
        ids = torch.arange(self.num_labels, dtype=torch.float32, device=map_.device)
        hue, value = ids * 0.61803398875 % 1.0, 1.0 - 0.22 * (ids % 3)
        offsets = torch.tensor([5.0, 3.0, 1.0], device=map_.device)
        k = (offsets + hue.unsqueeze(-1) * 6) % 6
        color = value.unsqueeze(-1) * (1 - 0.6 * torch.minimum(k, 4 - k).clamp(0, 1))
        palette = torch.zeros(256, 3, dtype=torch.uint8, device=map_.device)
        palette[: self.num_labels] = (color * 255).round().to(torch.uint8)
        return palette[map_]

    def _range_error(self, label: Tensor) -> str | None:
        wrong = (label != IGNORE_INDEX) & ((label < 0) | (label >= self.num_labels))
        if not wrong.any():
            return None
        return (
            f"class id {label[wrong][0].item()} is out of range; allowed are 0 .. {self.num_labels - 1} and "
            f"{IGNORE_INDEX} for no label: set num_labels to the number of classes or map the ids"
        )
