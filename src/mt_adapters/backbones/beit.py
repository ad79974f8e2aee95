"""BEiT: a plain ViT whose attention has a relative position bias, per block or one for all blocks."""

from typing import Any

from transformers import PreTrainedConfig

from mt_adapters.backbones.base import Tokens
from mt_adapters.backbones.plain import PlainVitFamily


class BeitFamily(PlainVitFamily):
    """A block adds its own position bias to the attention mask that it is given; TAA then adds to the sum of both."""

    model_type = "beit"
    block_list = "layers"
    norms = ("layernorm_before", "layernorm_after")
    unused_weights = ("mask_token", "pooler")

    def block_keywords(self, model: Any, tokens: Tokens) -> dict[str, Any]:
        config: PreTrainedConfig = model.config
        patch_height, patch_width = self.patch_size(config)
        keywords: dict[str, Any] = {"resolution": (tokens.grid[0] * patch_height, tokens.grid[1] * patch_width)}
        if model.shared_position_bias is not None:
            keywords["attention_mask"] = model.shared_position_bias(tokens.grid)
        return keywords
