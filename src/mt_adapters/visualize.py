"""Pictures of what a model predicts and of how its tasks help each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import Dataset
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mt_adapters.data import EvalTransform, Mixture
from mt_adapters.models.vta.modeling_vta import VtaModel


def pixels_to_picture(pixel_values_3HW: Tensor) -> np.ndarray:
    """Normalised pixel values (3,H,W) back to a picture (H,W,3) uint8."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    picture_3HW = (pixel_values_3HW.cpu().float() * std + mean).clamp(0, 1)
    return (picture_3HW.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


@torch.no_grad()
def plot_predictions(
    model: VtaModel, dataset: Dataset, indices: Sequence[int], image_size: int, file: str | Path
) -> None:
    """Writes a PNG: for each sample its image and, for each task, the prediction over the truth.

    Depth of a prediction is coloured with the range of its truth; no label is black.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    transform = EvalTransform(model.tasks, (image_size, image_size))
    dataset = Mixture.of(dataset, {task.name: task.kind for task in model.tasks})
    columns = 1 + len(model.tasks)
    figure = Figure(figsize=(1.9 * columns, 3.9 * len(indices)), layout="constrained")
    axes = figure.subplots(2 * len(indices), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, index in enumerate(indices):
        sample: dict[str, Any] = transform(dataset[index])
        top, bottom = axes[2 * number], axes[2 * number + 1]
        logits = model(sample["pixel_values"].unsqueeze(0).to(device)).logits
        top[0].imshow(pixels_to_picture(sample["pixel_values"]))
        top[0].set_title("image", fontsize=9)
        for task, above, below in zip(model.tasks, top[1:], bottom[1:], strict=True):
            prediction = task.predict(logits[task.name])[0].cpu()
            truth = sample["labels"].get(task.name, task.no_label(image_size, image_size))
            above.imshow(task.colorize(prediction, like=truth).numpy())
            below.imshow(task.colorize(truth).numpy())
            above.set_title(f"{task.name}: prediction", fontsize=9)
            below.set_title("truth", fontsize=9)
    figure.savefig(file, dpi=110)
    model.train(was_training)


def plot_affinity(affinity_TT: Tensor, task_names: Sequence[str], file: str | Path) -> None:
    """Writes a PNG of the task affinities: row = source (who helps), column = target (who is helped)."""
    size = 1.6 + 0.7 * len(task_names)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(affinity_TT.cpu().numpy(), vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(image, ax=axis, fraction=0.046, label="affinity")
    ticks = range(len(task_names))
    axis.set_xticks(ticks, task_names, rotation=45, ha="right")
    axis.set_yticks(ticks, task_names)
    axis.set_xlabel("target (is helped)")
    axis.set_ylabel("source (helps)")
    for source in ticks:
        for target in ticks:
            value = affinity_TT[source, target].item()
            axis.text(
                target, source, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.5 else "white"
            )
    figure.savefig(file, dpi=110, bbox_inches="tight")


def plot_affinity_history(history: Sequence[Mapping[str, Any]], task_names: Sequence[str], file: str | Path) -> None:
    """Writes a PNG with a panel per target task: how much each source helps it, over the training.

    `history` holds {"step": int, "affinity": rows of [source][target]}.
    """
    figure = Figure(figsize=(1.0 + 2.4 * len(task_names), 2.8), layout="constrained")
    axes = figure.subplots(1, len(task_names), sharey=True, squeeze=False)[0]
    steps = [entry["step"] for entry in history]
    for target, axis in enumerate(axes):
        for source, name in enumerate(task_names):
            values = [entry["affinity"][source][target] for entry in history]
            axis.plot(steps, values, label=name, marker="." if len(steps) < 3 else None)
        axis.set_title(f"target: {task_names[target]}", fontsize=9)
        axis.set_xlabel("step")
        axis.set_ylim(-0.02, 1.02)
    axes[0].set_ylabel("affinity")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", title="source", fontsize=8)
    figure.savefig(file, dpi=110)
