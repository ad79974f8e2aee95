"""Metrics of a model over a data set, and of the predictor that never looks at the image.

Shape suffixes: B batch, K channels or classes, H height, W width.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mt_adapters.data import AugmentedDataset, EvalTransform, Mixture, MultitaskCollator
from mt_adapters.metrics import METRICS, delta_m, get_metric
from mt_adapters.models.vta.modeling_vta import VtaModel
from mt_adapters.tasks import Task

Results = dict[str, dict[str, float]]

# Of the training set, whose millions of frames would say no more about its mean.
BASELINE_FRAMES = 5000


def eval_loader(
    dataset: Dataset,
    tasks: Sequence[Task],
    image_size: int,
    batch_size: int,
    num_workers: int = 0,
    skip_bad: bool = False,
    num_frames: int | None = None,
) -> DataLoader:
    """Batches of the whole data set in its own order, or of `num_frames` spread evenly over it."""
    mixture = Mixture.of(dataset, {task.name: task.kind for task in tasks})
    total = len(mixture)
    num_frames = total if num_frames is None else min(num_frames, total)
    return DataLoader(
        AugmentedDataset(mixture, EvalTransform(tasks, (image_size, image_size)), skip_bad=skip_bad),
        batch_size=batch_size,
        sampler=[(0, number * total // num_frames) for number in range(num_frames)],
        collate_fn=MultitaskCollator(tasks),
        num_workers=num_workers,
    )


@torch.no_grad()
def evaluate(model: VtaModel, loader: Iterable[dict[str, Any]], accelerator: Accelerator) -> Results:
    """{task: {metric: value}}, the same on every process and for any number of processes.

    Every process sees its share of the loader's batches, uneven at the end; metrics are sums, added up at the end.
    """
    was_training = model.training
    model.eval()
    metrics = {task.name: get_metric(task).to(accelerator.device) for task in model.tasks}
    for batch in tqdm(loader, desc="evaluate", leave=False):
        with accelerator.autocast():
            logits = model(batch["pixel_values"]).logits
        for task in model.tasks:
            metrics[task.name].update(task.predict(logits[task.name]), batch["labels"][task.name])
    model.train(was_training)
    return {name: metric.compute() for name, metric in metrics.items()}


class InputBlind:
    """Predicts the training set's mean map, or most frequent class, at every pixel: what a model must beat."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, labels: Mapping[str, Tensor]) -> None:
        """Adds a batch of training labels {task: (B,...)}."""
        for task in self.tasks:
            label = labels[task.name]
            if task.kind == "semseg":
                ids_BHW = torch.where(label == task.unlabelled, task.num_channels, label)
                one_hot_KHW = torch.zeros(task.num_channels + 1, *label.shape[1:], dtype=torch.float64)
                one_hot_KHW.scatter_add_(0, ids_BHW, torch.ones(label.shape, dtype=torch.float64))
                value, known = one_hot_KHW[:-1], torch.ones((), dtype=torch.float64)
            else:
                value = label.nan_to_num(0.0).double().sum(dim=0)
                known = task.labelled(label).double().sum(dim=0)
            self._sums[task.name] = self._sums.get(task.name, 0) + value
            self._counts[task.name] = self._counts.get(task.name, 0) + known

    def predict(self, task: Task) -> Tensor:
        """The map (...,H,W) that is predicted for every image."""
        if task.kind == "semseg":
            return self._sums[task.name].argmax(dim=0)
        mean = self._sums[task.name] / self._counts[task.name].clamp(min=1)
        return mean.float().clamp(min=1e-3) if task.kind == "depth" else mean.float()

    def evaluate(self, loader: Iterable[dict[str, Any]]) -> Results:
        # Every process sees all the data here, so nothing is to be added up.
        metrics = {task.name: get_metric(task, sync_on_compute=False) for task in self.tasks}
        maps = {task.name: self.predict(task) for task in self.tasks}
        for batch in loader:
            for name, metric in metrics.items():
                label = batch["labels"][name]
                metric.update(maps[name].expand_as(label), label)
        return {name: metric.compute() for name, metric in metrics.items()}


def input_blind_results(
    train: Dataset,
    validation: Dataset,
    tasks: Sequence[Task],
    image_size: int,
    num_workers: int = 0,
    skip_bad: bool = False,
) -> Results:
    """Results on the validation set of what at most `BASELINE_FRAMES` training frames, spread evenly, are like."""
    predictor = InputBlind(tasks)
    for batch in eval_loader(train, tasks, image_size, 16, num_workers, skip_bad, BASELINE_FRAMES):
        predictor.add(batch["labels"])
    return predictor.evaluate(eval_loader(validation, tasks, image_size, 16, num_workers, skip_bad))


def mean_gain(results: Results, baseline: Results, tasks: Sequence[Task]) -> float:
    """Mean relative gain over a baseline in percent, over the tasks' primary metrics; higher is better.

    A task whose baseline is zero or NaN (no label in the set) has no relative gain and is left out; NaN if all are.
    """
    kinds = {task.name: task.kind for task in tasks}
    usable = {}
    for name, kind in kinds.items():
        value = baseline[name][METRICS[kind].primary]
        if value != 0 and math.isfinite(value):
            usable[name] = kind
    return delta_m(results, baseline, usable) if usable else math.nan
