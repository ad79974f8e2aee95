"""Swin: four stages of windowed attention with patch merging between them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.swin.modeling_swin import SwinLayer

from mt_adapters.backbones.base import Tokens, to_map
from mt_adapters.backbones.hierarchical import HierarchicalFamily


class SwinFamily(HierarchicalFamily):
    model_type = "swin"
    norms = ("layernorm_before", "layernorm_after")
    windowed = True

    def stages(self, config: PreTrainedConfig) -> list[list[str]]:
        return [
            [f"encoder.layers.{stage}.blocks.{block}" for block in range(depth)]
            for stage, depth in enumerate(config.depths)
        ]

    def stage_channels(self, config: PreTrainedConfig) -> list[int]:
        return [config.embed_dim * 2**stage for stage in range(len(config.depths))]

    def map_strides(self, config: PreTrainedConfig) -> list[int]:
        return [self.patch_size(config)[0] * 2**stage for stage in range(len(config.depths))]

    def patch_size(self, config: PreTrainedConfig) -> tuple[int, int]:
        size = config.patch_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def attention_grid(self, config: PreTrainedConfig, stage: int = 0) -> tuple[int, int]:
        return (config.window_size, config.window_size)

    def min_image_size(self, config: PreTrainedConfig) -> int:
        # A map smaller than its window makes transformers shrink the window, which no longer fits the trained
        # relative positions. Patch merging rounds odd sizes up, hence the size that just gives `window_size`.
        coarsest = config.window_size
        for _ in config.depths[1:]:
            coarsest = 2 * coarsest - 1
        return (coarsest - 1) * max(self.patch_size(config)) + 1

    def stem(self, model: Any, pixel_values: Tensor) -> Tokens:
        hidden_BNC, grid = model.embeddings(pixel_values, interpolate_pos_encoding=True)
        return Tokens(hidden_BNC, grid)

    def run_blocks(self, model: Any, tokens: Tokens, start: int, stop: int) -> Tokens:
        hidden_BNC, (rows, columns), maps = tokens.hidden, tokens.grid, tokens.feature_maps
        number = 0
        for index, stage in enumerate(model.encoder.layers):
            for position, block in enumerate(stage.blocks):
                number += 1
                if not start < number <= stop:
                    continue
                restore_windows(block, model.config, position)
                hidden_BNC = block(hidden_BNC, (rows, columns))[0]
                if position + 1 < len(stage.blocks):
                    continue
                is_last = index + 1 == len(model.encoder.layers)
                maps += (to_map(model.layernorm(hidden_BNC) if is_last else hidden_BNC, (rows, columns)),)
                if stage.downsample is not None:
                    hidden_BNC = stage.downsample(hidden_BNC, (rows, columns))
                    rows, columns = (rows + 1) // 2, (columns + 1) // 2
        return Tokens(hidden_BNC, (rows, columns), maps)

    def add_attention_bias(
        self, attention: nn.Module, args: tuple, kwargs: dict[str, Any], bias_bLL: Tensor
    ) -> tuple[tuple, dict[str, Any]]:
        hidden, mask_WLL = args[0], args[1] if len(args) > 1 else kwargs.pop("attention_mask", None)
        num_samples = bias_bLL.shape[0]
        if num_samples > 1:
            # Windows of one sample stand next to each other in the batch.
            bias_bLL = bias_bLL.repeat_interleave(hidden.shape[0] // num_samples, dim=0)
            mask_WLL = None if mask_WLL is None else mask_WLL.repeat(num_samples, 1, 1)
        bias_bLL = bias_bLL.to(hidden.dtype)
        return (hidden, bias_bLL if mask_WLL is None else mask_WLL + bias_bLL, *args[2:]), kwargs

    def block_grid(self, args: tuple, kwargs: dict[str, Any], image_grid: tuple[int, int]) -> tuple[int, int]:
        return args[1] if len(args) > 1 else kwargs["input_dimensions"]

    def mergings(self, model: Any, first_stage: int, last_stage: int) -> Sequence[nn.Module]:
        return [model.encoder.layers[stage].downsample for stage in range(first_stage, last_stage)]


def restore_windows(block: nn.Module, config: PreTrainedConfig, position: int) -> None:
    """Undoes what an earlier, smaller image left in the block.

    transformers writes the shift of 0 that a map of just one window needs into the module and never takes it back, so
    that results would depend on the sizes seen before.
    """
    for layer in block.modules():
        if isinstance(layer, SwinLayer):
            layer.window_size = config.window_size
            layer.shift_size = 0 if position % 2 == 0 else config.window_size // 2
