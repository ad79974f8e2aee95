"""Pretrained backbones from a Hub id, a folder or a config; safetensors only."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from mt_adapters.backbones.table import get_family


def load_backbone(source: str | Path | PreTrainedConfig) -> PreTrainedModel:
    """The headless model of a Hub id or folder with its pretrained weights in float32, or, from a config, a new one.

    Raises:
        ValueError: if the backbone's type is unknown, its folder does not exist, a weight is missing, or the weight
            file is truncated or not safetensors.
    """
    if isinstance(source, PreTrainedConfig):
        get_family(source.model_type)
        return AutoModel.from_config(source)
    with readable_weight_errors(source):
        config = AutoConfig.from_pretrained(source)
        family = get_family(config.model_type)
        model, report = AutoModel.from_pretrained(
            source, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    missing = [key for key in sorted(report["missing_keys"]) if not key.endswith(family.unused_weights)]
    if missing:
        raise ValueError(
            f"the weights of {str(source)!r} lack {len(missing)} tensors of a {config.model_type} backbone, the first "
            f"is {missing[0]!r}: the file is of another model or incomplete; get it again"
        )
    return model


@contextmanager
def readable_weight_errors(source: str | Path) -> Iterator[None]:
    """Turns what transformers and safetensors raise for a missing, damaged or pickled file into a clear ValueError."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"the weight file of {str(source)!r} is truncated or no safetensors file ({error}): get it again, or "
            "convert it with safetensors; pickled weights are never loaded"
        ) from error
    except OSError as error:
        raise ValueError(
            f"cannot load {str(source)!r}: {error}. Give a Hub id or a folder that holds config.json and "
            "model.safetensors; pickled weights (.bin, .pt) are never loaded"
        ) from error
