"""The image encoders of CLIP and SigLIP."""

from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedConfig

from mt_adapters.backbones.base import Tokens
from mt_adapters.backbones.plain import PlainVitFamily


class SiglipVisionFamily(PlainVitFamily):
    """Has no class token; its pooling head is not run."""

    model_type = "siglip_vision_model"
    block_list = "encoder.layers"
    attention = "self_attn"
    norms = ("layer_norm1", "layer_norm2")
    final_norm: ClassVar[str | None] = "post_layernorm"
    stem_keywords = {"interpolate_pos_encoding": True}
    unused_weights = ("head",)

    def num_prefix_tokens(self, config: PreTrainedConfig) -> int:
        return 0

    def block_keywords(self, model: Any, tokens: Tokens) -> dict[str, Any]:
        return {"attention_mask": None}


class CLIPVisionFamily(SiglipVisionFamily):
    """Norms once before the blocks; the norm behind them is for the class token alone, so that maps go without."""

    model_type = "clip_vision_model"
    final_norm: ClassVar[str | None] = None
    unused_weights = ("post_layernorm",)

    def num_prefix_tokens(self, config: PreTrainedConfig) -> int:
        return 1

    def stem(self, model: Any, pixel_values: Tensor) -> Tokens:
        tokens = super().stem(model, pixel_values)
        return Tokens(model.pre_layrnorm(tokens.hidden), tokens.grid)
