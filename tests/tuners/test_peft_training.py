"""Training a VTA adapter with peft alone: the samples of one batch may belong to different tasks."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from mt_adapters import VtaAdapterConfig
from mt_adapters.troa import average_weights
from mt_adapters.tuners.vta import find_context
from tiny_models import ALL_TASKS, FAMILIES, make_backbone, make_images, randomize

some_families = pytest.mark.parametrize("family", ["swin", "dinov2", "segformer"])


def adapt(family: str) -> Any:
    return randomize(get_peft_model(make_backbone(family), VtaAdapterConfig(tasks=list(ALL_TASKS))))


def hidden_of(model: nn.Module, images: Tensor, task_ids: list[int]) -> Tensor:
    return model(images, task_ids=torch.tensor(task_ids)).last_hidden_state


def gradients(model: nn.Module, images: Tensor, task_ids: list[int], weights: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (hidden_of(model, images, task_ids).square() * weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batchs_gradient_is_the_sum_of_its_samples_gradients(family):
    model, images = adapt(family).double(), make_images(FAMILIES[family].size, 3).double()
    task_ids = [2, 0, 3]
    weights = torch.randn_like(hidden_of(model, images, task_ids).detach())
    mixed = gradients(model, images, task_ids, weights)
    total = {name: torch.zeros_like(gradient) for name, gradient in mixed.items()}
    for sample, task in enumerate(task_ids):
        one = slice(sample, sample + 1)
        for name, gradient in gradients(model, images[one], [task], weights[one]).items():
            total[name] += gradient
    for name, gradient in mixed.items():
        assert gradient.any(), name
        error = (gradient - total[name]).norm() / total[name].norm()
        assert error < 1e-10, f"{name}: {error}"


@some_families
def test_only_embeddings_of_tasks_that_act_in_the_batch_get_a_gradient(family):
    model, images = adapt(family).double(), make_images(FAMILIES[family].size).double()
    conditioning = find_context(model).conditioning["default"]
    helps = torch.eye(4)
    helps[1, 2] = 0.5  # [source, target]
    for affinity_TT, acting in ((torch.eye(4), [0, 2]), (helps, [0, 1, 2])):
        conditioning.set_affinity(affinity_TT, average_weights(affinity_TT))
        gradients(model, images, [2, 0], torch.ones(1))
        found = [task for task, row in enumerate(conditioning.task_embeddings) if row.grad.any()]
        assert found == acting


@some_families
def test_training_with_mixed_tasks_beats_what_no_task_blind_adapter_can(family):
    images = make_images(FAMILIES[family].size, 1).expand(4, -1, -1, -1)
    backbone = make_backbone(family)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with torch.no_grad():
        plain = backbone(images).last_hidden_state
    # Of the same image each task wants a shift of its own.
    channels = plain.shape[1 if plain.ndim == 4 else 2]
    shifts = torch.randn(4, channels, *[1] * (plain.ndim - 2)).movedim(1, 1 if plain.ndim == 4 else -1)
    target = plain + 0.5 * shifts
    model = get_peft_model(backbone, VtaAdapterConfig(tasks=list(ALL_TASKS))).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (hidden_of(model, images, [2, 0, 3, 1]) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    task_blind = (target - target.mean(dim=0)).square().mean()
    assert losses[-1] < task_blind < losses[0]
    base = model.unload()
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_a_disabled_adapter_does_not_train_and_trains_again_afterwards():
    backbone, images = make_backbone("dinov2"), make_images(FAMILIES["dinov2"].size)
    with torch.no_grad():
        expected = backbone(images).last_hidden_state
    model = randomize(get_peft_model(backbone, VtaAdapterConfig(tasks=list(ALL_TASKS)))).train()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with model.disable_adapter():
        hidden = hidden_of(model, images, [2, 0])
        assert not hidden.requires_grad
        assert torch.equal(hidden, expected)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert all(gradient.any() for gradient in gradients(model, images, [2, 0], torch.ones(1)).values())
