import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.utils.data import Dataset

from mt_adapters.tasks import get_task
from mt_adapters.training.evaluation import (
    InputBlind,
    eval_loader,
    evaluate,
    input_blind_results,
    mean_gain,
)
from tiny_models import ALL_TASKS, NUM_LABELS, make_images, make_labels, make_model

SIZE = 64
TASKS = [get_task(name, num_labels=NUM_LABELS) for name in ALL_TASKS]


class Made(Dataset):
    """Images with labels of `tasks` only."""

    def __init__(self, num_images: int, tasks: tuple[str, ...] = ALL_TASKS) -> None:
        self.images = (make_images((SIZE, SIZE), num_images) * 50 + 128).clamp(0, 255).to(torch.uint8)
        self.labels = {name: label for name, label in make_labels((SIZE, SIZE), num_images).items() if name in tasks}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "labels": {name: label[index] for name, label in self.labels.items()}}


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_the_input_blind_maps_are_those_of_an_independent_computation() -> None:
    labels = make_labels((6, 5), batch_size=7)
    labels["depth"][0, 4, 4], labels["edges"][:, 5, 4], labels["semseg"][:, 5, 4] = math.nan, math.nan, 255
    # A pixel that has no label in one image only is averaged over the others.
    labels["depth"][1, 5, 0], labels["edges"][2, 4, 0] = 0.0, math.nan
    predictor = InputBlind(TASKS)
    for start in (0, 3):
        predictor.add({name: label[start : start + 3 + start] for name, label in labels.items()})
    maps = {task.name: predictor.predict(task).numpy() for task in TASKS}
    for row in range(6):
        for column in range(5):
            ids = [int(i) for i in labels["semseg"][:, row, column] if i != 255]
            votes = [ids.count(label) for label in range(NUM_LABELS)]
            assert maps["semseg"][row, column] == votes.index(max(votes))
            metres = [float(d) for d in labels["depth"][:, row, column] if d > 0]
            assert maps["depth"][row, column] == pytest.approx(np.mean(metres) if metres else 1e-3, rel=1e-6)
            shares = [float(e) for e in labels["edges"][:, row, column] if not math.isnan(e)]
            assert maps["edges"][row, column] == pytest.approx(np.mean(shares) if shares else 0, rel=1e-6)
            vector = labels["normals"][:, :, row, column].double().numpy().sum(axis=0)
            found = maps["normals"][:, row, column]
            assert np.dot(found, vector) >= (1 - 1e-6) * np.linalg.norm(found) * np.linalg.norm(vector)


def test_the_input_blind_results_are_metrics_of_the_mean_map() -> None:
    train, validation = Made(5), Made(3)
    results = input_blind_results(train, validation, TASKS, SIZE)
    mean = train.labels["depth"][:, 3:].double().numpy().mean(axis=0)
    truth = validation.labels["depth"][:, 3:].double().numpy()
    assert results["depth"]["rmse"] == pytest.approx(np.sqrt(((mean - truth) ** 2).mean()), rel=1e-6)
    assert results["depth"]["abs_rel"] == pytest.approx((np.abs(mean - truth) / truth).mean(), rel=1e-6)
    ids = train.labels["semseg"][:, 3:].numpy()
    winners = np.stack([(ids == label).sum(axis=0) for label in range(NUM_LABELS)]).argmax(axis=0)
    right = (winners == validation.labels["semseg"][:, 3:].numpy()).mean()
    assert results["semseg"]["pixel_accuracy"] == pytest.approx(right, rel=1e-9)


def test_evaluate_gives_the_metrics_of_a_computation_by_hand(accelerator: Accelerator) -> None:
    model = make_model("swin")
    model.train()
    dataset = Made(5)
    loader = eval_loader(dataset, model.tasks, SIZE, batch_size=2)
    results = evaluate(model, accelerator.prepare(loader), accelerator)
    assert model.training

    model.eval()
    with torch.no_grad():
        logits = model(torch.cat([batch["pixel_values"] for batch in loader])).logits
    labels = {name: label[..., 3:, :].double().numpy() for name, label in dataset.labels.items()}
    maps = {task.name: task.predict(logits[task.name])[..., 3:, :].double().numpy() for task in model.tasks}
    error = maps["depth"] - labels["depth"]
    assert results["depth"]["rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
    assert results["depth"]["abs_rel"] == pytest.approx((np.abs(error) / labels["depth"]).mean(), rel=1e-5)
    ratio = np.maximum(maps["depth"] / labels["depth"], labels["depth"] / maps["depth"])
    assert results["depth"]["delta1"] == pytest.approx((ratio < 1.25).mean(), abs=1e-3)
    cosine = (maps["normals"] * labels["normals"]).sum(axis=1) / np.linalg.norm(maps["normals"], axis=1)
    assert results["normals"]["mean_angle"] == pytest.approx(np.degrees(np.arccos(cosine)).mean(), rel=1e-4)
    assert results["semseg"]["pixel_accuracy"] == pytest.approx((maps["semseg"] == labels["semseg"]).mean(), abs=1e-4)
    ious = []
    for label in range(NUM_LABELS):
        found, true = maps["semseg"] == label, labels["semseg"] == label
        ious.append((found & true).sum() / (found | true).sum())
    assert results["semseg"]["miou"] == pytest.approx(np.mean(ious), abs=1e-4)
    assert results["edges"]["l1"] == pytest.approx(np.abs(maps["edges"] - labels["edges"]).mean(), rel=1e-4)


def test_the_size_of_the_batches_does_not_change_a_digit_of_fixed_predictions(accelerator: Accelerator) -> None:
    dataset = Made(5)

    class Fixed(torch.nn.Module):
        tasks = TASKS

        def forward(self, pixel_values: Tensor) -> Any:
            class Output:
                # Computed pixel by pixel: no sum whose order depends on the batch.
                logits = {task.name: pixel_values[:, :1].repeat(1, task.num_channels, 1, 1) + 1 for task in TASKS}

            return Output

    results = [evaluate(Fixed(), eval_loader(dataset, TASKS, SIZE, size), accelerator) for size in (1, 2, 5)]
    assert results[0] == results[1] == results[2]


def test_a_task_without_any_label_has_no_figures_and_no_say_in_the_mean_gain(accelerator: Accelerator) -> None:
    labelled = ("semseg", "depth", "normals")
    model = make_model("swin")
    dataset = Made(3, labelled)
    results = evaluate(model, eval_loader(dataset, model.tasks, SIZE, 2), accelerator)
    assert all(math.isnan(value) for value in results["edges"].values())
    assert all(math.isfinite(value) for name in labelled for value in results[name].values())
    baseline = input_blind_results(dataset, dataset, model.tasks, SIZE)
    gain = mean_gain(results, baseline, model.tasks)
    assert math.isfinite(gain)
    assert gain == mean_gain(results, baseline, model.tasks[:3])


def test_the_mean_gain_is_the_mean_over_the_tasks_and_higher_is_better() -> None:
    baseline = {"semseg": {"miou": 0.5}, "depth": {"rmse": 2.0}}
    better = {"semseg": {"miou": 0.75}, "depth": {"rmse": 1.0}}
    assert mean_gain(better, baseline, TASKS[:2]) == pytest.approx(50.0)
    assert mean_gain(baseline, better, TASKS[:2]) == pytest.approx(100 * (-1 / 3 - 1) / 2)
    zero = {"semseg": {"miou": 0.0}, "depth": {"rmse": 2.0}}
    assert mean_gain(better, zero, TASKS[:2]) == pytest.approx(50.0)
    assert math.isnan(mean_gain(better, {"semseg": {"miou": math.nan}}, TASKS[:1]))
