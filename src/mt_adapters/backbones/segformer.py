"""SegFormer's encoder (MiT): global attention from all tokens of a stage to a coarser grid of keys.

Shape suffixes: B batch, N tokens, C channels, L tokens of the grid, K keys, b = 1 or B.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from mt_adapters.backbones.base import Tokens, to_map
from mt_adapters.backbones.hierarchical import HierarchicalFamily


class SegformerFamily(HierarchicalFamily):
    """Ours: a key that stands for several tokens gets the mean of their biases."""

    model_type = "segformer"
    norms = ("layernorm_before", "layernorm_after")
    windowed = False
    unused_weights = ()

    def stages(self, config: PreTrainedConfig) -> list[list[str]]:
        return [
            [f"stages.{stage}.blocks.{block}" for block in range(depth)] for stage, depth in enumerate(config.depths)
        ]

    def stage_channels(self, config: PreTrainedConfig) -> list[int]:
        return list(config.hidden_sizes)

    def map_strides(self, config: PreTrainedConfig) -> list[int]:
        strides = [config.strides[0]]
        for stride in config.strides[1:]:
            strides.append(strides[-1] * stride)
        return strides

    def patch_size(self, config: PreTrainedConfig) -> tuple[int, int]:
        return config.strides[0], config.strides[0]

    def token_grid(self, config: PreTrainedConfig, height: int, width: int) -> tuple[int, int]:
        # Patches overlap and are padded, so that parts of a stride count too.
        return -(-height // config.strides[0]), -(-width // config.strides[0])

    def attention_grid(self, config: PreTrainedConfig, stage: int = 0) -> tuple[int, int]:
        # Ours: the config names no image size; these are the last stage's tokens of the 224 pixels of ImageNet.
        return 7, 7

    def min_image_size(self, config: PreTrainedConfig) -> int:
        # Every stage needs tokens for at least one key; from one stage to the next grids are rounded up.
        smallest = 1
        for stage, ratio in enumerate(config.sr_ratios):
            size = ratio
            for stride in config.strides[stage::-1]:
                size = (size - 1) * stride + 1
            smallest = max(smallest, size)
        return smallest

    def stem(self, model: Any, pixel_values: Tensor) -> Tokens:
        hidden_BNC, rows, columns = model.stages[0].patch_embeddings(pixel_values)
        return Tokens(hidden_BNC, (rows, columns))

    def run_blocks(self, model: Any, tokens: Tokens, start: int, stop: int) -> Tokens:
        hidden_BNC, (rows, columns), maps = tokens.hidden, tokens.grid, tokens.feature_maps
        number = 0
        for index, stage in enumerate(model.stages):
            for position, block in enumerate(stage.blocks):
                number += 1
                if not start < number <= stop:
                    continue
                hidden_BNC = block(hidden_BNC, rows, columns)
                if position + 1 < len(stage.blocks):
                    continue
                hidden_BNC = stage.layer_norm(hidden_BNC)
                maps += (to_map(hidden_BNC, (rows, columns)),)
                if index + 1 < len(model.stages):
                    hidden_BNC, rows, columns = model.stages[index + 1].patch_embeddings(maps[-1])
        return Tokens(hidden_BNC, (rows, columns), maps)

    def add_attention_bias(
        self, attention: Any, args: tuple, kwargs: dict[str, Any], bias_bLL: Tensor
    ) -> tuple[tuple, dict[str, Any]]:
        hidden_BNC, rows, columns = args
        ratio = attention.sequence_reduction_ratio
        bias_bLHW = bias_bLL.unflatten(2, (rows, columns))
        bias_bLK = (F.avg_pool2d(bias_bLHW, ratio) if ratio > 1 else bias_bLHW).flatten(2)
        return args, kwargs | {"attention_mask": bias_bLK.unsqueeze(1).to(hidden_BNC.dtype)}

    def bias_grid(self, args: tuple, kwargs: dict[str, Any], image_grid: tuple[int, int]) -> tuple[int, int]:
        return args[1], args[2]

    def block_grid(self, args: tuple, kwargs: dict[str, Any], image_grid: tuple[int, int]) -> tuple[int, int]:
        return args[1], args[2]

    def mergings(self, model: Any, first_stage: int, last_stage: int) -> Sequence[nn.Module]:
        stages = range(first_stage + 1, last_stage + 1)
        return [TokenMerging(model.stages[stage].patch_embeddings) for stage in stages]


class TokenMerging(nn.Module):
    """A stage's patch embedding of an earlier stage's tokens, called as Swin's patch merging is."""

    def __init__(self, patch_embeddings: nn.Module) -> None:
        super().__init__()
        self.patch_embeddings = patch_embeddings

    def forward(self, hidden_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.patch_embeddings(to_map(hidden_BNC, grid))[0]
