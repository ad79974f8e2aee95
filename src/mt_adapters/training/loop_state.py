"""The state of a training run, and checkpoints that are complete or absent."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from mt_adapters.training.bad_samples import no_bad_samples

LAST = "last"
BEST_FILE = "best.safetensors"
WEIGHTS_FILE = "trained.safetensors"
MULTITASK_FILE = "multitask.safetensors"
STATE_FILE = "loop_state.json"


@dataclass
class LoopState:
    """Where the training stands; saved with every checkpoint.

    Args:
        step: optimiser steps done.
        best_step, best_score: the best evaluation so far (score: mean gain in percent, higher is better).
        history: results of all evaluations, {"step", "score", "results"}.
        affinity_history: {"step", "affinity" [source][target], "num_updates", "num_skipped" per task} on the way.
        bad_samples: how many frames were drawn and how many of them skipped, and why.
        seconds: time spent in training steps and evaluations, over all runs.
    """

    step: int = 0
    best_step: int | None = None
    best_score: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    affinity_history: list[dict[str, Any]] = field(default_factory=list)
    bad_samples: dict[str, Any] = field(default_factory=no_bad_samples)
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trainable parameters, and buffers (affinities)."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters = {name for name, _ in model.named_parameters()}
    return {
        key: tensor.detach().contiguous()
        for key, tensor in model.state_dict().items()
        if key in trainable or key not in parameters
    }


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes a file that is complete or not there."""
    temporary = file.with_name(f".{file.name}.partial")
    save_file(tensors, temporary, metadata={"format": "pt"})
    with open(temporary, "rb") as written:
        os.fsync(written.fileno())
    os.replace(temporary, file)


def load_trained(model: nn.Module, file: Path) -> None:
    """
    Raises:
        ValueError: if the file does not hold what this model trains.
    """
    found, expected = load_file(file), trained_state(model)
    shapes = {key: tensor.shape for key, tensor in found.items()}
    wanted = {key: tensor.shape for key, tensor in expected.items()}
    if shapes != wanted:
        key = sorted(key for key in shapes.keys() | wanted.keys() if shapes.get(key) != wanted.get(key))[0]
        raise ValueError(
            f"{str(file)!r} is of another model: {key!r} has the shape {shapes.get(key)}, expected {wanted.get(key)}. "
            "Resume with the settings that the run began with, or choose another output_dir"
        )
    model.load_state_dict(found, strict=False)


def register_checkpoint_files(
    accelerator: Accelerator, state: LoopState, scheduler: LRScheduler, multitask: nn.Module
) -> None:
    """Makes Accelerate's checkpoints hold the loop's state, TROA's and balancing's, and of the model what is trained.

    The frozen backbone is most of the model and never changes.
    """

    def save(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        if accelerator.is_main_process:
            save_file(trained_state(accelerator.unwrap_model(models[0])), Path(folder) / WEIGHTS_FILE)
            save_file(multitask.state_dict(), Path(folder) / MULTITASK_FILE)
            # As JSON: Accelerate's own way for registered objects unpickles whatever the file holds.
            states = {"loop": state.state_dict(), "scheduler": scheduler.state_dict()}
            (Path(folder) / STATE_FILE).write_text(json.dumps(states))
        weights.clear()

    def load(models: list[nn.Module], folder: str) -> None:
        load_trained(accelerator.unwrap_model(models.pop()), Path(folder) / WEIGHTS_FILE)
        load_trained(multitask, Path(folder) / MULTITASK_FILE)
        states = json.loads((Path(folder) / STATE_FILE).read_text())
        state.load_state_dict(states["loop"])
        scheduler.load_state_dict(states["scheduler"])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """Replaces the last checkpoint: written under another name first, so that a kill at any moment leaves one."""
    new, old = folder / f".{LAST}.partial", folder / f".{LAST}.old"
    if accelerator.is_main_process:
        shutil.rmtree(new, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(new), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if (folder / LAST).exists():
            # Only now: where `last` is missing, `old` is the one complete checkpoint.
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder / LAST, old)
        os.rename(new, folder / LAST)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, folder: Path) -> bool:
    """Restores the last complete checkpoint; False if there is none."""
    # A kill between the two renames of save_checkpoint leaves the previous one under its other name.
    candidates = [folder / LAST, folder / f".{LAST}.old"]
    found = next((candidate for candidate in candidates if candidate.is_dir()), None)
    if found is None:
        return False
    accelerator.load_state(str(found))
    return True


def load_best(model: nn.Module, folder: Path) -> None:
    load_trained(model, folder / BEST_FILE)


def finite_or_error(losses: dict[str, Tensor], step: int) -> dict[str, float]:
    """
    Raises:
        ValueError: if a loss is NaN or infinite; names the task and the step.
    """
    values = dict(zip(losses, torch.stack([loss.detach().float() for loss in losses.values()]).tolist(), strict=True))
    bad = [name for name, value in values.items() if value != value or abs(value) == float("inf")]
    if bad:
        raise ValueError(
            f"the loss of {bad} is not finite in step {step + 1}: {values}. Lower learning_rate, use bf16 or no mixed "
            "precision instead of fp16, or look for wrong labels; --resume goes on from the last checkpoint"
        )
    return values
