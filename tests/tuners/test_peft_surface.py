"""peft's and transformers' own methods on a VTA model in memory; what is saved and loaded: test_peft_files.py."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import (
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from torch import Tensor, nn
from transformers import Dinov2Backbone, Dinov2ForImageClassification, SwinForImageClassification

from mt_adapters import VtaAdapterConfig, VtaConfig
from mt_adapters.backbones import get_family
from mt_adapters.tuners.vta import VtaLayer, VtaTuner, find_context
from tiny_models import ALL_TASKS, FAMILIES, differ, make_backbone, make_config, make_images, make_model, randomize

TASKS = list(ALL_TASKS)
families = pytest.mark.parametrize("family", FAMILIES)
some_families = pytest.mark.parametrize("family", ["swin", "dinov2", "segformer"])


def vta(**settings: Any) -> VtaAdapterConfig:
    return VtaAdapterConfig(**{"tasks": TASKS} | settings)


def adapt(family: str, **settings: Any) -> Any:
    return randomize(get_peft_model(make_backbone(family), vta(**settings))).eval()


def other_targets(family: str) -> list[str]:
    """One block more than by default at the front, one less at the end."""
    targets = FAMILIES[family].targets
    return [get_family(family).blocks(make_config(family))[-len(targets) - 1], *targets[:-1]]


def hidden_of(model: nn.Module, images: Tensor, task_ids: list[int]) -> Tensor:
    return model(images, task_ids=torch.tensor(task_ids)).last_hidden_state


@torch.no_grad()
def features_of(model: nn.Module, images: Tensor, task_ids: list[int]) -> Tensor:
    return hidden_of(model, images, task_ids)


@torch.no_grad()
def base_features(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).last_hidden_state


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@some_families
def test_a_peft_model_has_the_attributes_that_peft_promises(family):
    backbone = make_backbone(family)
    model = get_peft_model(backbone, vta(), adapter_name="mine")
    assert type(model) is PeftModel
    assert type(model.base_model) is VtaTuner
    assert model.get_base_model() is model.base_model.model is backbone
    assert model.peft_type == "VTA"
    assert list(model.peft_config) == ["mine"]
    assert model.active_adapter == "mine"
    assert model.active_adapters == ["mine"]
    assert model.targeted_module_names == FAMILIES[family].targets
    assert model.modules_to_save is None
    assert not model.supports_lora_conversion()


@pytest.mark.parametrize(("family", "dims"), [("dinov2", [48, 48]), ("swin", [96, 192, 192])])
def test_the_counts_of_parameters_are_those_of_the_layers(family, dims, capsys):
    backbone, embedding_dim = make_backbone(family), 10
    num_base = num_parameters(backbone)
    model = get_peft_model(backbone, vta(embedding_dim=embedding_dim))
    # The token grids are 4 x 4 (DINOv2: 56 / 14) and 2 x 2 (Swin's window).
    rows = columns = {"dinov2": 4, "swin": 2}[family]

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    expected = len(TASKS) * embedding_dim
    for dim in dims:
        bias = rows * columns * columns + linear(embedding_dim, 2 * columns)
        norms = 2 * linear(embedding_dim, 3 * dim)
        condition, film = linear(embedding_dim, embedding_dim), linear(embedding_dim, 2 * dim)
        expected += bias + norms + condition + film + linear(dim, dim // 3) + linear(dim // 3, dim)
    if family == "swin":
        # Between its stages: a layer norm of four tokens and a projection of them without a bias.
        expected += 2 * 4 * 96 + 4 * 96 * 192
    total = num_base + expected
    assert model.get_nb_trainable_parameters() == (expected, total)
    model.print_trainable_parameters()
    percent = f"{100 * expected / total:.4f}"
    assert capsys.readouterr().out == (
        f"trainable params: {expected:,d} || all params: {total:,d} || trainable%: {percent}\n"
    )


@some_families
def test_peft_reports_the_state_of_model_and_layers(family):
    backbone, row = make_backbone(family), FAMILIES[family]
    num_base = num_parameters(backbone)
    model = get_peft_model(backbone, vta())
    num_first = num_parameters(backbone) - num_base
    model.add_adapter("second", vta(target_modules=other_targets(family)))
    status = model.get_model_status()
    assert status.base_model_type == type(backbone).__name__
    assert status.adapter_model_type == "VtaTuner"
    assert status.peft_types == {"default": "VTA", "second": "VTA"}
    assert (status.trainable_params, status.total_params) == (num_first, num_parameters(backbone))
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.requires_grad == {"default": True, "second": False}
    assert status.devices == {"default": ["cpu"], "second": ["cpu"]}
    found = {layer.name.removeprefix("model."): layer.available_adapters for layer in model.get_layer_status()}
    names = {"default": row.targets, "second": other_targets(family)}
    paths = [other_targets(family)[0], *row.targets]
    assert found == {path: [name for name in names if path in names[name]] for path in paths}
    assert status.num_adapter_layers == len(paths)

    model.set_requires_grad(["default", "second"], requires_grad=False)
    assert model.get_model_status().requires_grad == {"default": False, "second": False}
    model.set_adapter("second")
    assert model.get_model_status().requires_grad == {"default": False, "second": True}
    model.set_adapter("default", inference_mode=True)
    status = model.get_model_status()
    assert status.requires_grad == {"default": False, "second": False}
    assert status.active_adapters == ["default"]
    model.disable_adapter_layers()
    assert model.get_model_status().enabled is False
    # The backbone by itself, as transformers' add_adapter leaves it.
    status = get_model_status(backbone)
    assert (status.base_model_type, status.num_adapter_layers) == (type(backbone).__name__, len(paths))
    assert [layer.module_type for layer in get_layer_status(backbone)] == ["VtaLayer"] * len(paths)


@some_families
def test_adapter_layers_can_be_switched_off_and_on(family):
    backbone, images = make_backbone(family), make_images(FAMILIES[family].size)
    plain = base_features(backbone, images)
    model = randomize(get_peft_model(backbone, vta())).eval()
    adapted = features_of(model, images, [2, 0])
    model.base_model.disable_adapter_layers()
    assert torch.equal(base_features(model, images), plain)
    with model.disable_adapter():
        assert torch.equal(base_features(model, images), plain)
    assert torch.equal(base_features(model, images), plain), "it was off before and stays off"
    model.base_model.enable_adapter_layers()
    assert torch.equal(features_of(model, images, [2, 0]), adapted)


@some_families
def test_what_cannot_be_done_is_refused_with_the_reason_and_without_harm(family):
    model, images = adapt(family), make_images(FAMILIES[family].size)
    model.add_adapter("second", vta())
    expected = features_of(model, images, [2, 0])
    merged = "a VTA adapter cannot be merged: what it adds depends on the task"
    refused: list[tuple[type[Exception], str, Callable]] = [
        (NotImplementedError, merged, model.merge_adapter),
        (NotImplementedError, merged, lambda: model.merge_adapter(["second"], safe_merge=True)),
        (NotImplementedError, merged, model.merge_and_unload),
        (NotImplementedError, "nothing to unmerge", model.unmerge_adapter),
        (AttributeError, "add_weighted_adapter", lambda: model.add_weighted_adapter(["default"], [1.0], "sum")),
        (ValueError, "'default' already exists", lambda: model.add_adapter("default", vta())),
        (
            ValueError,
            "VTA.*not compatible with the `PeftMixedModel`",
            lambda: get_peft_model(model, vta(), mixed=True),
        ),
    ]
    for error, message, call in refused:
        with pytest.raises(error, match=message):
            call()
        assert torch.equal(features_of(model, images, [2, 0]), expected)
        assert model.get_model_status().merged_adapters == []
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"\['default', 'second'\] are active at once; a VTA backbone runs one"):
        features_of(model, images, [2, 0])
    model.set_adapter("default")
    assert torch.equal(features_of(model, images, [2, 0]), expected)


@pytest.mark.parametrize("name", ["a.b", "", "train", "items"])
def test_a_name_that_torch_allows_no_module_is_refused_before_anything_changes(name):
    backbone, images = make_backbone("dinov2"), make_images(FAMILIES["dinov2"].size)
    message = f"'{name}' cannot be the name of an adapter, choose another"
    with pytest.raises(ValueError, match=message):
        get_peft_model(backbone, vta(), adapter_name=name)
    assert not any(isinstance(module, VtaLayer) for module in backbone.modules())
    model = randomize(get_peft_model(backbone, vta())).eval()
    expected = features_of(model, images, [2, 0])
    with pytest.raises(ValueError, match=message):
        model.add_adapter(name, vta(target_modules=other_targets("dinov2")))
    assert list(model.peft_config) == ["default"]
    assert model.get_model_status().num_adapter_layers == 2
    assert torch.equal(features_of(model, images, [2, 0]), expected)


@pytest.mark.parametrize("how", ["peft", "transformers"])
def test_an_adapter_that_is_refused_half_way_leaves_nothing_behind(how):
    backbone, images = make_backbone("dinov2"), make_images(FAMILIES["dinov2"].size)
    model: Any = get_peft_model(backbone, vta()) if how == "peft" else backbone
    if how == "transformers":
        model.add_adapter(vta())
    expected = features_of(randomize(model).eval(), images, [2, 0])
    names = [name for name, _ in model.named_parameters() if ".vta_" in name]
    wrong, right = vta(target_modules=["layer.2", "layer.4", "layernorm"]), vta()
    with pytest.raises(ValueError, match=r"'layernorm', which is no transformer block"):
        model.add_adapter("second", wrong) if how == "peft" else model.add_adapter(wrong, "second")
    assert [name for name, _ in model.named_parameters() if ".vta_" in name] == names
    assert list(find_context(model).conditioning) == list(model.peft_config) == ["default"]
    assert torch.equal(features_of(model, images, [2, 0]), expected)
    model.add_adapter("second", right) if how == "peft" else model.add_adapter(right, "second")
    assert list(model.peft_config) == ["default", "second"]


@pytest.mark.parametrize("how", ["peft", "transformers"])
@pytest.mark.parametrize("name", ["bottleneck", "encoder", "5", "affinity", "vta_adapter"])
def test_names_that_would_lose_another_adapters_weights_are_refused(name, how):
    backbone = make_backbone("dinov2")
    names = ("default", name) if how == "peft" else (name, "default")
    model: Any = backbone
    if how == "peft":
        model = get_peft_model(backbone, vta(), adapter_name=names[0])
    else:
        model.add_adapter(vta(), names[0])

    def add(new: str) -> None:
        model.add_adapter(new, vta()) if how == "peft" else model.add_adapter(vta(), new)

    with pytest.raises(ValueError, match=rf"of the adapters .*\['{name}'\] are also names of modules"):
        add(names[1])
    assert list(model.peft_config) == [names[0]]
    if how == "peft":
        num_keys = len(get_peft_model_state_dict(model, save_embedding_layers=False))
        add("good")
        for adapter in ("default", "good"):
            state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
            assert len(state) == num_keys


@some_families
def test_wrapping_twice_warns_and_a_name_used_again_is_a_new_adapter(family):
    backbone, images = make_backbone(family), make_images(FAMILIES[family].size)
    plain = base_features(backbone, images)
    first = randomize(get_peft_model(backbone, vta())).eval()
    expected = features_of(first, images, [2, 0])
    with pytest.warns(UserWarning, match="for a second time"):
        model = get_peft_model(backbone, vta(target_modules=other_targets(family)), adapter_name="second")
    assert torch.equal(features_of(model, images, [2, 0]), plain)
    model.set_adapter("default")
    assert torch.equal(features_of(model, images, [2, 0]), expected)

    # Other tasks, another size, other blocks.
    config = VtaAdapterConfig(tasks=["depth"], embedding_dim=8, target_modules=other_targets(family))
    with pytest.warns(UserWarning, match="for a second time"):
        model = get_peft_model(first, config).eval()
    assert torch.equal(base_features(model, images), plain)
    layers = {name: layer for name, layer in backbone.named_modules() if isinstance(layer, VtaLayer)}
    assert [name for name, layer in layers.items() if "default" in layer.vta_adapter] == other_targets(family)
    assert [tuple(p.shape) for p in find_context(model).conditioning["default"].parameters()] == [(8,)]
    assert all(p.requires_grad == (".default." in name) for name, p in model.named_parameters())
    randomize(model)
    assert differ(base_features(model, images), plain)


@families
def test_of_adapters_on_different_blocks_all_blocks_choose_the_same_after_a_deletion(family):
    blocks = get_family(family).blocks(make_config(family))[-3:]
    images = make_images(FAMILIES[family].size)
    model = get_peft_model(make_backbone(family), vta(target_modules=[blocks[0]]), adapter_name="b")
    model.add_adapter("c", vta(target_modules=[blocks[1]]))
    model.add_adapter("a", vta(target_modules=[blocks[2]]))
    randomize(model).eval()
    expected = {}
    for name in ("a", "b", "c"):
        model.set_adapter(name)
        expected[name] = features_of(model, images, [2, 0])
    for deleted, chosen in (("c", "a"), ("a", "b")):
        model.set_adapter(deleted)
        with pytest.warns(UserWarning, match=f"{deleted} was active which is now deleted.*{chosen}"):
            model.delete_adapter(deleted)
        assert model.active_adapters == [model.active_adapter] == [chosen]
        assert model.get_model_status().active_adapters == [chosen]
        assert torch.equal(features_of(model, images, [2, 0]), expected[chosen])


@some_families
def test_injecting_adapts_the_model_itself(family):
    backbone, images = make_backbone(family), make_images(FAMILIES[family].size)
    plain = base_features(backbone, images)
    assert inject_adapter_in_model(vta(), backbone, "mine") is backbone
    assert torch.equal(features_of(backbone, images, [2, 0]), plain)
    assert differ(features_of(randomize(backbone), images, [2, 0]), plain)
    # With a state dict its keys, not the config, say which blocks are adapted.
    state = get_peft_model_state_dict(backbone, adapter_name="mine", save_embedding_layers=False)
    other = make_backbone(family)
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        inject_adapter_in_model(vta(target_modules=other_targets(family)), other, "mine", state_dict=state)
    assert [n for n, m in other.named_modules() if isinstance(m, VtaLayer)] == FAMILIES[family].targets


@pytest.mark.parametrize(
    ("family", "base_class"),
    [("dinov2", Dinov2Backbone), ("dinov2", Dinov2ForImageClassification), ("swin", SwinForImageClassification)],
)
def test_other_classes_of_a_family_can_be_adapted(family, base_class):
    config = make_config(family)
    if base_class is Dinov2Backbone:
        config.out_features = ["stage6"]
    backbone, images = base_class(config).eval(), make_images(FAMILIES[family].size)

    @torch.no_grad()
    def output_of(model: nn.Module, **keywords: Any) -> Tensor:
        output = model(images, **keywords)
        return output.feature_maps[0] if base_class is Dinov2Backbone else output.logits

    plain = output_of(backbone)
    model = get_peft_model(backbone, vta()).eval()
    assert torch.equal(output_of(model, task_ids=torch.tensor([2, 0])), plain)
    randomize(model)
    assert differ(output_of(model, task_ids=torch.tensor([2, 0])), output_of(model, task_ids=torch.tensor([1, 0])))
    assert torch.equal(output_of(model.unload()), plain)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@some_families
def test_a_copied_or_pickled_peft_model_is_equal_and_independent(family, copied):
    model, images = adapt(family), make_images(FAMILIES[family].size)
    expected = features_of(model, images, [2, 0])
    twin = copied(model)
    assert torch.equal(features_of(twin, images, [2, 0]), expected)
    assert differ(features_of(randomize(twin), images, [2, 0]), expected)
    assert torch.equal(features_of(model, images, [2, 0]), expected)


def test_pickled_configs_are_equal():
    model = make_model("swin", adapter=vta(target_modules=["encoder.layers.3.blocks.1"], attention_grid=[3, 5]))
    configs = [vta(), vta(target_modules={"layer.5", "layer.4"}, residual="figure"), model.config]
    # JSON has no sets, and the files of equal adapters are equal.
    assert configs[1] == vta(target_modules=["layer.4", "layer.5"], residual="figure")
    configs += model.backbone.peft_config.values()
    for config in configs:
        found = pickle.loads(pickle.dumps(config))
        assert type(found) is type(config)
        assert found == config
        assert found.to_dict() == config.to_dict()
        if not isinstance(config, VtaConfig):
            assert found.peft_type is config.peft_type
