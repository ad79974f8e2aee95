"""ViT, hence also DINO (v1) weights, and DeiT, which has a distillation token more."""

from transformers import PreTrainedConfig

from mt_adapters.backbones.plain import PlainVitFamily


class ViTFamily(PlainVitFamily):
    model_type = "vit"
    block_list = "layers"
    norms = ("layernorm_before", "layernorm_after")
    stem_keywords = {"interpolate_pos_encoding": True}
    unused_weights = ("mask_token", "pooler")


class DeiTFamily(ViTFamily):
    model_type = "deit"

    def num_prefix_tokens(self, config: PreTrainedConfig) -> int:
        return 2
