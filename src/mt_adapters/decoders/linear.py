"""A linear probe: the frozen features themselves, for a 1x1 head to read.

Shapes: B batch, C channels of a level, H W size of a level.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mt_adapters.decoders.base import Decoder


class LinearDecoder(Decoder):
    """All maps normalised over channels, resized to the finest map and concatenated; it has no parameters.

    With frozen features and a 1x1 head this is the linear probe, the baseline for what a backbone already knows. The
    output is (B, sum of C_i, H_0, W_0): the finest map's own size, which for a plain ViT is coarser than a quarter of
    the image. `dim` and `share_between_tasks` have no effect on it.
    """

    @property
    def out_channels(self) -> int:
        return sum(self.channels)

    def build_shared(self) -> nn.Module:
        return NormalizedMaps()

    def build_task(self) -> nn.Module:
        return ConcatenatedMaps()


class NormalizedMaps(nn.Module):
    """Normalises each map over its channels, without affine parameters: [(B, C_i, H_i, W_i)] -> the same shapes."""

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        # ONNX takes a number for C only, where a tracer has a tensor.
        return [F.layer_norm(x.permute(0, 2, 3, 1), (int(x.shape[1]),)).permute(0, 3, 1, 2) for x in maps]


class ConcatenatedMaps(nn.Module):
    """Resizes all maps to the first and concatenates them: -> (B, sum of C_i, H_0, W_0)."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize = NormalizedMaps()

    def forward(self, prepared: Sequence[Tensor], task_maps: Sequence[Tensor]) -> Tensor:
        maps: list[Tensor] = [*prepared, *self.normalize(task_maps)]
        size = maps[0].shape[-2:]
        resized = [F.interpolate(x_BCHW, size=size, mode="bilinear", align_corners=False) for x_BCHW in maps]
        return torch.cat(resized, dim=1)
