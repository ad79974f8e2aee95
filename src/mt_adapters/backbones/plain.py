"""What plain vision transformers share: global attention, all blocks at one resolution.

Shape suffixes: B batch, N tokens, C channels, L tokens of the grid with prefix tokens, b = 1 or B.
"""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedConfig

from mt_adapters.backbones.base import BackboneFamily, Tokens, to_map

NUM_MAPS = 4


class PlainVitFamily(BackboneFamily):
    """Stem, blocks at one resolution, final norm. A subclass names their parts."""

    windowed = False
    # Paths in the model: the list of blocks, and the norm, if any, from the last block's to the model's output.
    block_list: ClassVar[str]
    final_norm: ClassVar[str | None] = "layernorm"
    # Keywords of the embeddings that make them take images of any size.
    stem_keywords: ClassVar[dict[str, Any]] = {}

    def stages(self, config: PreTrainedConfig) -> list[list[str]]:
        return [[f"{self.block_list}.{block}" for block in range(config.num_hidden_layers)]]

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

    def attention_grid(self, config: PreTrainedConfig, stage: int = 0) -> tuple[int, int]:
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
        hidden_BNC = model.embeddings(pixel_values, **self.stem_keywords)
        return Tokens(hidden_BNC, self.token_grid(model.config, *pixel_values.shape[-2:]))

    def block_keywords(self, model: Any, tokens: Tokens) -> dict[str, Any]:
        """What the model gives to every block besides the tokens."""
        return {}

    def run_blocks(self, model: Any, tokens: Tokens, start: int, stop: int) -> Tokens:
        hidden_BNC, maps = tokens.hidden, tokens.feature_maps
        blocks = model.get_submodule(self.block_list)
        final_norm = nn.Identity() if self.final_norm is None else model.get_submodule(self.final_norm)
        keywords, map_blocks = self.block_keywords(model, tokens), self.map_blocks(model.config)
        for number in range(start, stop):
            hidden_BNC = blocks[number](hidden_BNC, **keywords)
            if number in map_blocks:
                patches_BNC = final_norm(hidden_BNC)[:, self.num_prefix_tokens(model.config) :]
                maps += (to_map(patches_BNC, tokens.grid),)
        return Tokens(hidden_BNC, tokens.grid, maps)

    def add_attention_bias(
        self, attention: nn.Module, args: tuple, kwargs: dict[str, Any], bias_bLL: Tensor
    ) -> tuple[tuple, dict[str, Any]]:
        hidden_BNC = args[0] if args else kwargs["hidden_states"]
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        bias = bias_bLL.unsqueeze(1).to(hidden_BNC.dtype)
        bias = bias if mask is None else mask + bias
        if len(args) > 1:
            return (args[0], bias, *args[2:]), kwargs
        return args, kwargs | {"attention_mask": bias}
