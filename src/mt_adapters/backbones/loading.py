"""Pretrained backbones from the package, a Hub id, a folder or a config; safetensors only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, ViTConfig

from mt_adapters.backbones.base import BackboneFamily
from mt_adapters.backbones.table import get_family
from mt_adapters.hub.download import check_size, pinned, readable_weight_errors, weight_files
from mt_adapters.hub.shipped import is_shipped, local_source

# Bytes; of torch's allocator for CPUs.
ALIGNMENT = 64


def load_backbone(source: str | Path | PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """The headless model of a Hub id or folder with its pretrained weights in float32, or, from a config, a new one.

    A name of `hub.shipped.SHIPPED` stands for files of the package itself, and the model keeps that name. CLIP and
    SigLIP give their image encoder, MAE (`vit_mae`) gives a ViT, which masks nothing. `options` say where files come
    from (`revision`, `token`, `cache_dir`, `local_files_only`, `force_download`).

    Raises:
        ValueError: if the backbone's type is unknown, its folder does not exist, a weight is missing or has another
            shape, the weight file is truncated or not safetensors, or the config asks for far more than it holds.
    """
    if isinstance(source, PreTrainedConfig):
        config = image_encoder_config(source)
        get_family(config.model_type).check_num_blocks(config)
        return AutoModel.from_config(config)
    if isinstance(source, str) and is_shipped(source):
        model = load_backbone(local_source(source))
        # The folder of this installation is nobody else's.
        model.name_or_path = model.config._name_or_path = source
        return model
    with readable_weight_errors(source):
        files = weight_files(source, **options)
        options = pinned(options, files[0])
        config = image_encoder_config(AutoConfig.from_pretrained(source, trust_remote_code=False, **options))
        family = get_family(config.model_type)
        family.check_num_blocks(config)
        check_origin(source, config)
        check_size(source, lambda: AutoModel.from_config(config), files)
        model, report = AutoModel.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
            **options,
        )
    check_report(source, report, family)
    align(model)
    return model


def align(model: nn.Module) -> None:
    """Moves weights to where torch's allocator would have put them.

    Loaded ones lie wherever they lay in their file, and on some processors matrix products then differ in the last bit
    from those of the model that was saved.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


def check_origin(source: str | Path, config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: if the config names attention code of another repository, or weight files of its own choice.
    """
    attention, weights = config._attn_implementation, getattr(config, "transformers_weights", None)
    if "/" in (attention or "") or weights is not None:
        raise ValueError(
            f"the config of {str(source)!r} asks for {attention if weights is None else weights!r}; attention is this "
            "machine's own and weights are model.safetensors: do not load it, or remove attn_implementation and "
            "transformers_weights from its config.json"
        )


def image_encoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a config that describes an image encoder for dense features."""
    if config.model_type == "vit_mae":
        settings, known = config.to_dict(), ViTConfig().to_dict().keys() - {"model_type"}
        return ViTConfig(**{name: value for name, value in settings.items() if name in known})
    return getattr(config, "vision_config", config)


def check_report(source: str | Path, report: Mapping[str, Any], family: BackboneFamily | None = None) -> None:
    """
    Raises:
        ValueError: if transformers' loading report lists weights that are missing, and that the family needs, or that
            have another shape.
    """
    mend = "the file is incomplete or of another model than its config.json describes; get both again"
    missing = [key for key in sorted(report["missing_keys"]) if family is None or not family.is_unused(key)]
    if missing:
        raise ValueError(
            f"the weights of {str(source)!r} lack {len(missing)} tensors, the first is {missing[0]!r}: {mend}"
        )
    for key, found, expected in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"the weights of {str(source)!r} do not fit: {key!r} has the shape {tuple(found)}, expected "
            f"{tuple(expected)}: {mend}"
        )
