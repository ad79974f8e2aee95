"""DINOv2: a plain ViT with layer scale; all blocks at one resolution."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from mt_adapters.backbones.base import BackboneFamily, Tokens, to_map

NUM_MAPS = 4


class Dinov2Family(BackboneFamily):
    model_type = "dinov2"
    norms = ("norm1", "norm2")
    windowed = False

    def stages(self, config: PreTrainedConfig) -> list[list[str]]:
        return [[f"encoder.layer.{block}" for block in range(config.num_hidden_layers)]]

    def stage_channels(self, config: PreTrainedConfig) -> list[int]:
        return [config.hidden_size]

    def map_blocks(self, config: PreTrainedConfig) -> list[int]:
        """Ours: the outputs of four blocks at equal distances, the last one included."""
        depth = config.num_hidden_layers
        return sorted({-(-depth * (level + 1) // NUM_MAPS) - 1 for level in range(NUM_MAPS)})

    def map_channels(self, config: PreTrainedConfig) -> list[int]:
        return [config.hidden_size] * len(self.map_blocks(config))

    def map_strides(self, config: PreTrainedConfig) -> list[int]:
        return [self.patch_size(config)[0]] * len(self.map_blocks(config))

    def num_maps_before(self, config: PreTrainedConfig, block: int) -> int:
        return sum(number < block for number in self.map_blocks(config))

    def patch_size(self, config: PreTrainedConfig) -> tuple[int, int]:
        size = config.patch_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def attention_grid(self, config: PreTrainedConfig) -> tuple[int, int]:
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.token_grid(config, height, width)

    def num_prefix_tokens(self, config: PreTrainedConfig) -> int:
        return 1

    def default_targets(self, config: PreTrainedConfig) -> list[str]:
        # Ours: the last third, the share that the paper's figure shows for Swin's third stage.
        return self.stages(config)[0][-max(1, config.num_hidden_layers // 3) :]

    def min_image_size(self, config: PreTrainedConfig) -> int:
        return max(self.patch_size(config))

    def stem(self, model: Any, pixel_values: Tensor) -> Tokens:
        return Tokens(model.embeddings(pixel_values), self.token_grid(model.config, *pixel_values.shape[-2:]))

    def run_blocks(self, model: Any, tokens: Tokens, start: int, stop: int) -> Tokens:
        hidden_BNC, maps = tokens.hidden, tokens.feature_maps
        map_blocks = self.map_blocks(model.config)
        for number in range(start, stop):
            hidden_BNC = model.encoder.layer[number](hidden_BNC)
            if number in map_blocks:
                patches_BNC = model.layernorm(hidden_BNC)[:, self.num_prefix_tokens(model.config) :]
                maps += (to_map(patches_BNC, tokens.grid),)
        return Tokens(hidden_BNC, tokens.grid, maps)

    def add_attention_bias(
        self, args: tuple, kwargs: dict[str, Any], bias_bLL: Tensor
    ) -> tuple[tuple, dict[str, Any]]:
        hidden, *rest = args
        mask = rest.pop(0) if rest else kwargs.pop("attention_mask", None)
        bias = bias_bLL.unsqueeze(1).to(hidden.dtype)
        return (hidden, bias if mask is None else mask + bias, *rest), kwargs
