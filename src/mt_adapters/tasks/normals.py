"""Surface normals: unit vectors in the camera's frame."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mt_adapters.losses import cosine_distance, labelled_normals
from mt_adapters.tasks.base import Task


@dataclass(frozen=True)
class NormalsTask(Task):
    """Labels float (B,3,H,W): unit vectors, x right, y up, z towards the camera; all zeros = no label."""

    kind: ClassVar[str] = "normals"
    output: ClassVar[str] = "unit vectors, x right, y up, z towards the camera, float32 (3,H,W)"
    unlabelled: ClassVar[float] = 0.0

    @property
    def num_channels(self) -> int:
        return 3

    def label_shape(self, batch_size: int, height: int, width: int) -> tuple[int, ...]:
        return (batch_size, 3, height, width)

    def mirror_values(self, label: Tensor) -> Tensor:
        """Turns the sign of x, which points right."""
        return label * label.new_tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)

    def loss(self, logits_BKHW: Tensor, label: Tensor) -> Tensor:
        return cosine_distance(logits_BKHW, label)

    def labelled(self, label: Tensor) -> Tensor:
        return labelled_normals(label)

    def predict(self, logits_BKHW: Tensor) -> Tensor:
        return F.normalize(logits_BKHW.float(), dim=1)

    def colorize(self, map_: Tensor, like: Tensor | None = None) -> Tensor:
        labelled = (map_ != 0).any(dim=0, keepdim=True)
        picture = torch.where(labelled, map_ * 0.5 + 0.5, torch.zeros_like(map_))
        return (picture.permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8)

    def _range_error(self, label: Tensor) -> str | None:
        length = label.float().square().sum(dim=1).sqrt()
        wrong = ~(((length - 1).abs() < 0.05) | (length == 0))
        if not wrong.any():
            return None
        return (
            f"a normal has the length {length[wrong][0].item():.4g}; allowed are unit vectors, and all zeros for no "
            "label: decode 8-bit maps with n * 2 / 255 - 1 and normalise them"
        )
