"""Gradient checkpointing: blocks that run a second time in the backward pass see the same tasks as the first time."""

import copy
import logging

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from mt_adapters import VtaAdapterConfig, VtaModel
from mt_adapters.tuners.vta import VtaLayer, train_adapters_only
from tiny_models import (
    ALL_TASKS,
    FAMILIES,
    assert_same,
    make_backbone,
    make_images,
    make_labels,
    make_model,
    randomize,
)

TASK_IDS = torch.tensor([2, 0])
# Later versions of transformers have another name for it, too.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


def gradients_of(model: nn.Module, family: str) -> dict[str, Tensor]:
    # Trained copies of blocks drop paths.
    torch.manual_seed(0)
    row = FAMILIES[family]
    if isinstance(model, VtaModel):
        loss = model(make_images(row.size), labels=make_labels(row.size)).loss
    else:
        loss = model(make_images(row.size), task_ids=TASK_IDS, **row.keywords).last_hidden_state.square().mean()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


class RunCounter:
    """Counts how often a model's adapted blocks run."""

    def __init__(self, model: nn.Module) -> None:
        self.num_runs = 0
        for layer in model.modules():
            if isinstance(layer, VtaLayer):
                for block in (layer.base_layer, *layer.vta_block.values()):
                    getattr(block, layer.family.attention).register_forward_hook(self.count)

    def count(self, *args: object) -> None:
        self.num_runs += 1

    def take(self) -> int:
        num_runs, self.num_runs = self.num_runs, 0
        return num_runs


def assert_checkpointing_changes_no_gradient(model: nn.Module, base: PreTrainedModel, family: str) -> None:
    counter = RunCounter(model)
    expected, num_runs = gradients_of(model, family), counter.take()
    assert num_runs > 0
    base.gradient_checkpointing_enable()
    assert_same(gradients_of(model, family), expected)
    assert counter.take() == 2 * num_runs, "each adapted block must run again, once"
    base.gradient_checkpointing_disable()
    assert_same(gradients_of(model, family), expected)
    assert counter.take() == num_runs


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fan_out": "batched"},
        {"train_backbone": True},
        {"adapter": VtaAdapterConfig(residual="figure", train_adapted_blocks=True)},
    ],
    ids=["default", "batched", "train_backbone", "figure and trained copies"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_multitask_model_has_the_same_gradients(family, settings):
    model = make_model(family, **settings).train()
    assert_checkpointing_changes_no_gradient(model, model, family)
    copy.deepcopy(model)


def test_a_setting_without_effect_says_so(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    make_model("swin").gradient_checkpointing_enable()
    assert "no effect" not in caplog.text
    make_model("swin", adapter=None).gradient_checkpointing_enable()
    assert caplog.text.count("gradient checkpointing has no effect here") == 1


@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter", "add_adapter and train"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_backbone_has_the_same_gradients(family, way):
    backbone, config = make_backbone(family), VtaAdapterConfig(tasks=list(ALL_TASKS))
    if way == "get_peft_model":
        model = randomize(get_peft_model(backbone, config)).train()
    else:
        backbone.add_adapter(config)
        model = randomize(backbone)
        train_adapters_only(model, True)
        if "train" in way:
            # Then transformers also checkpoints the stages and blocks around and inside of the adapted ones.
            model.train()
    assert_checkpointing_changes_no_gradient(model, backbone, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_that_was_on_before_holds_for_new_adapters_and_after_unloading(family):
    backbone = make_backbone(family).train()
    backbone.gradient_checkpointing_enable()
    on = {name for name, module in backbone.named_modules() if getattr(module, "gradient_checkpointing", False)}
    model = randomize(get_peft_model(backbone, VtaAdapterConfig(tasks=list(ALL_TASKS)))).train()
    counter = RunCounter(model)
    gradients_of(model, family)
    assert counter.take() == 2 * len(FAMILIES[family].targets)
    base = model.unload()
    assert {name for name, module in base.named_modules() if getattr(module, "gradient_checkpointing", False)} == on


@pytest.mark.parametrize("family", FAMILIES)
def test_reentrant_checkpointing_is_refused(family):
    model = make_model(family).train()
    for settings in ({"use_reentrant": True}, {"preserve_rng_state": True}):
        model.gradient_checkpointing_enable(settings)
        with pytest.raises(ValueError, match="must not be reentrant"):
            gradients_of(model, family)
