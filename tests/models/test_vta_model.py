"""The multitask model: partial labels, subsets and orders of tasks, baselines, reports."""

import itertools

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModel

from mt_adapters import VtaAdapterConfig, VtaConfig, VtaModel, get_task
from mt_adapters.tuners.vta import find_context
from tiny_models import (
    ALL_TASKS,
    FAMILIES,
    NUM_LABELS,
    assert_same,
    differ,
    logits_of,
    make_backbone,
    make_images,
    make_labels,
    make_model,
    randomize,
)

SIZE = FAMILIES["dinov2"].size
ADAPTERS = {"none": None, "lora": LoraConfig(r=2, target_modules=["q_proj", "v_proj", "query", "value"])}


@pytest.mark.parametrize("decoder", ["fpn", "swin_unet", "linear"])
@pytest.mark.parametrize("share_decoder", [False, True])
def test_logits_have_the_inputs_size_and_the_tasks_channels(decoder, share_decoder):
    model = make_model("dinov2", decoder=decoder, share_decoder=share_decoder)
    shapes = {name: tuple(value.shape) for name, value in logits_of(model, make_images(SIZE)).items()}
    assert shapes == {name: (2, c, *SIZE) for name, c in zip(ALL_TASKS, (NUM_LABELS, 1, 3, 1), strict=True)}


def test_a_subset_of_tasks_gives_bit_equal_outputs_and_losses():
    model, images, labels = make_model("dinov2"), make_images(SIZE), make_labels(SIZE)
    with torch.no_grad():
        everything = model(images, labels=labels)
        for names in (["edges"], ["normals", "semseg"]):
            subset = model(images, labels=labels, tasks=names)
            assert_same(subset.logits, {name: everything.logits[name] for name in names})
            assert_same(subset.losses, {name: everything.losses[name] for name in names})


def test_the_loss_is_the_weighted_sum_of_the_losses_of_the_labelled_tasks():
    tasks = ["semseg", {"name": "depth", "weight": 0.25}, {"name": "normals", "weight": 0.0}, "edges"]
    model, labels = make_model("dinov2", tasks=tasks), make_labels(SIZE)
    output = model(make_images(SIZE), labels={name: labels[name] for name in ("depth", "normals", "edges")})
    assert list(output.losses) == ["depth", "normals", "edges"]
    assert list(output.logits) == list(ALL_TASKS)
    assert list(output)[0] == "loss"
    expected = 0.25 * output.losses["depth"] + output.losses["edges"]
    torch.testing.assert_close(output.loss, expected)
    assert output.losses["normals"] > 0
    for name, loss in output.losses.items():
        task = get_task(name)
        torch.testing.assert_close(loss, task.loss(output.logits[name], labels[name]))


def test_a_task_without_any_label_adds_exactly_nothing():
    model, images, labels = make_model("dinov2").train(), make_images(SIZE), make_labels(SIZE)
    alone = model(images, labels={"depth": labels["depth"]}).loss
    for name in ("semseg", "normals", "edges"):
        task = next(task for task in model.tasks if task.name == name)
        nothing = torch.stack([task.no_label(*SIZE)] * 2)
        output = model(images, labels={"depth": labels["depth"], name: nothing})
        assert output.losses[name].item() == 0.0
        assert torch.equal(output.loss, alone)
        model.zero_grad()
        output.loss.backward()
        assert not model.heads[name].weight.grad.any()
        assert model.heads["depth"].weight.grad.any()


def test_the_parameter_report_adds_up():
    model = make_model("swin")
    report = model.parameter_report()
    assert list(report) == ["backbone", "adapters", "decoders", "heads", "total"]
    assert report["total"]["total"] == sum(p.numel() for p in model.parameters())
    assert report["total"]["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for column in ("total", "trainable"):
        assert sum(report[group][column] for group in report if group != "total") == report["total"][column]
    assert report["backbone"] == {"total": sum(p.numel() for p in make_backbone("swin").parameters()), "trainable": 0}
    vta = sum(p.numel() for name, p in model.named_parameters() if ".vta_" in name)
    assert report["adapters"] == {"total": vta, "trainable": vta}
    out = model.decoder.out_channels
    assert report["heads"]["total"] == (NUM_LABELS + 1 + 3 + 1) * (out + 1)

    copies = make_model("swin", adapter=VtaAdapterConfig(train_adapted_blocks=True)).parameter_report()
    assert copies["adapters"] == report["adapters"]
    assert copies["backbone"]["trainable"] == copies["backbone"]["total"] - report["backbone"]["total"] > 0


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_baselines_share_one_pass_train_and_load_again(family, adapter, tmp_path):
    size = FAMILIES[family].size
    images, labels = make_images(size), make_labels(size)
    make_backbone(family).save_pretrained(tmp_path / "base")
    settings = {"tasks": list(ALL_TASKS), "num_labels": NUM_LABELS, "decoder_dim": 16}
    model = randomize(VtaModel.from_backbone(tmp_path / "base", adapter=ADAPTERS[adapter], **settings))
    assert model.first_task_block == model.num_blocks
    calls = []
    handle = model.backbone.get_submodule(model.family.blocks(model.backbone.config)[-1]).register_forward_hook(
        lambda *args: calls.append(1)
    )
    model(images, labels=labels).loss.backward()
    handle.remove()
    assert len(calls) == 1
    trainable = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.backbone.named_parameters() if "lora_" in name}
    assert bool(trainable) == (adapter == "lora")
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    with pytest.raises(ValueError, match="no VTA adapter"):
        _ = model.affinity

    expected = logits_of(model.eval(), images)
    model.save_pretrained(tmp_path / "full")
    loaded = AutoModel.from_pretrained(tmp_path / "full")
    assert_same(logits_of(loaded, images), expected)
    loaded.save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "full" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    if adapter == "none":
        with pytest.raises(ValueError, match="has no adapter.*use save_pretrained"):
            model.save_adapter(tmp_path / "adapter")
    else:
        model.save_adapter(tmp_path / "adapter")
        assert_same(logits_of(VtaModel.from_adapter(tmp_path / "adapter", tmp_path / "base"), images), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trainable_backbone_trains_and_drops_paths(family, tmp_path):
    row = FAMILIES[family]
    model = make_model(family, adapter=None, train_backbone=True, backbone_changes={row.drop_path: 0.5}).train()
    images, labels = make_images(row.size, 4), make_labels(row.size, 4)
    assert model.backbone.training
    assert differ(logits_of(model, images)["depth"], logits_of(model, images)["depth"])
    model(images, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        # Mask tokens, poolers and heads stand outside the graph.
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.requires_grad == (not model.family.is_unused(name)), name
    with pytest.raises(ValueError, match="also trains its backbone"):
        make_model(family, train_backbone=True).save_adapter(tmp_path)


@pytest.mark.parametrize("order", list(itertools.permutations(ALL_TASKS))[1::5])
def test_the_order_of_tasks_and_the_affinities_survive_saving(order, tmp_path):
    model, images = make_model("dinov2", tasks=list(order)), make_images(SIZE)
    expected, affinity = logits_of(model, images), model.affinity
    assert not torch.equal(affinity, affinity.T)
    model.save_pretrained(tmp_path / "full")
    model.save_adapter(tmp_path / "adapter")
    base = make_model("dinov2", adapter=None)
    base.backbone.load_state_dict({k.replace(".base_layer", ""): v for k, v in model.backbone.state_dict().items()
                                   if ".vta_" not in k})  # fmt: skip
    for loaded in (
        AutoModel.from_pretrained(tmp_path / "full"),
        VtaModel.from_adapter(tmp_path / "adapter", base.backbone),
    ):
        assert loaded.task_names == list(order)
        assert torch.equal(loaded.affinity, affinity)
        assert_same(logits_of(loaded, images), expected)


def test_permuted_tasks_with_permuted_embeddings_and_affinities_give_the_same_features():
    model = make_model("dinov2", tasks=["depth", "normals"])
    images = make_images(SIZE)
    with torch.no_grad():
        before = [model.backbone(images, task_ids=torch.full((2,), t)).last_hidden_state for t in (0, 1)]
        conditioning = find_context(model).conditioning["default"]
        embeddings = [embedding.clone() for embedding in conditioning.task_embeddings]
        for embedding, flipped in zip(conditioning.task_embeddings, reversed(embeddings), strict=True):
            embedding.copy_(flipped)
        conditioning.set_affinity(conditioning.affinity.flip(0, 1), conditioning.mixing_weights.flip(0, 1))
        after = [model.backbone(images, task_ids=torch.full((2,), t)).last_hidden_state for t in (1, 0)]
    for left, right in zip(before, after, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_two_tasks_of_one_kind_stand_side_by_side(tmp_path):
    tasks = ["semseg", {"name": "parts", "type": "semseg", "num_labels": 7}, {"name": "shared", "type": "depth"}]
    model, images = make_model("dinov2", tasks=tasks), make_images(SIZE)
    logits = logits_of(model, images)
    assert [logits[name].shape[1] for name in ("semseg", "parts", "shared")] == [NUM_LABELS, 7, 1]
    labels = {"semseg": torch.zeros(2, *SIZE).long(), "parts": torch.full((2, *SIZE), 6)}
    assert list(model(images, labels=labels).losses) == ["semseg", "parts"]
    with pytest.raises(ValueError, match=r"labels\['semseg'\]: class id 6"):
        model(images, labels={"semseg": labels["parts"]})
    model.save_pretrained(tmp_path)
    assert_same(logits_of(AutoModel.from_pretrained(tmp_path), images), logits)


def test_the_config_round_trip_keeps_tasks_and_label_names(tmp_path):
    names = {index: f"class {index}" for index in range(18)}
    model = make_model("swin", num_labels=18, id2label=names, decoder="linear", fan_out="batched")
    model.config.save_pretrained(tmp_path)
    config = VtaConfig.from_pretrained(tmp_path)
    assert config.to_dict() == model.config.to_dict()
    assert config.id2label == names
    assert config.num_labels == 18
    assert config.tasks[0] == {"name": "semseg", "type": "semseg", "num_labels": 18, "weight": 1.0}
    assert VtaConfig(tasks=["semseg"], id2label=names).tasks[0]["num_labels"] == 18
    assert config.backbone_config.model_type == "swin"
    rebuilt = VtaModel(config)
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_a_model_that_was_built_from_its_config_starts_as_a_no_op():
    model = make_model("dinov2")
    rebuilt = VtaModel(model.config).eval()
    images = make_images(SIZE)
    with torch.no_grad():
        with_task = rebuilt.backbone(images, task_ids=torch.tensor([1, 1])).last_hidden_state
        rebuilt.backbone.disable_adapters()
        assert torch.equal(rebuilt.backbone(images).last_hidden_state, with_task)


@pytest.mark.parametrize(
    "settings",
    [{}, {"adapter": VtaAdapterConfig(train_adapted_blocks=True)}, {"adapter": None}, {"train_backbone": True}],
    ids=["adapter", "trained copies", "no adapter", "trained backbone"],
)
@pytest.mark.parametrize("family", ["swin", "dinov2"])
def test_a_loaded_model_trains_what_it_trained_before_it_was_saved(tmp_path, family, settings):
    model = make_model(family, **settings)
    model.save_pretrained(tmp_path)
    loaded = VtaModel.from_pretrained(tmp_path)
    trainable = [{name for name, one in m.named_parameters() if one.requires_grad} for m in (model, loaded)]
    assert trainable[0] == trainable[1]
    assert loaded.parameter_report() == model.parameter_report()
    other = VtaModel.from_pretrained(tmp_path, train_backbone=not settings.get("train_backbone", False))
    assert (other.parameter_report()["backbone"]["trainable"] > 0) == (not settings.get("train_backbone", False))


@pytest.mark.parametrize("decoder", ["fpn", "swin_unet", "linear"])
def test_a_model_with_any_decoder_loads_as_it_was_saved(tmp_path, decoder):
    model = make_model("dinov2", decoder=decoder)
    model.save_pretrained(tmp_path)
    images = make_images(FAMILIES["dinov2"].size)
    assert_same(logits_of(VtaModel.from_pretrained(tmp_path).eval(), images), logits_of(model, images))
