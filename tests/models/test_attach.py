"""An adapter on another backbone: what carries over, what starts anew, and the report of both."""

import logging

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from mt_adapters import VtaAdapterConfig, VtaModel
from mt_adapters.tuners.vta import VtaLayer
from tiny_models import (
    ALL_TASKS,
    FAMILIES,
    assert_same,
    differ,
    logits_of,
    make_backbone,
    make_images,
    make_labels,
    make_model,
)

# Old family, its changes, new family, its changes.
PAIRS = {
    "wider": ("dinov2", {}, "dinov2", {"hidden_size": 32}),
    "deeper": ("dinov2", {}, "dinov2", {"num_hidden_layers": 9}),
    "shallower": ("dinov2", {"num_hidden_layers": 9}, "dinov2", {}),
    "deeper stages": ("swin", {}, "swin", {"depths": [2, 2, 6, 2]}),
    "Swin to DINOv2": ("swin", {}, "dinov2", {}),
    "DINOv2 to Swin": ("dinov2", {}, "swin", {}),
    "Swin to SegFormer": ("swin", {}, "segformer", {}),
    "ViT to BEiT": ("vit", {}, "beit", {}),
}


def attach(pair: str, folder, **settings) -> tuple[VtaModel, VtaModel, object]:
    old, old_changes, new, new_changes = PAIRS[pair]
    source = make_model(old, backbone_changes=old_changes, **settings)
    source.save_adapter(folder)
    backbone = make_backbone(new, **new_changes)
    return source, *VtaModel.from_adapter(folder, backbone=backbone, output_loading_info=True)


def layers_of(model: VtaModel) -> list[VtaLayer]:
    return [module for module in model.modules() if isinstance(module, VtaLayer)]


def own_tensors(model: VtaModel) -> dict[str, torch.Tensor]:
    """All that belongs to adapter, decoders and heads."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if ".vta_" in name or name.startswith(("decoder.", "heads."))
    }


@pytest.mark.parametrize("pair", PAIRS)
def test_affinities_and_embeddings_always_carry_over_and_the_model_runs(pair, tmp_path):
    source, model, report = attach(pair, tmp_path)
    assert torch.equal(model.affinity, source.affinity)
    assert torch.equal(model.conditioning.mixing_weights, source.conditioning.mixing_weights)
    for task, embedding in enumerate(source.conditioning.task_embeddings):
        assert torch.equal(model.conditioning.task_embeddings[task], embedding)
    assert [path for path, m in model.backbone.named_modules() if isinstance(m, VtaLayer)] == (
        model.family.default_targets(model.backbone.config)
    )
    size = FAMILIES[PAIRS[pair][2]].size
    logits = logits_of(model, make_images(size))
    assert list(logits) == list(ALL_TASKS)
    assert all(value.isfinite().all() for value in logits.values())
    model.train()(make_images(size), labels=make_labels(size)).loss.backward()
    never = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not never
    # Plain ViTs of one size differ in nothing that an adapter touches.
    assert report.is_complete == (pair == "ViT to BEiT")


@pytest.mark.parametrize("pair", PAIRS)
def test_the_report_names_every_tensor_once_and_tells_the_truth(pair, tmp_path):
    source, model, report = attach(pair, tmp_path)
    files = {}
    for file in tmp_path.glob("*.safetensors"):
        files |= load_file(file)
    tensors = {name.replace(".default", ""): value for name, value in own_tensors(model).items()}
    here = {key.removeprefix("base_model.model."): key for key in report.loaded_keys}
    loaded = {name.removeprefix("backbone."): value for name, value in tensors.items()}
    named = [*report.loaded_keys, *report.mismatched_keys, *report.missing_keys]
    assert sorted(key.removeprefix("base_model.model.") for key in named) == sorted(loaded)
    assert len(report.loaded_keys) + len(report.mismatched_keys) + len(report.unexpected_keys) == len(files)
    # Adapters of blocks pair from the last block on.
    pairs = dict(zip(paths_of(model)[::-1], paths_of(source)[::-1], strict=False))
    pairs_of_host = {paths_of(model)[0]: paths_of(source)[0]}
    for short, key in here.items():
        path, separator, part = short.partition(".vta_")
        blocks = pairs_of_host if part.startswith("shared.") else pairs
        old_key = f"base_model.model.{blocks[path]}.vta_{part}" if separator else key
        assert torch.equal(loaded[short], files[old_key]), short
    for key, (found, expected) in report.mismatched_keys.items():
        assert found != expected == tuple(loaded[key.removeprefix("base_model.model.")].shape), key


def paths_of(model: VtaModel) -> list[str]:
    return [path for path, module in model.backbone.named_modules() if isinstance(module, VtaLayer)]


def test_on_a_deeper_backbone_the_last_blocks_get_the_adapters_and_the_others_start_as_no_ops(tmp_path):
    source, model, report = attach("deeper", tmp_path)
    assert [len(layers_of(model)), len(layers_of(source))] == [3, 2]
    for old, new in zip(layers_of(source), layers_of(model)[1:], strict=True):
        assert_same(new.vta_adapter.state_dict(), old.vta_adapter.state_dict())
    fresh = layers_of(model)[0].vta_adapter["default"]
    assert not fresh.bottleneck.up.weight.any()
    assert not fresh.attention_bias.matrix.any()
    assert not report.unexpected_keys
    assert all("encoder.layer.6." in key for key in report.missing_keys)


def test_on_a_shallower_backbone_the_first_adapters_have_no_place(tmp_path):
    source, model, report = attach("shallower", tmp_path)
    for old, new in zip(layers_of(source)[1:], layers_of(model), strict=True):
        assert_same(new.vta_adapter.state_dict(), old.vta_adapter.state_dict())
    assert report.unexpected_keys
    assert all("encoder.layer.6.vta_adapter" in key for key in report.unexpected_keys)
    assert not report.missing_keys


def test_on_a_wider_backbone_attention_matrices_and_heads_carry_over(tmp_path):
    source, model, report = attach("wider", tmp_path)
    for old, new in zip(layers_of(source), layers_of(model), strict=True):
        old_bias, new_bias = (layer.vta_adapter["default"].attention_bias for layer in (old, new))
        assert_same(new_bias.state_dict(), old_bias.state_dict())
    assert_same(model.heads.state_dict(), source.heads.state_dict())
    assert any("bottleneck.up.weight" in key for key in report.mismatched_keys)


def test_trained_copies_of_blocks_carry_over_within_a_family_only(tmp_path):
    adapter = VtaAdapterConfig(train_adapted_blocks=True)
    source, model, _ = attach("deeper", tmp_path / "a", adapter=adapter)
    for old, new in zip(layers_of(source), layers_of(model)[1:], strict=True):
        assert_same(new.vta_block.state_dict(), old.vta_block.state_dict())
    _, model, report = attach("ViT to BEiT", tmp_path / "b", adapter=VtaAdapterConfig(train_adapted_blocks=True))
    for layer in layers_of(model):
        assert_same(layer.vta_block["default"].state_dict(), layer.base_layer.state_dict())
    assert any(".vta_block." in key for key in report.unexpected_keys)


def test_a_backbone_of_the_same_shape_takes_everything_and_nothing_is_reported(tmp_path, caplog):
    source = make_model("swin")
    source.save_adapter(tmp_path)
    other = make_backbone("swin")
    images = make_images(FAMILIES["swin"].size)
    with caplog.at_level(logging.WARNING):
        model, report = VtaModel.from_adapter(tmp_path, backbone=other, output_loading_info=True)
    assert report.is_complete
    assert len(report.loaded_keys) == len(own_tensors(model))
    assert_same(own_tensors(model), own_tensors(source))
    assert "another backbone" not in caplog.text
    assert differ(logits_of(model, images)["depth"], logits_of(source, images)["depth"]), "the backbones differ"


def test_what_starts_anew_is_logged_with_names_and_shapes(tmp_path, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    attach("wider", tmp_path)
    logger.removeHandler(caplog.handler)
    assert "tensors carried over" in caplog.text
    assert "bottleneck.up.weight (48, 16), here (32, 10)" in caplog.text


def test_the_new_model_names_its_own_backbone_and_saves_and_loads_as_usual(tmp_path):
    make_model("dinov2").save_adapter(tmp_path / "old")
    make_backbone("dinov2", hidden_size=32).save_pretrained(tmp_path / "base")
    model = VtaModel.from_adapter(tmp_path / "old", backbone=tmp_path / "base")
    model.save_adapter(tmp_path / "new")
    again, report = VtaModel.from_adapter(tmp_path / "new", output_loading_info=True)
    assert report.is_complete
    assert again.config.backbone_name_or_path == str(tmp_path / "base")
    images = make_images(FAMILIES["dinov2"].size)
    assert_same(logits_of(again, images), logits_of(model, images))


def test_a_named_backbone_that_is_no_longer_the_adapters_is_refused(tmp_path):
    make_backbone("dinov2").save_pretrained(tmp_path / "base")
    VtaModel.from_backbone(tmp_path / "base", tasks=["depth"], decoder_dim=16).save_adapter(tmp_path / "adapter")
    VtaModel.from_adapter(tmp_path / "adapter")
    make_backbone("dinov2", hidden_size=32).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"made for a backbone with .* but this one has"):
        VtaModel.from_adapter(tmp_path / "adapter")


def test_adapters_of_other_methods_carry_over_too(tmp_path):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    source = make_model("dinov2", adapter=lora)
    source.save_adapter(tmp_path)
    model, report = VtaModel.from_adapter(
        tmp_path, backbone=make_backbone("dinov2", num_hidden_layers=9), output_loading_info=True
    )
    loaded = [key for key in report.loaded_keys if "lora_" in key]
    assert len(loaded) == 6 * 2 * 2
    old, new = source.state_dict(), model.state_dict()
    name = "backbone.encoder.layer.5.attention.q_proj.lora_A.default.weight"
    assert torch.equal(new[name], old[name])
    assert any("encoder.layer.8." in key for key in report.missing_keys)


def test_a_bad_file_is_refused_on_a_new_backbone_as_on_the_old_one(tmp_path):
    make_model("dinov2").save_adapter(tmp_path)
    (tmp_path / "task_edges.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no task_edges.safetensors"):
        VtaModel.from_adapter(tmp_path, backbone=make_backbone("dinov2", hidden_size=32))
