"""Models from a folder, a Hub id or the package itself, full ones and adapters alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mt_adapters.hub.download import holds_adapter, hub_options, readable_weight_errors
from mt_adapters.models.vta.modeling_vta import VtaModel


def load_model(
    source: str | Path, backbone: str | Path | None = None, tasks: Sequence[str] | None = None, **options: Any
) -> VtaModel:
    """The model in eval mode, whichever kind `source` holds.

    Args:
        backbone: an adapter's, if it is not the one of its config.
        tasks: those of an adapter to load; a full model is loaded with all.
        options: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

    Raises:
        ValueError: if there is no model, a file is missing, truncated or not safetensors, or a full model is given
            another backbone.
    """
    options = hub_options(options)
    with readable_weight_errors(source):
        is_adapter = holds_adapter(source, **options)
    if is_adapter:
        return VtaModel.from_adapter(source, backbone=backbone, tasks=tasks, **options)
    if backbone is not None:
        raise ValueError(f"{str(source)!r} holds a full model with a backbone of its own: give no other backbone")
    return VtaModel.from_pretrained(source, **options).eval()
