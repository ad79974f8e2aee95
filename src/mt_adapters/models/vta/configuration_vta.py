"""Configuration of a multitask model: a backbone, an adapter, a decoder and the tasks."""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from mt_adapters.decoders import get_decoder
from mt_adapters.tasks import get_tasks

FAN_OUTS = ("sequential", "batched")
# Keys with which a config can name code (also of a kernel), other weight files or a quantiser; a multitask model needs
# none of them.
FOREIGN_KEYS = (
    "auto_map",
    "custom_pipelines",
    "quantization_config",
    "transformers_weights",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "kernel_config",
    "distributed_config",
    "megatron_config",
)


@strict
class VtaConfig(PreTrainedConfig):
    """Everything that rebuilds a `VtaModel`, and nothing else.

    Args:
        backbone_config: config of the transformers backbone.
        tasks: names or dicts (`name`, `type`, settings); kept as a list of dicts, in this order.
        adapter: settings of the peft adapter with its `peft_type`; None for a backbone without adapter.
        decoder: "fpn", "swin_unet" or "linear".
        decoder_dim: channels of the decoder.
        share_decoder: one decoder for all tasks instead of one each.
        fan_out: "sequential" runs the tasks one after another, "batched" as one batch of B * T.
        train_backbone: leave the backbone's own weights trainable.
        backbone_name_or_path: where the backbone's weights came from.

    Raises:
        ValueError: if a task, a task's setting, the decoder or the fan-out is unknown, or, in `from_dict` and what
            builds on it, if the settings are another model's or ask for code of the repository.
    """

    model_type = "vta"
    sub_configs = {"backbone_config": AutoConfig}

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    tasks: list[Any] | None = None
    adapter: dict[str, Any] | None = None
    decoder: str = "fpn"
    decoder_dim: int = 64
    share_decoder: bool = False
    fan_out: str = "sequential"
    train_backbone: bool = False
    backbone_name_or_path: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        if self.tasks:
            num_labels = kwargs.get("num_labels") or len(self.id2label or ())
            defaults = {"num_labels": num_labels} if num_labels else {}
            self.tasks = [task.to_dict() for task in get_tasks(self.tasks, **defaults)]
        get_decoder(self.decoder)
        if self.fan_out not in FAN_OUTS:
            raise ValueError(f"VtaConfig has fan_out={self.fan_out!r}; allowed are {list(FAN_OUTS)}")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"this is the config of a {model_type!r} model, not of a multitask one ({cls.model_type!r}): to put "
                "adapters on it, use VtaModel.from_backbone"
            )
        for place in (config_dict, config_dict.get("backbone_config"), config_dict.get("adapter")):
            if not isinstance(place, dict):
                continue
            dtype = place.get("dtype") or "float32"
            if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
                raise ValueError(f"the config has dtype={dtype!r}; give the name of a torch type, such as 'float32'")
            found = [key for key in FOREIGN_KEYS if place.get(key) is not None]
            if found:
                raise ValueError(
                    f"the config has {found[0]!r}: a multitask model needs no code, weights or quantiser but this "
                    "package's own, and none from a repository is ever used; do not load it, or remove the key"
                )
        return super().from_dict(config_dict, **kwargs)
