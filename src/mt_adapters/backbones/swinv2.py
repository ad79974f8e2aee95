"""Swin V2: Swin with cosine attention, a continuous position bias, and norms behind attention and MLP."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from mt_adapters.backbones.swin import SwinFamily


class Swinv2Family(SwinFamily):
    """Swin's stages and windows in post-norm blocks.

    Ours: TSN stays with the norms, so it scales what attention and MLP add to the stream, where in Swin it scales what
    they read. `residual="figure"` takes the MLP's input for the figure's a; here that is the stream itself.
    """

    model_type = "swinv2"
    mlp = ("intermediate", "output")

    def attention_grid(self, config: PreTrainedConfig, stage: int = 0) -> tuple[int, int]:
        # A stage whose pretraining map is smaller than the window has windows of that map's size, for all images.
        size = config.image_size
        height = size if isinstance(size, int) else size[0]
        side = min(config.window_size, height // self.patch_size(config)[0] // 2**stage)
        return side, side

    def min_image_size(self, config: PreTrainedConfig) -> int:
        # transformers fills up maps that are smaller than a window.
        return max(self.patch_size(config))

    def add_attention_bias(
        self, attention: nn.Module, args: tuple, kwargs: dict[str, Any], bias_bLL: Tensor
    ) -> tuple[tuple, dict[str, Any]]:
        # transformers 5.23 adds the mask to the logits twice; halves of a bias add up to it exactly.
        return super().add_attention_bias(attention, args, kwargs, bias_bLL / 2)
