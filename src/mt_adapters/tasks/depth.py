"""Depth: metres along the optical axis."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mt_adapters.losses import DEPTH_LOSSES, labelled_depth
from mt_adapters.tasks.base import Task, ramp

# Near is light, far is dark.
COLORS = ((252, 253, 191), (254, 176, 120), (241, 96, 93), (183, 55, 121), (114, 31, 129), (44, 17, 95), (10, 5, 30))


@dataclass(frozen=True)
class DepthTask(Task):
    """Labels float (B,H,W): planar z in metres; 0 or NaN = no label. Predictions: metres > 0 of the same shape.

    Args:
        loss_type: "berhu" (default), "l1" or "silog".
    """

    loss_type: str = "berhu"

    kind: ClassVar[str] = "depth"
    output: ClassVar[str] = "metres along the optical axis, float32 (H,W)"
    unlabelled: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type not in DEPTH_LOSSES:
            raise ValueError(f"unknown depth loss {self.loss_type!r} of task {self.name!r}; known: {[*DEPTH_LOSSES]}")

    @property
    def num_channels(self) -> int:
        return 1

    def loss(self, logits_BKHW: Tensor, label: Tensor) -> Tensor:
        return DEPTH_LOSSES[self.loss_type](logits_BKHW.squeeze(1), label)

    def labelled(self, label: Tensor) -> Tensor:
        return labelled_depth(label)

    def predict(self, logits_BKHW: Tensor) -> Tensor:
        return logits_BKHW.squeeze(1).float().clamp(min=1e-3)

    def colorize(self, map_: Tensor, like: Tensor | None = None) -> Tensor:
        labelled = self.labelled(map_)
        span = map_ if like is None else like
        span = span[span > 0]
        low, high = (span.min(), span.max()) if span.numel() else (map_.new_zeros(()), map_.new_ones(()))
        picture = ramp((map_ - low) / (high - low).clamp(min=1e-6), COLORS)
        return torch.where(labelled.unsqueeze(-1), picture, torch.zeros_like(picture))

    def _range_error(self, label: Tensor) -> str | None:
        if (label < 0).any():
            return (
                f"depth {label[label < 0][0].item():.4g} m is negative; allowed are metres > 0, and 0 or NaN: no label"
            )
        if torch.isinf(label).any():
            return "depth is infinite; allowed are metres > 0, and 0 or NaN: no label (use 0 for the sky)"
        return None
