"""DINOv2, without and with register tokens: a plain ViT with layer scale; it interpolates its positions by itself."""

from transformers import PreTrainedConfig

from mt_adapters.backbones.plain import PlainVitFamily


class Dinov2Family(PlainVitFamily):
    model_type = "dinov2"
    block_list = "encoder.layer"
    norms = ("norm1", "norm2")


class Dinov2WithRegistersFamily(Dinov2Family):
    model_type = "dinov2_with_registers"

    def num_prefix_tokens(self, config: PreTrainedConfig) -> int:
        return 1 + config.num_register_tokens
