"""The record of a model: what it is, read off the model itself, and what was measured with these very weights."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RECORD_FILE = "metrics.json"


def public_name(backbone: str | None) -> str | None:
    """A backbone's name that others can use: None for a folder of this machine."""
    return None if backbone is None or Path(backbone).is_dir() else backbone


def describe(model: Any, base_model: str | None = None) -> dict[str, Any]:
    """What a record holds of a `VtaModel` without measuring anything.

    `base_model` is the Hub id of its backbone, if that was loaded from a folder. `weights` is a digest of all tensors:
    a record with another one was not measured with this model.
    """
    config = model.config
    adapter = config.adapter or {}
    return {
        "tasks": {task.name: task.kind for task in model.tasks},
        "heads": [task.to_dict() for task in model.tasks],
        "classes": [config.id2label[key] for key in sorted(config.id2label)] if config.id2label else None,
        "backbone": config.backbone_config.model_type,
        "base_model": base_model or public_name(config.backbone_name_or_path),
        "is_pretrained": config.backbone_name_or_path is not None,
        "train_backbone": config.train_backbone,
        "adapter": adapter.get("peft_type"),
        "train_adapted_blocks": bool(adapter.get("train_adapted_blocks")),
        "decoder": config.decoder,
        "parameters": model.parameter_report(),
        "affinity": model.affinity.tolist() if model.has_affinity else None,
        "versions": {name: version(name) for name in ("mt-adapters", "torch", "transformers", "peft", "accelerate")},
        "weights": weights_digest(model),
    }


@torch.no_grad()
def weights_digest(model: Any) -> str:
    """SHA-256 of a model's tensors, their names, types and shapes, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_record(run_folder: str | Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: if the folder has no readable record.
    """
    file = Path(run_folder) / RECORD_FILE
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(run_folder)!r} has no readable {RECORD_FILE} ({error}); give the folder that "
            "examples/train_multitask.py wrote"
        ) from error


def measured_record(described: Mapping[str, Any], run_folder: str | Path) -> dict[str, Any]:
    """The record of a run, if its results are those of the model that `describe` described.

    Raises:
        ValueError: if there is no record, or it was measured with other weights.
    """
    record = read_record(run_folder)
    if record.get("weights") != described["weights"]:
        raise ValueError(
            f"the results in {str(run_folder)!r} were measured with other weights than this model has, so its card "
            "may not show them: push the model as it was saved there, or leave run_folder out"
        )
    return record
