"""What is not labelled adds nothing: a batch with missing labels teaches what the same batch without them teaches."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from mt_adapters import VtaModel
from mt_adapters.data import AugmentedDataset, BadSampleError, EvalTransform, MultitaskCollator
from mt_adapters.metrics import get_metric
from mt_adapters.tasks import get_task
from mt_adapters.training.arguments import MultitaskArguments
from mt_adapters.training.step import MultitaskStep
from tiny_models import ALL_TASKS, FAMILIES, make_images, make_labels, make_model

BATCH_SIZE = 6
TASKS = [get_task(name, num_labels=5) for name in ALL_TASKS]
Batch = tuple[Tensor, dict[str, Tensor]]


def double_model(family: str) -> VtaModel:
    torch.manual_seed(0)
    model = make_model(family, backbone_changes={FAMILIES[family].drop_path: 0.0})
    # A fresh adapter is a no-op, and its gradients are zero.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    return model.double().train()


def whole_batch(family: str) -> Batch:
    size = FAMILIES[family].size
    labels = make_labels(size, BATCH_SIZE)
    return make_images(size, BATCH_SIZE).double(), {name: as_double(label) for name, label in labels.items()}


def as_double(label: Tensor) -> Tensor:
    return label.double() if label.is_floating_point() else label


def without_labels(batch: Batch, missing: dict[str, list[int]]) -> Batch:
    labels = {name: label.clone() for name, label in batch[1].items()}
    for task in TASKS:
        for index in missing.get(task.name, []):
            labels[task.name][index] = task.no_label(*batch[0].shape[-2:])
    return batch[0], labels


def only(batch: Batch, indices: list[int], *names: str) -> Batch:
    return batch[0][indices], {name: batch[1][name][indices] for name in names}


def gradients(family: str, *batches: Batch, **arguments: Any) -> dict[str, Tensor]:
    model = double_model(family)
    step = MultitaskStep(
        model, model, Accelerator(cpu=True), MultitaskArguments(**{"affinity_interval": 0} | arguments)
    )
    step.begin(0, [labels for _, labels in batches])
    for images, labels in batches:
        step.backward(images, labels)
    step.finish()
    step.observe()
    # Accelerate divides by the passes of a step only where it is told of them.
    return {
        name: parameter.grad / len(batches)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def add(*parts: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {name for part in parts for name in part}
    return {name: sum(part[name] for part in parts if name in part) for name in names}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-6 of each tensor's gradient; those that are small for cancellation, to 1e-8 of the whole gradient."""
    total = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    assert total > 0
    for name in found.keys() | expected.keys():
        difference = found.get(name, torch.zeros(())) - expected.get(name, torch.zeros(()))
        assert difference.norm() <= max(1e-6 * expected.get(name, torch.zeros(())).norm(), 1e-8 * total), name


@pytest.mark.parametrize("task", ALL_TASKS)
@pytest.mark.parametrize("family", ["swin", "dinov2"])
def test_frames_without_a_label_do_not_change_the_gradient_of_its_task(family: str, task: str) -> None:
    batch = whole_batch(family)
    partly = without_labels(batch, {task: [1, 2, 5]})
    found = gradients(family, (partly[0], {task: partly[1][task]}))
    assert_equal(found, gradients(family, only(batch, [0, 3, 4], task)))


def test_one_label_per_frame_gives_the_sum_of_the_tasks_own_batches() -> None:
    batch = whole_batch("swin")
    owners = {"semseg": [0, 5], "depth": [1], "normals": [2, 4], "edges": [3]}
    missing = {name: [i for i in range(BATCH_SIZE) if i not in indices] for name, indices in owners.items()}
    found = gradients("swin", without_labels(batch, missing))
    expected = [gradients("swin", only(batch, indices, name)) for name, indices in owners.items()]
    assert_equal(found, add(*expected))


@pytest.mark.parametrize("similarity", ["cosine", "fisher", "spatial"])
def test_a_task_runs_only_on_the_frames_that_it_is_labelled_for(similarity: str) -> None:
    batch = whole_batch("swin")
    owners = {"semseg": [0, 5], "depth": [1], "normals": [0, 1, 2, 3, 4, 5], "edges": []}
    missing = {name: [i for i in range(BATCH_SIZE) if i not in indices] for name, indices in owners.items()}
    model = double_model("swin")
    num_run = dict.fromkeys(ALL_TASKS, 0)
    decode = model.decode

    def counting(shared: Any, name: str) -> Tensor:
        num_run[name] += len(shared.tokens.hidden)
        return decode(shared, name)

    model.decode = counting  # type: ignore[method-assign]
    arguments = MultitaskArguments(affinity_interval=1, affinity_similarity=similarity)
    step = MultitaskStep(model, model, Accelerator(cpu=True), arguments)
    images, labels = without_labels(batch, missing)
    step.begin(0, [labels])
    step.backward(images, labels)
    step.finish()
    # One image stands for those of a task without any label, whose gradients are then zero.
    assert num_run == {"semseg": 2, "depth": 1, "normals": 6, "edges": 1}
    assert model.heads["edges"].weight.grad.abs().max() == 0


# Their scale is found batch by batch, as it is in one process: the losses that are plain means over pixels.
MEANS = ["semseg", "normals"]


@pytest.mark.parametrize("task", MEANS)
def test_labels_in_one_of_two_accumulated_batches_count_as_in_one_batch(task: str) -> None:
    batch = without_labels(whole_batch("swin"), {task: [0, 3, 4, 5]})
    parts = [only(batch, indices, task) for indices in ([0, 1, 2], [3, 4, 5])]
    assert_equal(gradients("swin", *parts), gradients("swin", only(batch, [1, 2], task)))


@pytest.mark.parametrize("task", MEANS)
def test_uneven_labels_of_accumulated_batches_weigh_by_their_pixels(task: str) -> None:
    batch = without_labels(whole_batch("swin"), {task: [0]})
    parts = [only(batch, indices, task) for indices in ([0, 1, 2], [3, 4, 5])]
    assert_equal(gradients("swin", *parts), gradients("swin", only(batch, [1, 2, 3, 4, 5], task)))


@pytest.mark.parametrize("missing", [{}, {"depth": [0, 1, 2, 3, 4, 5]}], ids=["labelled", "one task not at all"])
def test_balancing_is_shown_the_losses_of_what_is_labelled(missing: dict[str, list[int]]) -> None:
    batch = without_labels(whole_batch("swin"), missing | {"normals": [0, 1, 2, 3]})
    model = double_model("swin")
    step = MultitaskStep(model, model, Accelerator(cpu=True), MultitaskArguments(affinity_interval=0, balancing="dwa"))
    seen: list[tuple[Tensor, Tensor]] = []
    step.balancing.observe = lambda *values: seen.append(values)  # type: ignore[method-assign]
    parts = [only(batch, indices, *ALL_TASKS) for indices in ([0, 1, 2], [3, 4, 5])]
    step.begin(0, [labels for _, labels in parts])
    for part in parts:
        step.backward(*part)
    step.finish()
    step.observe()
    losses_T, labelled_T = seen[0]
    assert labelled_T.tolist() == [name not in missing for name in ALL_TASKS]
    with torch.no_grad():
        logits = model(batch[0][[4, 5]]).logits["normals"]
    expected = model.tasks[2].loss(logits, batch[1]["normals"][[4, 5]])
    assert losses_T[2].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_metrics_of_a_set_with_missing_labels_are_those_of_the_set_without_them(task: Any) -> None:
    size = (32, 40)
    label = make_labels(size, BATCH_SIZE)[task.name]
    torch.manual_seed(1)
    prediction = task.predict(torch.randn(BATCH_SIZE, task.num_channels, *size))
    partly = label.clone()
    for index in (1, 4):
        partly[index] = task.no_label(*size)
    metrics = [get_metric(task), get_metric(task)]
    metrics[0].update(prediction, partly)
    kept = [0, 2, 3, 5]
    metrics[1].update(prediction[kept], label[kept])
    assert metrics[0].compute() == metrics[1].compute()


def test_a_bad_frame_that_is_skipped_teaches_nothing() -> None:
    """As the loader gives it: a black image without any label."""
    batch = whole_batch("swin")
    size = FAMILIES["swin"].size

    class Frames:
        def __getitem__(self, index: int) -> dict[str, Any]:
            raise BadSampleError("damaged")

    sample = AugmentedDataset(Frames(), EvalTransform(TASKS, size), skip_bad=True)[(0, 0)]
    skipped = MultitaskCollator(TASKS)([sample])
    images = torch.cat([batch[0], skipped["pixel_values"].double()])
    labels = {name: torch.cat([label, as_double(skipped["labels"][name])]) for name, label in batch[1].items()}
    assert_equal(gradients("swin", (images, labels)), gradients("swin", batch))
