"""Edges: the probability that a pixel lies on a contour."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mt_adapters.losses import EDGE_LOSSES, labelled_edges
from mt_adapters.tasks.base import Task, ramp

COLORS = ((0, 0, 0), (255, 255, 255))


@dataclass(frozen=True)
class EdgesTask(Task):
    """Labels float (B,H,W) in [0,1]; NaN = no label. Predictions: probabilities of the same shape.

    Args:
        loss_type: "balanced_bce" (default, binary edges) or "l1" (edge textures such as Taskonomy's).
    """

    loss_type: str = "balanced_bce"

    kind: ClassVar[str] = "edges"
    output: ClassVar[str] = "probability of a contour, float32 (H,W)"
    unlabelled: ClassVar[float] = float("nan")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type not in EDGE_LOSSES:
            raise ValueError(f"unknown edge loss {self.loss_type!r} of task {self.name!r}; known: {[*EDGE_LOSSES]}")

    @property
    def num_channels(self) -> int:
        return 1

    def loss(self, logits_BKHW: Tensor, label: Tensor) -> Tensor:
        logits = logits_BKHW.squeeze(1)
        return EDGE_LOSSES[self.loss_type](logits if self.loss_type == "balanced_bce" else logits.sigmoid(), label)

    def labelled(self, label: Tensor) -> Tensor:
        return labelled_edges(label)

    def predict(self, logits_BKHW: Tensor) -> Tensor:
        return logits_BKHW.squeeze(1).float().sigmoid()

    def colorize(self, map_: Tensor, like: Tensor | None = None) -> Tensor:
        return ramp(map_, COLORS)

    def _range_error(self, label: Tensor) -> str | None:
        known = label[~torch.isnan(label)]
        wrong = known[(known < 0) | (known > 1)]
        if not wrong.numel():
            return None
        return f"edge value {wrong[0].item():.4g} is out of range; allowed are 0 .. 1, and NaN for no label"
