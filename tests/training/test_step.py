"""A training step gives every task's gradient on the way, and the gradients of one joint backward pass at the end."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tests.tiny_models import ALL_TASKS, FAMILIES, make_images, make_labels, make_model
from torch import Tensor

from mt_adapters import VtaModel
from mt_adapters.training.arguments import MultitaskArguments
from mt_adapters.training.step import MultitaskStep

GRADIENT_SIMILARITIES = ("cosine", "split", "lookahead", "fisher")
SIMILARITIES = (*GRADIENT_SIMILARITIES, "spatial")
WEIGHTED_TASKS = [*ALL_TASKS[:3], {"name": "edges", "weight": 3.0}]


def make_training_model(family: str, **settings: Any) -> VtaModel:
    torch.manual_seed(0)
    return make_model(family, **({"tasks": WEIGHTED_TASKS} | settings)).train()


def make_batch(family: str, batch_size: int = 4) -> tuple[Tensor, dict[str, Tensor]]:
    size = FAMILIES[family].size
    return make_images(size, batch_size), make_labels(size, batch_size)


def make_step(model: VtaModel, **arguments: Any) -> MultitaskStep:
    return MultitaskStep(model, model, Accelerator(cpu=True), MultitaskArguments(**({"affinity_interval": 1} | arguments)))


def run_step(step: MultitaskStep, *batches: tuple[Tensor, dict[str, Tensor]], number: int = 0) -> dict[str, Tensor]:
    step.begin(number)
    for images, labels in batches:
        losses = step.backward(images, labels)
    step.finish()
    step.observe()
    return losses


def naive_gradients(model: VtaModel, images: Tensor, labels: dict[str, Tensor], half: int | None) -> Tensor:
    """(T,P): one forward pass of the whole model and one `torch.autograd.grad` per task; of one half of the images."""
    rows = []
    for task in model.tasks:
        logits = model(images, tasks=[task.name]).logits[task.name]
        if half is not None:
            # The other half takes part in the loss and is held fixed.
            first, second = logits.chunk(2)
            logits = torch.cat([first.detach(), second] if half else [first, second.detach()])
        loss = task.loss(logits, labels[task.name])
        gradients = torch.autograd.grad(loss, model.affinity_parameters(), allow_unused=True)
        pairs = zip(gradients, model.affinity_parameters(), strict=True)
        rows.append(torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs]))
    return torch.stack(rows)


def naive_position_gradients(model: VtaModel, images: Tensor, labels: dict[str, Tensor]) -> Tensor:
    """(T,B,N): magnitudes of the gradient at the tokens that enter the first adapted block."""
    path = model.family.blocks(model.config.backbone_config)[model.first_task_block]
    rows = []
    for task in model.tasks:
        entered: list[Tensor] = []

        def keep(module: Any, args: tuple, kept: list[Tensor] = entered) -> tuple:
            kept.append(args[0].detach().requires_grad_())
            return (kept[0], *args[1:])

        handle = model.backbone.get_submodule(path).register_forward_pre_hook(keep)
        loss = task.loss(model(images, tasks=[task.name]).logits[task.name], labels[task.name])
        handle.remove()
        num_prefix_tokens = model.family.num_prefix_tokens(model.config.backbone_config)
        rows.append(torch.autograd.grad(loss, entered)[0][:, num_prefix_tokens:].norm(dim=-1))
    return torch.stack(rows)


def naive_similarity(model: VtaModel, similarity: str, images: Tensor, labels: dict[str, Tensor]) -> Tensor:
    """(T,T), entry by entry from the definitions; one update, so that running means are the values themselves."""
    num_tasks = len(model.tasks)
    if similarity == "spatial":
        magnitudes = naive_position_gradients(model, images, labels).double()

        def entry(s: int, t: int) -> Tensor:
            pairs = [torch.stack([magnitudes[s, b], magnitudes[t, b]]) for b in range(len(images))]
            return sum(torch.corrcoef(pair)[0, 1] for pair in pairs) / len(images)
    else:
        is_split = similarity in ("split", "fisher")
        sources = naive_gradients(model, images, labels, 0 if is_split else None).double()
        targets = naive_gradients(model, images, labels, 1).double() if is_split else sources
        if similarity == "fisher":
            sources, targets = (g**2 / (g**2).sum(dim=1, keepdim=True) for g in (sources, targets))

        def entry(s: int, t: int) -> Tensor:
            if similarity == "lookahead":
                return (sources[s] * sources[t]).sum() / (sources[t] * sources[t]).sum()
            return (sources[s] * targets[t]).sum() / (sources[s].norm() * targets[t].norm())

    rows = [[entry(s, t) for t in range(num_tasks)] for s in range(num_tasks)]
    return torch.stack([torch.stack(row) for row in rows]).clamp(0, 1).float()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_affinities_equal_those_of_naive_gradients_of_the_whole_model(family, similarity):
    model = make_training_model(family)
    batch = make_batch(family)
    # Taken first, with the weights that the step's forward pass will have.
    step = make_step(model, affinity_similarity=similarity)
    expected = naive_similarity(model, similarity, *batch)
    run_step(step, batch)
    torch.testing.assert_close(model.affinity, expected, rtol=0, atol=1e-5)
    off_diagonal = expected[~torch.eye(len(expected), dtype=torch.bool)]
    assert (off_diagonal > 0.01).sum() >= 2, "these affinities would not tell right from wrong"


def gradients_of(model: VtaModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: VtaModel, expected: VtaModel) -> None:
    left, right = gradients_of(found), gradients_of(expected)
    assert left.keys() == right.keys()
    scale = torch.stack([gradient.norm() for gradient in right.values()]).max()
    for name, gradient in right.items():
        difference = (left[name] - gradient).norm()
        # Gradients that vanish in exact arithmetic are noise of the size of the others' rounding.
        assert difference <= 1e-6 * gradient.norm() + 1e-8 * scale, f"{name}: {difference} of {gradient.norm()}"


SETTINGS = [
    {},
    {"share_decoder": True},
    {"backbone_changes": {"drop_path_rate": 0.0}, "train_backbone": True},
    {"decoder": "linear"},
]


@pytest.mark.parametrize("similarity", [None, *SIMILARITIES])
@pytest.mark.parametrize("settings", SETTINGS, ids=["default", "share_decoder", "train_backbone", "linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_step_per_task_gives_the_gradients_of_a_joint_one(family, settings, similarity):
    if similarity not in (None, "fisher", "spatial") and settings:
        pytest.skip("the others run the same code")
    images, labels = make_batch(family)
    # The halves of a batch run apart: rounding of float32 would hide what is to be seen.
    images = images.double()
    model, joint = (make_training_model(family, **settings).double() for _ in range(2))
    step = make_step(model, affinity_similarity=similarity) if similarity else make_step(model, affinity_interval=0)
    joint.conditioning.set_affinity(model.conditioning.affinity, model.conditioning.mixing_weights)
    losses = run_step(step, (images, labels))
    output = joint(images, labels=labels)
    output.loss.backward()
    assert_same_gradients(model, joint)
    for name, loss in output.losses.items():
        torch.testing.assert_close(losses[name], loss.detach(), rtol=1e-6, atol=0)
