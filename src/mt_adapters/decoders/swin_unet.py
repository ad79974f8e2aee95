"""The paper's decoder: Swin blocks and patch expanding with the encoder's features, after Swin-Unet.

Shapes: B batch, C channels of a stage, H W size of a stage, N = H * W tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SwinConfig
from transformers import initialization as init
from transformers.models.swin.modeling_swin import SwinLayer, SwinRelativePositionBias

from mt_adapters.decoders.base import Decoder, Lateral, Laterals, octaves_to_pyramid

WINDOW_SIZE = 7
BLOCKS_PER_STAGE = 2
HEAD_DIM = 32


class SwinUnetDecoder(Decoder):
    """One stage of two Swin blocks per level, from coarse to fine, with patch expanding between stages.

    The wiring is that of Swin-Unet (Cao et al. 2021, arXiv 2105.05537): a stage expands the coarser stage's output,
    concatenates the encoder's map of its level and projects. Level i has width dim * 2**i and size about H / 2**(2+i);
    a plain ViT's equal maps are enlarged or averaged to that pyramid first.

    `dim` is a multiple of 32, the width of an attention head, or at most 32.

    Raises:
        ValueError: heads of equal width cannot be made from `dim`.
    """

    def build_shared(self) -> Laterals:
        return self._build_laterals(range(self.num_shared))

    def build_task(self) -> nn.Module:
        laterals = self._build_laterals(range(self.num_shared, len(self.channels)))
        return SwinUnet(laterals, num_levels=len(self.channels), dim=self.dim)

    def _build_laterals(self, levels: range) -> Laterals:
        # Ours: one rule for all backbones, also for a Swin encoder, whose own widths would fit without a projection.
        return Laterals(
            Lateral(self.channels[level], self.dim * 2**level, octaves_to_pyramid(self.strides[level], level))
            for level in levels
        )


class SwinUnet(nn.Module):
    """The stages of one task: laterals (B, dim * 2**i, H_i, W_i) -> (B, dim, H_0, W_0)."""

    def __init__(self, laterals: Laterals, num_levels: int, dim: int) -> None:
        super().__init__()
        self.laterals = laterals
        self.bottleneck = SwinBlocks(dim * 2 ** (num_levels - 1), num_heads(dim) * 2 ** (num_levels - 1))
        self.stages = nn.ModuleList(
            ExpandingStage(dim * 2**level, num_heads(dim) * 2**level) for level in reversed(range(num_levels - 1))
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, prepared: Sequence[Tensor], task_maps: Sequence[Tensor]) -> Tensor:
        *skips, coarsest = [x_BCHW.permute(0, 2, 3, 1) for x_BCHW in [*prepared, *self.laterals(task_maps)]]
        x_BHWC = self.bottleneck(coarsest)
        for stage, skip_BHWC in zip(self.stages, reversed(skips), strict=True):
            x_BHWC = stage(x_BHWC, skip_BHWC)
        # Ours: Swin-Unet expands once more, by four, to the image's size; here the head's logits are enlarged instead.
        return self.norm(x_BHWC).permute(0, 3, 1, 2)


class ExpandingStage(nn.Module):
    """Patch expanding, encoder features, blocks: x (B, h, w, 2C) and skip (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.expand = nn.Linear(2 * dim, 4 * dim, bias=False)
        self.shuffle = nn.PixelShuffle(2)
        self.norm = nn.LayerNorm(dim)
        self.fuse = nn.Linear(2 * dim, dim)
        self.blocks = SwinBlocks(dim, num_heads)

    def forward(self, x_BHWC: Tensor, skip_BHWC: Tensor) -> Tensor:
        expanded_BCHW = self.shuffle(self.expand(x_BHWC).permute(0, 3, 1, 2))
        expanded_BHWC = fit(expanded_BCHW, *skip_BHWC.shape[1:3]).permute(0, 2, 3, 1)
        return self.blocks(self.fuse(torch.cat([self.norm(expanded_BHWC), skip_BHWC], dim=-1)))


class SwinBlocks(nn.ModuleList):
    """Swin blocks with plain and shifted windows in turn: (B, H, W, C) -> the same shape, any H and W."""

    def __init__(self, dim: int, num_heads: int) -> None:
        config = SwinConfig(window_size=WINDOW_SIZE, attn_implementation="sdpa")  # type: ignore[call-arg]
        super().__init__(
            SwinBlock(
                config,
                dim,
                input_resolution=(WINDOW_SIZE, WINDOW_SIZE),  # stored by SwinLayer, without effect on its output
                num_heads=num_heads,
                shift_size=WINDOW_SIZE // 2 if index % 2 else 0,
            )
            for index in range(BLOCKS_PER_STAGE)
        )

    def forward(self, x_BHWC: Tensor) -> Tensor:
        size = x_BHWC.shape[1:3]
        tokens_BNC = x_BHWC.flatten(1, 2)
        for block in self:
            # Without always_partition the layer would shrink its windows to the first small map it meets, for good.
            tokens_BNC, _ = block(tokens_BNC, size, always_partition=True)
        return tokens_BNC.unflatten(1, size)


class RelativePositionBias(SwinRelativePositionBias):
    """Fills its table of indices, which no file holds, also in a model that is built without memory and loaded."""

    def reset_parameters(self) -> None:
        init.zeros_(self.relative_position_bias_table)
        init.copy_(self.relative_position_index, self._create_relative_position_index().view(-1))


class SwinBlock(SwinLayer):
    """A Swin block that leaves a map of one window unshifted: the shift's mask would only cut that window apart."""

    def __init__(self, config: SwinConfig, dim: int, num_heads: int, **kwargs: Any) -> None:
        super().__init__(config, dim, num_heads=num_heads, **kwargs)
        self.attention.relative_position_bias = RelativePositionBias(num_heads, (WINDOW_SIZE, WINDOW_SIZE))

    def get_attn_mask(self, height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        return None if height == width == self.window_size else super().get_attn_mask(height, width, dtype, device)

    def cyclic_shift(self, hidden_states: Tensor, reverse: bool = False) -> Tensor:
        is_one_window = hidden_states.shape[1] == hidden_states.shape[2] == self.window_size
        return hidden_states if is_one_window else super().cyclic_shift(hidden_states, reverse)


def fit(x_BCHW: Tensor, height: int, width: int) -> Tensor:
    """Crops at the bottom and right, where patch merging pads odd maps; stretches a map that is still too small."""
    x_BCHW = x_BCHW[..., :height, :width]
    if x_BCHW.shape[-2:] == (height, width):
        return x_BCHW
    return F.interpolate(x_BCHW, size=(height, width), mode="bilinear", align_corners=False)


def num_heads(dim: int) -> int:
    """Attention heads of the finest stage: 32 channels each, or a single one for narrower decoders."""
    if dim > HEAD_DIM and dim % HEAD_DIM:
        raise ValueError(
            f"decoder 'swin_unet' needs a dim that is a multiple of {HEAD_DIM}, or at most {HEAD_DIM}, got {dim}; "
            f"the nearest allowed are {dim // HEAD_DIM * HEAD_DIM} and {(dim // HEAD_DIM + 1) * HEAD_DIM}"
        )
    return max(1, dim // HEAD_DIM)
