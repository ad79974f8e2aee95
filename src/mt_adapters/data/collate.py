"""Transformed samples to one batch in which every task is present."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate

from mt_adapters.tasks import Task


class MultitaskCollator:
    """Stacks samples; where one lacks the label of a task, it gets "no label" at every pixel.

    Called with samples `{"pixel_values": (3, h, w), "labels": {task name: (..., h, w)}}` it returns
    `{"pixel_values": (B, 3, h, w), "labels": {task name: (B, ..., h, w)}, "problems": [...]}`. Labels of other tasks
    are left out; "problems" are the samples' own ("problem"), of frames that were skipped.

    Args:
        tasks: the tasks of the batch, all of which it will have.

    Raises:
        ValueError: images of different sizes, or a label whose height and width are not its image's.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tuple(tasks)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        sizes = {tuple(sample["pixel_values"].shape) for sample in samples}
        if len(sizes) != 1:
            raise ValueError(f"A batch needs images of one size, got {sorted(sizes)}; resize them in the transform.")
        return {
            # In a worker process default_collate stacks into the memory that it shares with the main process.
            "pixel_values": default_collate([sample["pixel_values"] for sample in samples]),
            "labels": {
                task.name: default_collate([_label(sample, task) for sample in samples]) for task in self.tasks
            },
            "problems": [sample["problem"] for sample in samples if "problem" in sample],
        }


def _label(sample: Mapping[str, Any], task: Task) -> Tensor:
    height, width = sample["pixel_values"].shape[-2:]
    if task.name not in sample["labels"]:
        return task.no_label(height, width)
    label = sample["labels"][task.name]
    if label.shape[-2:] != (height, width):
        raise ValueError(
            f"The label of task {task.name!r} is {tuple(label.shape)}, but its image is {height} x {width}; labels "
            "and image must go through the same transform."
        )
    return label
