"""A light feature pyramid, the default decoder.

Shapes: B batch, C channels of a level, D width of the decoder, H W size of a level, h w size at the level's place in
the pyramid, L levels.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from mt_adapters.decoders.base import Decoder, Lateral, Laterals, octaves_to_pyramid


class FpnDecoder(Decoder):
    """Feature pyramid: every level to one width, then added from coarse to fine (Lin et al. 2017, arXiv 1612.03144).

    A plain ViT's equal maps become a pyramid by sub-pixel convolutions. Maps of any size are accepted; the output has
    the size of the finest lateral.

    ```python
    >>> import torch
    >>> decoder = FpnDecoder(["depth"], channels=(96, 192), strides=(4, 8), num_shared=1, dim=64)
    >>> prepared = decoder.prepare([torch.randn(2, 96, 56, 56)])
    >>> decoder("depth", prepared, [torch.randn(2, 192, 28, 28)]).shape
    torch.Size([2, 64, 56, 56])

    ```
    """

    # Paper: decodes with Swin blocks (`SwinUnetDecoder`); this decoder is cheaper to train and to store.

    def build_shared(self) -> Laterals:
        return self._build_laterals(range(self.num_shared))

    def build_task(self) -> nn.Module:
        laterals = self._build_laterals(range(self.num_shared, len(self.channels)))
        return TopDownFusion(laterals, num_levels=len(self.channels), dim=self.dim)

    def _build_laterals(self, levels: range) -> Laterals:
        # Ours: the top-down path resizes what it adds, so a map that is too fine for its place can stay as it is.
        return Laterals(
            Lateral(self.channels[level], self.dim, octaves=max(0, octaves_to_pyramid(self.strides[level], level)))
            for level in levels
        )


class TopDownFusion(nn.Module):
    """Adds each level to the enlarged coarser ones and smooths: L maps (B, D, h_i, w_i) -> (B, D, h_0, w_0)."""

    def __init__(self, laterals: Laterals, num_levels: int, dim: int) -> None:
        super().__init__()
        self.laterals = laterals
        # GroupNorm, not BatchNorm: dense tasks train with few images per batch.
        self.smooth = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, kernel_size=3, padding=1), nn.GroupNorm(1, dim), nn.GELU())
            for _ in range(num_levels)
        )

    def forward(self, prepared: Sequence[Tensor], task_maps: Sequence[Tensor]) -> Tensor:
        levels = [*prepared, *self.laterals(task_maps)]
        pairs = zip(reversed(levels), reversed(self.smooth), strict=True)
        level_BDHW, smooth = next(pairs)
        x_BDHW = smooth(level_BDHW)
        for level_BDHW, smooth in pairs:
            size = level_BDHW.shape[-2:]
            x_BDHW = smooth(level_BDHW + F.interpolate(x_BDHW, size=size, mode="bilinear", align_corners=False))
        return x_BDHW
