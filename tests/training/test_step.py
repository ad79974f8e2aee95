"""A training step gives every task's gradient on the way, and the gradients of one joint backward pass at the end."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from mt_adapters import VtaModel
from mt_adapters.training.arguments import MultitaskArguments
from mt_adapters.training.step import MultitaskStep
from mt_adapters.troa import average_weights
from tiny_models import ALL_TASKS, FAMILIES, make_images, make_labels, make_model

GRADIENT_SIMILARITIES = ("cosine", "split", "lookahead", "fisher")
SIMILARITIES = (*GRADIENT_SIMILARITIES, "spatial")
WEIGHTED_TASKS = [*ALL_TASKS[:3], {"name": "edges", "weight": 3.0}]


def make_training_model(family: str, **settings: Any) -> VtaModel:
    torch.manual_seed(0)
    # What drops at random would tell two ways of running a step apart.
    fixed = {"tasks": WEIGHTED_TASKS, "backbone_changes": {FAMILIES[family].drop_path: 0.0}}
    return make_model(family, **(fixed | settings)).train()


def make_batch(family: str, batch_size: int = 4) -> tuple[Tensor, dict[str, Tensor]]:
    size = FAMILIES[family].size
    return make_images(size, batch_size), make_labels(size, batch_size)


def make_step(model: VtaModel, **arguments: Any) -> MultitaskStep:
    return MultitaskStep(
        model, model, Accelerator(cpu=True), MultitaskArguments(**({"affinity_interval": 1} | arguments))
    )


def run_step(step: MultitaskStep, *batches: tuple[Tensor, dict[str, Tensor]], number: int = 0) -> dict[str, Tensor]:
    step.begin(number, [labels for _, labels in batches])
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


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "share_decoder": {"share_decoder": True},
    "train_backbone": {"train_backbone": True},
    "linear": {"decoder": "linear"},
}


@pytest.mark.parametrize("similarity", [None, "cosine", "fisher", "spatial"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_step_per_task_gives_the_gradients_of_a_joint_one(family, settings, similarity):
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


def test_learning_affinities_leaves_the_gradients_as_they_are_to_the_last_bit():
    batch = make_batch("dinov2")
    with_affinities, without = (make_training_model("dinov2") for _ in range(2))
    step = make_step(with_affinities, affinity_similarity="cosine", affinity_weighting="identity")
    without.conditioning.set_affinity(torch.eye(4), torch.eye(4))
    run_step(step, batch)
    run_step(make_step(without, affinity_interval=0), batch)
    assert not torch.equal(with_affinities.affinity, without.affinity)
    expected = gradients_of(without)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients_of(with_affinities).items())


def test_a_batched_fan_out_takes_one_joint_backward_pass_and_learns_the_same_affinities():
    images, labels = make_batch("dinov2")
    sequential, batched = (make_training_model("dinov2", fan_out=way) for way in ("sequential", "batched"))
    for model in (sequential, batched):
        step = make_step(model, affinity_interval=2, affinity_similarity="cosine")
        run_step(step, (images, labels), number=0)
        assert step.is_joint == (model is batched)
        model.zero_grad()
        run_step(step, (images, labels), number=1)
        assert not step.is_joint
    torch.testing.assert_close(batched.affinity, sequential.affinity, rtol=0, atol=1e-5)


def test_affinities_are_learned_at_the_interval_and_only_in_training():
    model, batch = make_training_model("dinov2"), make_batch("dinov2")
    step = make_step(model, affinity_interval=3)
    history = [model.affinity]
    for number in range(6):
        run_step(step, batch, number=number)
        history.append(model.affinity)
    changed = [not torch.equal(left, right) for left, right in zip(history, history[1:], strict=False)]
    assert changed == [False, False, True, False, False, True]
    assert step.troa.num_updates.tolist() == [2, 2, 2, 2]
    model.eval()
    run_step(step, batch, number=8)
    assert torch.equal(model.affinity, history[-1])
    model(batch[0])
    assert torch.equal(model.affinity, history[-1])


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("absence", ["no label", "unlabelled everywhere"])
def test_a_task_without_labels_keeps_its_affinities_and_disturbs_nothing(similarity, absence):
    images, labels = make_batch("swin")
    model, without = make_training_model("swin"), make_training_model("swin")
    step = make_step(model, affinity_similarity=similarity, affinity_momentum=0.0)
    run_step(step, (images, labels))
    before = model.affinity
    model.zero_grad()
    other_images = images.flip(0) + 0.1
    partial = {name: label for name, label in labels.items() if name != "depth"}
    if absence == "unlabelled everywhere":
        partial["depth"] = torch.zeros_like(labels["depth"])
    run_step(step, (other_images, partial), number=1)
    position = model.task_names.index("depth")
    assert torch.equal(model.affinity[position], before[position])
    assert torch.equal(model.affinity[:, position], before[:, position])
    others = [number for number in range(4) if number != position]
    assert not torch.equal(model.affinity[others][:, others], before[others][:, others])
    assert step.troa.num_updates[position] == step.troa.num_skipped[position] == 1
    assert (step.troa.num_updates[others] == 2).all()

    without.conditioning.set_affinity(before, average_weights(before))
    without(other_images, labels={name: labels[name] for name in partial if name != "depth"}).loss.backward()
    found = gradients_of(model)
    for name, gradient in gradients_of(without).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_batches_of_one_step_are_dealt_to_the_two_halves():
    images, labels = make_batch("swin")
    parts = [(images[i : i + 2], {name: label[i : i + 2] for name, label in labels.items()}) for i in (0, 2)]
    model = make_training_model("swin")
    step = MultitaskStep(
        model, model, Accelerator(cpu=True), MultitaskArguments(affinity_interval=1, affinity_similarity="split")
    )
    first, second = (naive_gradients(model, *part, None) for part in parts)
    run_step(step, *parts)
    expected = torch.nn.functional.normalize(first) @ torch.nn.functional.normalize(second).T
    torch.testing.assert_close(model.affinity, expected.clamp(0, 1), rtol=0, atol=1e-5)


def test_the_compared_parameters_are_those_that_all_tasks_share_without_film():
    model = make_training_model("swin")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    compared = [names[id(parameter)] for parameter in model.affinity_parameters()]
    for left_out in ("film.weight", "condition.weight", "task_embedding", "base_layer", "decoder.", "heads."):
        assert not any(left_out in name for name in compared), left_out
    for part in ("bottleneck.up.weight", "bottleneck.down.weight", "attention_bias.matrix", "film.bias"):
        assert sum(part in name for name in compared) >= 3, part
    first = [names[id(parameter)] for parameter in model.affinity_parameters(first_block_only=True)]
    assert first == [name for name in compared if FAMILIES["swin"].targets[0] in name]
    step = make_step(model, affinity_parameters="first_block")
    assert step.affinity_parameters == model.affinity_parameters(first_block_only=True)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_balancing_gets_the_gradients_of_all_shared_parameters(settings):
    """An aggregator that adds up must give what no balancing gives."""
    images, labels = make_batch("swin")
    model, plain = (make_training_model("swin", **settings).double() for _ in range(2))
    step = make_step(model, balancing="upgrad", affinity_interval=0)
    seen = []
    step.balancing.aggregate = lambda gradients_TP, number: seen.append(gradients_TP) or gradients_TP.sum(dim=0)
    run_step(step, (images.double(), labels))
    run_step(make_step(plain, affinity_interval=0), (images.double(), labels))
    assert seen[0].shape == (4, sum(parameter.numel() for parameter in model.shared_parameters()))
    expected = gradients_of(plain)
    scale = torch.stack([gradient.norm() for gradient in expected.values()]).max()
    for name, gradient in gradients_of(model).items():
        # Gradients on their way through the aggregator are float32.
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6 * scale.item())


def test_a_balanced_step_hurts_no_task():
    model, batch = make_training_model("swin"), make_batch("swin")
    step = make_step(model, balancing="upgrad")
    aggregate, seen = step.balancing.aggregate, []
    step.balancing.aggregate = lambda gradients_TP, number: (
        seen.append(gradients_TP) or aggregate(gradients_TP, number)
    )
    run_step(step, batch)
    shared = torch.cat([parameter.grad.flatten() for parameter in model.shared_parameters()])
    steps = {"balanced": shared, "sum": seen[0].sum(dim=0)}
    worst = {name: torch.cosine_similarity(seen[0], moved.unsqueeze(0)).min() for name, moved in steps.items()}
    # The solver is regularised, hence not exactly zero.
    assert worst["balanced"] > -0.02
    assert worst["sum"] < -0.05


@pytest.mark.parametrize("name", ["uncertainty", "random"])
def test_loss_weights_scale_the_tasks_gradients(name):
    batch = make_batch("dinov2")
    model, plain = (make_training_model("dinov2") for _ in range(2))
    step = make_step(model, balancing=name, affinity_interval=0)
    if name == "uncertainty":
        torch.nn.init.normal_(step.balancing.log_variances)
    factors = step.balancing.factors(5)
    losses = run_step(step, batch, number=5)
    run_step(make_step(plain, affinity_interval=0), batch)
    for factor, task in zip(factors.tolist(), model.task_names, strict=True):
        found, expected = (m.heads[task].weight.grad for m in (model, plain))
        torch.testing.assert_close(found, factor * expected, rtol=1e-5, atol=1e-7)
    if name == "uncertainty":
        expected = 1 - factors * torch.stack([losses[task] for task in model.task_names])
        torch.testing.assert_close(step.balancing.log_variances.grad, expected)


@pytest.fixture
def fresh_accelerator_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_mixed_precision_learns_and_balances(fresh_accelerator_state):
    affinities = []
    for mixed_precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        model, batch = make_training_model("dinov2"), make_batch("dinov2")
        accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
        arguments = MultitaskArguments(affinity_interval=1, affinity_similarity="cosine", balancing="pcgrad")
        run_step(MultitaskStep(model, model, accelerator, arguments), batch)
        assert all(parameter.grad.isfinite().all() for parameter in model.shared_parameters())
        assert model.affinity.dtype == torch.float32
        affinities.append(model.affinity)
    assert not torch.equal(*affinities)
    torch.testing.assert_close(affinities[1], affinities[0], rtol=0, atol=0.05)


def test_without_a_vta_adapter_nothing_is_learned():
    model, batch = make_training_model("dinov2", adapter=None), make_batch("dinov2")
    step = make_step(model)
    assert step.troa is None
    run_step(step, batch)
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())


@pytest.mark.parametrize("name", ["mgda", "upgrad", "pcgrad"])
def test_balancing_leaves_a_task_without_labels_out(name):
    images, labels = make_batch("swin")
    absent, unlabelled = (make_training_model("swin") for _ in range(2))
    without = {task: label for task, label in labels.items() if task != "depth"}
    for model, given in ((absent, without), (unlabelled, without | {"depth": torch.zeros_like(labels["depth"])})):
        run_step(make_step(model, balancing=name, affinity_interval=0), (images, given))
    for left, right in zip(absent.shared_parameters(), unlabelled.shared_parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad)
    assert sum(parameter.grad.abs().sum() for parameter in absent.shared_parameters()) > 1.0


def test_scaled_gradients_balance_and_teach_like_unscaled_ones():
    models = [make_training_model("dinov2") for _ in range(2)]
    for model, scale in zip(models, (1.0, 2.0**12), strict=True):
        step = make_step(model, affinity_similarity="cosine", balancing="pcgrad")
        step.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        run_step(step, make_batch("dinov2"))
    torch.testing.assert_close(models[1].affinity, models[0].affinity)
    expected = gradients_of(models[0])
    for name, gradient in gradients_of(models[1]).items():
        torch.testing.assert_close(gradient / 2.0**12, expected[name], rtol=1e-4, atol=1e-7)


def test_gradients_that_overflow_teach_nothing_and_stay_for_the_scaler_to_see():
    model = make_training_model("dinov2")
    step = make_step(model, balancing="upgrad")
    before = model.affinity
    step.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    run_step(step, make_batch("dinov2"))
    assert not all(parameter.grad.isfinite().all() for parameter in model.shared_parameters())
    assert torch.equal(model.affinity, before)
    assert step.troa.num_skipped.sum() > 0
