"""The files of an adapter: peft's own two, and the decoders and heads that belong to it.

adapter_config.json  adapter_model.safetensors    peft's format; loads with PeftModel.from_pretrained too
vta_config.json                                   the whole model's config
decoder.safetensors                               what the decoders of all tasks share
task_<name>.safetensors                           decoder and head of one task
"""

import copy
import json
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from mt_adapters.backbones import load_backbone
from mt_adapters.hub.download import build_on_meta, fetch, hub_options, readable_weight_errors
from mt_adapters.models.vta.attach import AdapterReport, fit, renamed_keys, settings_for
from mt_adapters.models.vta.configuration_vta import VtaConfig
from mt_adapters.tuners.vta import TaskConditioning

if TYPE_CHECKING:
    from mt_adapters.models.vta.modeling_vta import VtaModel

logger = logging.get_logger(__name__)

CONFIG_FILE = "vta_config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
DECODER_FILE = "decoder.safetensors"
# peft's keys are those of a PeftModel around the backbone.
PEFT_PREFIX = "base_model.model."


def config_to_dict(config: PeftConfig) -> dict[str, Any]:
    """A peft config as plain JSON values; sets become sorted lists, so that equal configs give equal files."""

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, (set, frozenset)):
            return sorted(value)
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return value

    return plain(config.to_dict())


def config_from_dict(settings: Mapping[str, Any]) -> PeftConfig:
    """
    Raises:
        ValueError: if peft does not know the adapter's type.
    """
    try:
        return PeftConfig.from_peft_type(**settings)
    except KeyError as error:
        raise ValueError(f"unknown adapter type {settings.get('peft_type')!r}: peft has no such method") from error


def task_file(name: str) -> str:
    return f"task_{name}.safetensors"


def split_by_file(model: "VtaModel") -> dict[str, dict[str, Tensor]]:
    """{file: {key: tensor}} of decoders and heads."""
    files: dict[str, dict[str, Tensor]] = {file: {} for file in (DECODER_FILE, *map(task_file, model.task_names))}
    for part, path in (("decoder", "tasks."), ("heads", "")):
        for key, tensor in getattr(model, part).state_dict().items():
            names = [name for name in model.task_names if key.startswith(f"{path}{name}.")]
            files[task_file(names[0]) if names else DECODER_FILE][f"{part}.{key}"] = tensor.contiguous()
    return files


def adapter_weights(model: "VtaModel", name: str) -> dict[str, Tensor]:
    """{key: tensor} of the adapter, with the keys of peft's files."""
    # A backbone has no word embeddings; asked for them, peft would look its base model up on the Hub.
    weights = get_peft_model_state_dict(model.backbone, adapter_name=name, save_embedding_layers=False)
    return {f"{PEFT_PREFIX}{key}": tensor.contiguous() for key, tensor in weights.items()}


def save_adapter_files(model: "VtaModel", folder: Path, dtype: torch.dtype | None = None) -> None:
    if model.config.adapter is None or model.config.train_backbone:
        why = "has no adapter" if model.config.adapter is None else "also trains its backbone"
        raise ValueError(f"this model {why}, so adapter files would not hold what it learned: use save_pretrained")
    folder.mkdir(parents=True, exist_ok=True)
    name = model.backbone.active_adapters()[0]
    peft_config: Any = model.backbone.peft_config[name]
    settings = config_to_dict(peft_config) | {"inference_mode": True}
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    (folder / CONFIG_FILE).write_text(model.config.to_json_string(use_diff=True))
    for file, tensors in files_of(model).items():
        stored = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
        save_file(stored, folder / file, metadata={"format": "pt"})


def load_adapter_files(
    cls: type["VtaModel"],
    source: str | Path,
    backbone: str | Path | PreTrainedConfig | PreTrainedModel | None,
    tasks: Sequence[str] | None,
    **options: Any,
) -> tuple["VtaModel", AdapterReport]:
    options = hub_options(options)
    with readable_weight_errors(source):
        folder = fetch(source, [CONFIG_FILE, ADAPTER_CONFIG_FILE], **options)
        described = read_json(source, folder / CONFIG_FILE)
        settings = read_json(source, folder / ADAPTER_CONFIG_FILE) | {"inference_mode": False}
        config = VtaConfig.from_dict(described | {"adapter": settings})
    # A model of the adapter's own kind, without memory, says what the files must hold.
    own_config: Any = copy.deepcopy(config)
    own = build_on_meta(source, lambda: cls(own_config))
    task_names = own.task_names
    chosen = check_choice(tasks, task_names)
    expected = files_of(own)
    unread = {task_file(name) for name in task_names if name not in chosen}
    expected = {file: tensors for file, tensors in expected.items() if file not in unread}
    with readable_weight_errors(source):
        if folder != Path(source):
            # The same commit as the configs, which is the name of its folder in the cache.
            folder = fetch(source, expected, **options | {"revision": folder.name})
        # Headers first: no memory is given to what a file does not hold.
        for file, tensors in expected.items():
            check_shapes(source, folder / file, tensors)

    is_asked_for = backbone is not None
    if backbone is None:
        backbone = config.backbone_name_or_path
        if backbone is None:
            raise ValueError(
                f"the adapter in {str(source)!r} was trained on a backbone without a name (built from a config): pass "
                "that backbone, from_adapter(..., backbone=...)"
            )
    elsewhere = {name: value for name, value in options.items() if name not in ("revision", "force_download")}
    base = backbone if isinstance(backbone, PreTrainedModel) else load_backbone(backbone, **elsewhere)
    config.backbone_config = base.config
    config.backbone_name_or_path = settings["base_model_name_or_path"] = (
        str(backbone) if isinstance(backbone, (str, Path)) else getattr(backbone, "name_or_path", None) or None
    )
    # Only a backbone that was asked for may be another one than the adapter's own.
    config.adapter = settings_for(settings, own_config.backbone_config, base.config) if is_asked_for else settings
    config.tasks = [task.to_dict() for name in chosen for task in own.tasks if task.name == name]
    if config.adapter.get("tasks") is not None:
        config.adapter = config.adapter | {"tasks": chosen}
    model = cls(config, base)
    model.name_or_path = str(source)

    # Everything is read before the first tensor changes: a bad file leaves no half-loaded model.
    with readable_weight_errors(source):
        weights = {file: load_file(folder / file) for file in expected}
    if own.has_affinity and chosen != task_names:
        weights[ADAPTER_FILE] = keep_tasks(weights[ADAPTER_FILE], [task_names.index(name) for name in chosen])
    report = AdapterReport()
    for file, tensors in files_of(model).items():
        found = weights.pop(file, {})
        names: dict[str, str | None] = {key: key for key in found}
        if file == ADAPTER_FILE:
            names = dict(renamed_keys(list(found), PEFT_PREFIX, own, model))
        fitting = fit(found, names, tensors, report)
        if file == ADAPTER_FILE:
            name = model.backbone.active_adapters()[0]
            set_peft_model_state_dict(model.backbone, fitting, adapter_name=name)
        else:
            model.load_state_dict(fitting, strict=False)
    report.unexpected_keys.extend(key for found in weights.values() for key in found)
    if not report.is_complete:
        logger.warning("The adapter of %s on another backbone: %s", source, report)
    return model.eval(), report


def check_choice(tasks: Sequence[str] | None, task_names: list[str]) -> list[str]:
    """
    Raises:
        ValueError: if a task that is asked for is not the adapter's, or there is none or one twice.
    """
    if tasks is None:
        return task_names
    chosen = [tasks] if isinstance(tasks, str) else list(tasks)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(task_names):
        raise ValueError(f"tasks={chosen}; the adapter has {task_names}: give a list of these, each at most once")
    return chosen


def keep_tasks(weights: Mapping[str, Tensor], task_ids: list[int]) -> dict[str, Tensor]:
    """An adapter's weights for some of its tasks only, which then predict what they did among all."""
    prefix = next(key for key in weights if key.endswith(".vta_shared.affinity")).removesuffix("affinity")
    shared = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
    embedding_E = shared["task_embeddings.0"]
    # Half-precision files are mixed as the whole adapter does it: after loading, in float32.
    dtype = torch.promote_types(embedding_E.dtype, torch.float32)
    conditioning = TaskConditioning(len(shared["affinity"]), len(embedding_E)).to(dtype)
    conditioning.load_state_dict(shared)
    conditioning.keep_tasks(task_ids)
    others = {key: tensor for key, tensor in weights.items() if not key.startswith(prefix)}
    return others | {f"{prefix}{key}": tensor for key, tensor in conditioning.state_dict().items()}


def files_of(model: "VtaModel") -> dict[str, dict[str, Tensor]]:
    """{file: {key: tensor}} of an adapter's weight files."""
    files = split_by_file(model) | {ADAPTER_FILE: adapter_weights(model, model.backbone.active_adapters()[0])}
    return {file: tensors for file, tensors in files.items() if tensors}


def read_json(source: str | Path, file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{str(source)!r} has no {file.name}: it holds no adapter that save_adapter wrote")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file.name} of {str(source)!r} is damaged ({error}): get it again") from error
    return content


def check_shapes(source: str | Path, file: Path, expected: Mapping[str, Tensor]) -> None:
    """
    Raises:
        ValueError: if a weight file is missing, or its tensors are not those that the config describes.
    """
    if not file.is_file():
        raise ValueError(f"{str(source)!r} has no {file.name}; weights are read from safetensors files only")
    with safe_open(file, framework="pt") as tensors:
        shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
    wanted = {key: tuple(tensor.shape) for key, tensor in expected.items()}
    if shapes != wanted:
        key = sorted(key for key in shapes.keys() | wanted.keys() if shapes.get(key) != wanted.get(key))[0]
        raise ValueError(
            f"{file.name} of {str(source)!r} does not fit the model that its config describes: {key!r} has the shape "
            f"{shapes.get(key)}, expected {wanted.get(key)}: the files do not belong together"
        )
