"""A task that is added beside trained ones leaves these as they are, before and after it is trained."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig

from mt_adapters import VtaModel
from mt_adapters.training.arguments import MultitaskArguments
from mt_adapters.training.step import MultitaskStep
from tiny_models import FAMILIES, assert_same, differ, logits_of, make_images, make_labels, make_model

OLD = ["semseg", "depth", "normals"]
PARTS = {"name": "parts", "type": "semseg", "num_labels": 7}
ADAPTERS = {
    "vta": {},
    "shared decoder": {"share_decoder": True},
    "lora": {"adapter": LoraConfig(target_modules=["q_proj", "query"], r=2)},
    "none": {"adapter": None},
}


def old_logits(model: VtaModel, family: str) -> dict[str, torch.Tensor]:
    row = FAMILIES[family]
    outputs = [logits_of(model.eval(), make_images(size), tasks=OLD) for size in (row.size, row.odd_size)]
    return {f"{name} {number}": value for number, output in enumerate(outputs) for name, value in output.items()}


def train(model: VtaModel, family: str, task: str, num_steps: int = 3, **settings) -> None:
    """With every label there is, affinities learned at every step, and weight decay."""
    model.train()
    size = FAMILIES[family].size
    labels = make_labels(size)
    labels["parts"] = torch.randint(0, 7, (2, *size))
    step = MultitaskStep(model, model, Accelerator(), MultitaskArguments(affinity_interval=1, **settings))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for number in range(num_steps):
        known = {name: labels[name] for name in model.task_names}
        step.begin(number, [known])
        step.backward(make_images(size), known)
        step.finish()
        step.observe()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("task", ["edges", PARTS], ids=["edges", "parts"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", ["swin", "dinov2"])
def test_the_old_tasks_outputs_stay_bit_identical_through_adding_and_training(family, adapter, task, tmp_path):
    model = make_model(family, tasks=OLD, **ADAPTERS[adapter])
    before = old_logits(model, family)
    files = saved_files(model, tmp_path / "before")
    model.add_task(task, freeze_others=True)
    name = task if isinstance(task, str) else task["name"]
    assert model.task_names == [*OLD, name]
    assert_same(old_logits(model, family), before)
    fresh = logits_of(model, make_images(FAMILIES[family].size))[name]

    train(model, family, name)
    assert_same(old_logits(model, family), before)
    trained = logits_of(model, make_images(FAMILIES[family].size))[name]
    assert differ(trained, fresh)
    after = saved_files(model, tmp_path / "after")
    assert [file for file in files if file.startswith("task_") and files[file] != after[file]] == []
    model.save_pretrained(tmp_path / "full")
    loaded = VtaModel.from_pretrained(tmp_path / "full").eval()
    assert loaded.task_names == [*OLD, name]
    assert_same(old_logits(loaded, family), before)
    assert torch.equal(logits_of(loaded, make_images(FAMILIES[family].size))[name], trained)


def saved_files(model: VtaModel, folder: Path) -> dict[str, bytes]:
    if model.config.adapter is None:
        return {}
    model.save_adapter(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("balancing", ["fixed", "uncertainty", "pcgrad"])
def test_only_what_the_new_task_adds_is_trained_if_the_others_are_frozen(balancing):
    model = make_model("swin", tasks=OLD)
    old = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    affinity = model.affinity
    model.add_task("edges", freeze_others=True)
    embedding = "vta_shared.default.task_embeddings.3"
    for name, parameter in model.named_parameters():
        is_new = name.startswith(("decoder.tasks.edges.", "heads.edges.")) or name.endswith(embedding)
        assert parameter.requires_grad == is_new == (name not in old), name
    new = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model, "swin", "edges", balancing=balancing)
    parameters = dict(model.named_parameters())
    for name, value in old.items():
        assert torch.equal(parameters[name], value), name
        assert parameters[name].grad is None, name
    assert [name for name, value in new.items() if torch.equal(parameters[name], value)] == []
    assert torch.equal(model.affinity[:3, :3], affinity)
    assert torch.equal(model.affinity[3], torch.eye(4)[3])


def test_without_freezing_all_tasks_train_together_and_affinities_to_the_new_one_are_learned():
    model = make_model("dinov2", tasks=OLD)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = old_logits(model, "dinov2")
    model.add_task("edges")
    assert_same(old_logits(model, "dinov2"), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} > trainable
    train(model, "dinov2", "edges", affinity_momentum=0.5)
    after = old_logits(model, "dinov2")
    assert all(differ(after[name], before[name]) for name in before)
    assert (model.affinity[3, :3] > 0).all()
    assert (model.affinity[:3, 3] > 0).all()


def test_a_new_task_starts_from_the_mean_of_the_others_conditions():
    model = make_model("swin", tasks=OLD)
    conditions = [model.conditioning(torch.tensor([task]))[0] for task in range(3)]
    model.add_task("edges")
    torch.testing.assert_close(model.conditioning(torch.tensor([3]))[0], sum(conditions) / 3)
    for task, expected in enumerate(conditions):
        assert torch.equal(model.conditioning(torch.tensor([task]))[0], expected)


def test_the_new_parts_have_the_type_and_mode_of_the_old_ones():
    model = make_model("swin", tasks=OLD).bfloat16().eval()
    model.add_task("edges")
    new = [(name, p) for name, p in model.named_parameters() if "edges" in name or "task_embeddings.3" in name]
    assert len(new) > 3
    assert {parameter.dtype for _, parameter in new} == {torch.bfloat16}
    assert not model.heads["edges"].training
    assert model.affinity.dtype == torch.float32
    images = make_images(FAMILIES["swin"].size).bfloat16()
    assert logits_of(model, images)["edges"].isfinite().all()


@pytest.mark.parametrize(
    ("task", "message"), [("depth", "different names"), ("deep", "unknown task 'deep'"), ({"type": "depth"}, "depth")]
)
def test_a_task_that_cannot_be_added_changes_nothing(task, message):
    model = make_model("swin", tasks=OLD)
    names, trainable = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    before = old_logits(model, "swin")
    with pytest.raises(ValueError, match=message):
        model.add_task(task, freeze_others=True)
    assert list(model.state_dict()) == names
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert model.task_names == OLD
    assert_same(old_logits(model, "swin"), before)
