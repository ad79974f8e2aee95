"""A model or its adapter to the Hub, with the image processor that belongs to it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mt_adapters.hub.push import publish
from mt_adapters.models.vta.adapter_files import save_adapter_files
from mt_adapters.models.vta.image_processing_pil_vta import VtaImageProcessorPil

if TYPE_CHECKING:
    from mt_adapters.models.vta.modeling_vta import VtaModel

PROCESSOR_FILE = "preprocessor_config.json"


def push(
    model: "VtaModel",
    repo_id: str,
    is_adapter: bool,
    run_folder: str | Path | None = None,
    image_processor: VtaImageProcessorPil | None = None,
    max_shard_size: int | str = "50GB",
    **options: Any,
) -> str:
    """`VtaModel.push_to_hub` and `push_adapter_to_hub`."""
    loaded_from = Path(model.name_or_path) if model.name_or_path else None
    processor = image_processor or find_processor(model, run_folder, loaded_from)

    def save(folder: Path) -> None:
        if is_adapter:
            save_adapter_files(model, folder)
        else:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)

    return publish(model, repo_id, save, is_adapter, run_folder, loaded_from, **options)


def find_processor(model: "VtaModel", *folders: str | Path | None) -> VtaImageProcessorPil:
    """The one of the first folder that has one; else one with the size that the backbone was pretrained with."""
    for folder in folders:
        if folder is not None and (Path(folder) / PROCESSOR_FILE).is_file():
            return VtaImageProcessorPil.from_pretrained(folder)
    size = getattr(model.config.backbone_config, "image_size", None)
    if size is None:
        return VtaImageProcessorPil(tasks=model.config.tasks)
    height, width = (size, size) if isinstance(size, int) else size
    return VtaImageProcessorPil(tasks=model.config.tasks, size={"height": height, "width": width})
