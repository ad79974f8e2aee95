"""DINOv3: a plain ViT with register tokens and rotary positions, which fit grids of any size."""

from typing import Any

from transformers import PreTrainedConfig

from mt_adapters.backbones.base import Tokens
from mt_adapters.backbones.plain import PlainVitFamily


class DINOv3ViTFamily(PlainVitFamily):
    model_type = "dinov3_vit"
    block_list = "model.layer"
    norms = ("norm1", "norm2")
    final_norm = "norm"

    def num_prefix_tokens(self, config: PreTrainedConfig) -> int:
        return 1 + config.num_register_tokens

    def block_keywords(self, model: Any, tokens: Tokens) -> dict[str, Any]:
        (rows, columns), (patch_height, patch_width) = tokens.grid, self.patch_size(model.config)
        # Positions are computed from an image's size, type and device; this one has no pixel.
        image = tokens.hidden.new_empty(
            (0, 3, rows * patch_height, columns * patch_width), dtype=model.embeddings.patch_embeddings.weight.dtype
        )
        return {"position_embeddings": model.rope_embeddings(image)}
