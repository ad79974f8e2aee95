"""Backbones from folders and configs, and where adapters go by default."""

import pytest
import torch
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    CLIPConfig,
    CLIPModel,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    ResNetConfig,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from mt_adapters.backbones import get_family, load_backbone
from tiny_models import FAMILIES, make_backbone, make_config


def test_the_published_swin_is_adapted_in_blocks_15_to_18_of_stage_3_and_in_stage_4():
    targets = get_family("swin").default_targets(SwinConfig(depths=[2, 2, 18, 2]))
    # Counted from 0 in the paths and from 1 in the paper.
    expected = [f"encoder.layers.2.blocks.{block - 1}" for block in (15, 16, 17, 18)]
    assert targets == [*expected, "encoder.layers.3.blocks.0", "encoder.layers.3.blocks.1"]


@pytest.mark.parametrize(("depth", "num_adapted"), [(18, 4), (12, 4), (9, 3), (6, 2), (5, 1), (3, 1), (2, 1), (1, 1)])
def test_the_last_third_of_the_second_to_last_stage_is_adapted_at_most_4_at_least_1(depth, num_adapted):
    targets = get_family("swin").default_targets(SwinConfig(depths=[2, 2, depth, 2]))
    assert [path for path in targets if "layers.2" in path] == [
        f"encoder.layers.2.blocks.{block}" for block in range(depth - num_adapted, depth)
    ]
    assert len(targets) == num_adapted + 2


@pytest.mark.parametrize(("depth", "num_adapted"), [(12, 4), (24, 8), (6, 2), (2, 1), (1, 1)])
def test_the_last_third_of_a_plain_vit_is_adapted(depth, num_adapted):
    targets = get_family("dinov2").default_targets(Dinov2Config(num_hidden_layers=depth))
    assert targets == [f"encoder.layer.{block}" for block in range(depth - num_adapted, depth)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_gives_the_saved_weights_in_float32_and_eval_mode(family, tmp_path):
    saved = make_backbone(family)
    saved.half().save_pretrained(tmp_path)
    loaded = load_backbone(tmp_path)
    assert not loaded.training
    for name, tensor in saved.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32 or not tensor.is_floating_point()
        assert torch.equal(loaded.state_dict()[name], tensor.to(loaded.state_dict()[name].dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_paths_channels_and_strides_are_those_of_the_model(family):
    seam, backbone = get_family(family), make_backbone(family)
    config = backbone.config
    for stage, channels in zip(seam.stages(config), seam.stage_channels(config), strict=True):
        for path in stage:
            norm = getattr(backbone.get_submodule(path), seam.norms[0])
            assert norm.normalized_shape == (channels,)
    size = FAMILIES[family].size
    tokens = seam.stem(backbone, torch.randn(1, 3, *size))
    maps = seam.run_blocks(backbone, tokens, 0, len(seam.blocks(config))).feature_maps
    for map_, channels, stride in zip(maps, seam.map_channels(config), seam.map_strides(config), strict=True):
        assert tuple(map_.shape) == (1, channels, size[0] // stride, size[1] // stride)
    for block in range(len(seam.blocks(config)) + 1):
        before = seam.run_blocks(backbone, tokens, 0, block).feature_maps
        assert len(before) == seam.num_maps_before(config, block)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_smallest_image_works_and_a_smaller_one_is_refused(family):
    seam, config = get_family(family), make_config(family)
    smallest = seam.min_image_size(config)
    seam.check_image_size(config, smallest, smallest)
    with pytest.raises(ValueError, match=rf"{smallest - 1} x {smallest} .* at least {smallest} x {smallest}"):
        seam.check_image_size(config, smallest - 1, smallest)


SHAPE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
IMAGE = {"image_size": 64, "patch_size": 16}
TWO_ENCODERS = {"vision_config": SHAPE | IMAGE, "text_config": SHAPE | {"vocab_size": 50}}
DECODER = {f"decoder_{name}": value for name, value in SHAPE.items()}
# Models of other tasks whose checkpoints hold an image encoder: name of the encoder in the model, its own type.
CARRIERS = {
    "vit_classifier": (ViTForImageClassification, ViTConfig(**SHAPE, **IMAGE), "vit", "vit"),
    "deit_teacher": (DeiTForImageClassificationWithTeacher, DeiTConfig(**SHAPE, **IMAGE), "deit", "deit"),
    "beit_classifier": (BeitForImageClassification, BeitConfig(**SHAPE, **IMAGE), "beit", "beit"),
    "mae": (ViTMAEForPreTraining, ViTMAEConfig(**SHAPE, **IMAGE, **DECODER), "vit", "vit"),
    "clip": (CLIPModel, CLIPConfig(**TWO_ENCODERS), "vision_model", "clip_vision_model"),
    "siglip": (SiglipModel, SiglipConfig(**TWO_ENCODERS), "vision_model", "siglip_vision_model"),
}


@pytest.mark.parametrize("carrier", CARRIERS)
def test_checkpoints_of_other_tasks_give_their_image_encoder(carrier, tmp_path):
    model_class, config, encoder, model_type = CARRIERS[carrier]
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    loaded = load_backbone(tmp_path)
    assert loaded.config.model_type == load_backbone(config).config.model_type == model_type
    expected = getattr(model, encoder).state_dict()
    family = get_family(model_type)
    compared = {name: tensor for name, tensor in loaded.state_dict().items() if not family.is_unused(name)}
    assert compared
    for name, tensor in compared.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(("window", "expected"), [(4, [4, 4, 4, 2]), (2, [2, 2, 2, 2]), (16, [16, 8, 4, 2])])
def test_windows_of_swin_v2_are_no_larger_than_the_pretraining_map(window, expected):
    family, backbone = get_family("swinv2"), make_backbone("swinv2", window_size=window)
    assert [family.attention_grid(backbone.config, stage) for stage in range(4)] == [(side, side) for side in expected]
    for stage, side in enumerate(expected):
        assert {block.window_size for block in backbone.encoder.layers[stage].blocks} == {side}


def test_an_unknown_backbone_type_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown backbone type 'resnet'; known are \['beit', 'clip_vision_model', .*'vit'\]"
    ):
        load_backbone(ResNetConfig())


def test_a_hub_name_without_network_says_what_to_give():
    with pytest.raises(ValueError, match=r"(?s)no-such-org/no-such-model.*Give a Hub id or a folder"):
        load_backbone("no-such-org/no-such-model")
