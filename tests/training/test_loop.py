import contextlib
import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

from mt_adapters import VtaAdapterConfig, VtaModel
from mt_adapters.models.vta.parameters import adapter_parameter_names
from mt_adapters.training.arguments import DataArguments, MultitaskArguments, TrainingArguments
from mt_adapters.training.loop import parameter_groups, record, train
from mt_adapters.training.loop_state import LoopState, finite_or_error
from mt_adapters.training.step import MultitaskStep
from tiny_models import ALL_TASKS, assert_same, make_images, make_labels, make_model

SIZE = (64, 64)
DATA = DataArguments(image_size=64, crop_scale=[1.0, 1.0], color_jitter=[0.0] * 4, num_workers=0)
BASELINE = {
    "semseg": {"miou": 0.5},
    "depth": {"rmse": 1.0},
    "normals": {"mean_angle": 30.0},
    "edges": {"f": 0.5},
}


class Made(Dataset):
    """Random images and labels; `without` names tasks that some images have no label of."""

    def __init__(self, num_images: int = 4, without: dict[int, tuple[str, ...]] | None = None) -> None:
        self.images = (make_images(SIZE, num_images) * 50 + 128).clamp(0, 255).to(torch.uint8)
        self.labels = make_labels(SIZE, num_images)
        self.without = without or {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        missing = self.without.get(index, ())
        labels = {name: label[index] for name, label in self.labels.items() if name not in missing}
        return {"image": self.images[index], "labels": labels}


class Stopped(Exception):
    pass


class Stops(Made):
    """Ends the run after so many batches of two."""

    def __init__(self, num_batches: int) -> None:
        super().__init__()
        self.num_left = 2 * num_batches

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Accelerate's loader reads one batch ahead.
        if self.num_left == -2:
            raise Stopped
        self.num_left -= 1
        return super().__getitem__(index)


@pytest.fixture(autouse=True)
def _reset_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(
    model: VtaModel,
    folder: Path,
    train_set: Dataset | None = None,
    data: DataArguments = DATA,
    multitask: MultitaskArguments | None = None,
    **settings: Any,
) -> LoopState:
    settings = {"max_steps": 2, "batch_size": 2, "checkpoint_steps": 100, "warmup_ratio": 0.0} | settings
    training = TrainingArguments(output_dir=str(folder), **settings)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        mixed_precision=training.mixed_precision,
    )
    return train(model, train_set or Made(), Made(), data, training, accelerator, BASELINE, multitask)


@torch.no_grad()
def losses_of(model: VtaModel) -> dict[str, float]:
    pixel_values, labels = make_images(SIZE), make_labels(SIZE)
    return {name: loss.item() for name, loss in model.eval()(pixel_values, labels=labels).losses.items()}


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def test_the_loss_of_every_task_falls_on_a_few_images(tmp_path: Path) -> None:
    model = make_model("swin", randomized=False)
    before = losses_of(model)
    state = run(model, tmp_path, max_steps=25, learning_rate=1e-2)
    after = losses_of(model)
    assert all(after[name] < before[name] for name in ALL_TASKS), (before, after)
    assert after["depth"] < 0.7 * before["depth"]
    assert state.step == state.best_step == 25


def test_training_changes_adapters_decoders_and_heads_and_leaves_the_frozen_backbone_bit_equal(tmp_path: Path) -> None:
    model = make_model("swin")
    before = tensors(model)
    adapters = set(adapter_parameter_names(model))
    run(model, tmp_path)
    assert changed(before, model) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed(before, model) & adapters
    assert not {name for name in changed(before, model) if name.startswith("backbone.")} - adapters


@pytest.mark.parametrize("train_backbone", [False, True])
def test_every_trained_parameter_is_in_one_group_and_only_matrices_decay(train_backbone: bool) -> None:
    for family in ("swin", "dinov2"):
        model = make_model(family, train_backbone=train_backbone)
        training = TrainingArguments(learning_rate=0.1, backbone_learning_rate=0.0, weight_decay=0.5)
        groups = parameter_groups(model, training)
        names = {parameter: name for name, parameter in model.named_parameters()}
        found = sorted(names[parameter] for group in groups for parameter in group["params"])
        assert found == sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        decay = {names[parameter]: group["weight_decay"] for group in groups for parameter in group["params"]}
        rate = {names[parameter]: group["lr"] for group in groups for parameter in group["params"]}
        norms = {
            f"{path}.{name}"
            for path, module in model.named_modules()
            if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d, nn.GroupNorm))
            for name, _ in module.named_parameters()
        }
        spared = ("bias", "position_embeddings", "bias_table", "_token")
        for name in found:
            is_spared = name.endswith(spared) or name in norms or "lambda" in name or "task_embeddings" in name
            expected = 0.0 if is_spared else 0.5
            assert decay[name] == expected, name
            own = name.startswith("backbone.") and name not in set(adapter_parameter_names(model))
            assert rate[name] == (0.0 if own else 0.1), name
        assert any("task_embeddings" in name for name in found)
        assert set(decay.values()) == {0.0, 0.5}
        assert (0.0 in rate.values()) == train_backbone


def test_a_loss_that_blows_up_is_named_with_task_and_step(tmp_path: Path) -> None:
    message = r"loss of \[.*'depth'.*\] is not finite in step 2: .*Lower learning_rate"
    with pytest.raises(ValueError, match=message):
        run(make_model("swin"), tmp_path, learning_rate=1e30, max_steps=5, max_grad_norm=1e30)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_only_the_tasks_whose_loss_is_not_finite_are_named(value: float) -> None:
    losses = {"depth": torch.tensor(1.5), "normals": torch.tensor(value)}
    with pytest.raises(ValueError, match=r"loss of \['normals'\] is not finite in step 8"):
        finite_or_error(losses, 7)
    assert finite_or_error({"depth": torch.tensor(1.5)}, 7) == {"depth": 1.5}


def test_a_task_without_any_label_trains_nothing_of_its_own(tmp_path: Path) -> None:
    model = make_model("swin", share_decoder=False)
    before = tensors(model)
    run(model, tmp_path, Made(without=dict.fromkeys(range(4), ("depth",))), weight_decay=0.0)
    names = changed(before, model)
    assert "heads.semseg.weight" in names
    assert not [name for name in names if "depth" in name]


def test_images_with_labels_of_some_tasks_train_those_tasks(tmp_path: Path) -> None:
    model = make_model("swin")
    before = tensors(model)
    state = run(model, tmp_path, Made(without={0: ("depth", "edges"), 1: ("semseg",), 2: ("normals", "semseg")}))
    assert state.step == 2
    assert {f"heads.{name}.weight" for name in ALL_TASKS} <= changed(before, model)


def test_two_accumulated_batches_of_one_train_like_one_batch_of_two(tmp_path: Path) -> None:
    # True for losses that are means over equally many labelled pixels; BerHu's threshold spans the batch.
    tasks = ["semseg", "normals"]
    torch.manual_seed(0)
    models = [make_model("swin", tasks=tasks) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    before = tensors(models[0])
    whole = run(models[0], tmp_path / "whole", max_steps=1, batch_size=2)
    parts = run(models[1], tmp_path / "parts", max_steps=1, batch_size=1, gradient_accumulation_steps=2)
    assert (whole.step, parts.step) == (1, 1)
    # Adam's first step is the sign of the gradient; where that is not clear, rounding decides.
    steps = [
        torch.cat([(model.state_dict()[name] - before[name]).flatten() for name in sorted(changed(before, model))])
        for model in models
    ]
    assert steps[0].norm() > 0.01
    assert ((steps[0] - steps[1]).abs() > 1e-5).float().mean() < 0.02


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
def test_gradient_checkpointing_ends_with_the_same_bits(tmp_path: Path) -> None:
    model = make_model("swin")
    twin, multitask = copy.deepcopy(model), MultitaskArguments(affinity_interval=1)
    run(model, tmp_path / "plain", multitask=multitask)
    run(twin, tmp_path / "checkpointed", multitask=multitask, gradient_checkpointing=True)
    assert twin.is_gradient_checkpointing
    assert not model.is_gradient_checkpointing
    assert_same(twin.state_dict(), model.state_dict())


def test_the_weights_of_the_best_evaluation_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([1.0, 3.0, 2.0])
    seen = []
    model = make_model("swin")

    def score(*_: Any) -> float:
        seen.append(tensors(model))
        return next(scores)

    monkeypatch.setattr("mt_adapters.training.loop.mean_gain", score)
    state = run(model, tmp_path, max_steps=3, eval_steps=1)
    assert (state.best_step, state.best_score) == (2, 3.0)
    assert [entry["score"] for entry in state.history] == [1.0, 3.0, 2.0]
    assert not changed(seen[1], model)
    assert changed(seen[2], model)


def test_a_score_that_is_no_number_loses_against_every_number() -> None:
    state = LoopState()
    for step, score in enumerate((math.nan, math.nan, -50.0, math.nan, -60.0), start=1):
        state.step = step
        record(state, {}, score)
    assert (state.best_step, state.best_score) == (3, -50.0)


def test_bf16_trains_float32_weights(tmp_path: Path) -> None:
    model = make_model("swin")
    before = tensors(model)
    run(model, tmp_path, mixed_precision="bf16")
    assert {f"heads.{name}.weight" for name in ALL_TASKS} <= changed(before, model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    reference = make_model("swin")
    reference.load_state_dict(before)
    run(reference, tmp_path / "reference")
    assert changed(tensors(reference), model), "without bf16 the weights are others"


@pytest.mark.parametrize(
    "settings",
    [
        {"share_decoder": True},
        {"adapter": None, "decoder": "linear"},
        {"adapter": VtaAdapterConfig(train_adapted_blocks=True)},
        {"decoder": "swin_unet"},
    ],
    ids=lambda settings: ", ".join(settings),
)
def test_every_kind_of_model_is_trained_and_its_checkpoint_loaded(tmp_path: Path, settings: dict[str, Any]) -> None:
    models = [make_model("swin", **settings) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    steps = {"max_steps": 2, "checkpoint_steps": 1}
    run(models[0], tmp_path, **steps)
    saved = load_file(tmp_path / "checkpoints/last/trained.safetensors")
    assert {name for name, parameter in models[0].named_parameters() if parameter.requires_grad} <= set(saved)
    state = run(models[1], tmp_path, **steps, resume=True)
    assert state.step == 2
    assert not changed(tensors(models[0]), models[1])


def test_the_learning_rate_rises_in_the_warm_up_and_ends_at_zero(tmp_path: Path) -> None:
    run(make_model("swin"), tmp_path, max_steps=4, warmup_ratio=0.5, learning_rate=0.1)
    last = json.loads((tmp_path / "checkpoints/last/loop_state.json").read_text())["scheduler"]
    assert last["base_lrs"] == [0.1, 0.1]
    assert last["_last_lr"] == [0.0, 0.0]
    assert last["last_epoch"] == 4


def test_a_new_run_leaves_nothing_of_an_earlier_one_to_go_on_from(tmp_path: Path) -> None:
    run(make_model("swin"), tmp_path)
    assert (tmp_path / "checkpoints" / "last").is_dir()
    with pytest.raises(ValueError, match="not finite in step 1"):
        run(make_model("swin"), tmp_path, train_set=Blank())
    assert not list((tmp_path / "checkpoints").iterdir())


class Blank(Made):
    """Images whose depth of 1e38 m makes the first loss infinite."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        sample["labels"]["depth"] = torch.full_like(sample["labels"]["depth"], 1e38)
        return sample


def test_affinities_are_recorded_at_most_two_hundred_times(tmp_path: Path) -> None:
    model = make_model("swin", tasks=["depth", "edges"], backbone_changes={"depths": [1, 1, 1, 1]})
    state = run(model, tmp_path, max_steps=3, multitask=MultitaskArguments(affinity_interval=1))
    assert [entry["step"] for entry in state.affinity_history] == [1, 2, 3]
    assert state.affinity_history[-1]["affinity"] == model.affinity.tolist()
    step = MultitaskStep(model, model, Accelerator(cpu=True), MultitaskArguments(affinity_interval=10))
    assert [step.history_interval(max_steps) for max_steps in (300, 2000, 4000, 100_000)] == [10, 10, 20, 500]


def test_steps_of_one_image_cannot_be_halved(tmp_path: Path) -> None:
    model = make_model("dinov2", tasks=["depth", "edges"])
    with pytest.raises(
        ValueError, match="affinity_similarity=fisher compares two halves.*raise batch_size or gradient_"
    ):
        run(model, tmp_path, batch_size=1)
    run(
        model, tmp_path, batch_size=1, gradient_accumulation_steps=2, multitask=MultitaskArguments(affinity_interval=1)
    )
    run(model, tmp_path, batch_size=1, multitask=MultitaskArguments(affinity_similarity="cosine"))


@pytest.mark.parametrize("name", ["fixed", "uncertainty", "dwa", "random", "pcgrad", "upgrad"])
def test_a_run_resumed_with_any_balancing_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    settings = {"window": 2} if name == "dwa" else {}
    multitask = MultitaskArguments(affinity_interval=2, balancing=name, balancing_settings=settings)
    results = []
    for stops in ((6,), (3, 6)):
        torch.manual_seed(0)
        model = make_model("swin", tasks=["depth", "edges"], backbone_changes={"depths": [1, 1, 1, 1]})
        for stop in stops:
            # The schedule of the whole run, ended early.
            data = Stops(stop) if stop < 6 else Made()
            with contextlib.suppress(Stopped):
                run(
                    model,
                    tmp_path / str(len(stops)),
                    data,
                    multitask=multitask,
                    max_steps=6,
                    checkpoint_steps=3,
                    resume=stop == 6 and len(stops) > 1,
                )
        results.append(tensors(model))
    assert all(torch.equal(tensor, results[1][key]) for key, tensor in results[0].items())
