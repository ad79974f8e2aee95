"""Settings of a family that change how its model runs: the seam follows the model's own forward to the last bit."""

import pytest
import torch
from peft import get_peft_model

from mt_adapters import VtaAdapterConfig
from mt_adapters.backbones import get_family
from tiny_models import FAMILIES, differ, make_backbone, make_images, randomize

VARIANTS = {
    "beit_shared_positions": (
        "beit",
        {"use_relative_position_bias": False, "use_shared_relative_position_bias": True},
    ),
    "beit_both_positions": ("beit", {"use_shared_relative_position_bias": True}),
    "beit_absolute_positions": (
        "beit",
        {"use_relative_position_bias": False, "use_absolute_position_embeddings": True},
    ),
    "beit_mean_pooling": ("beit", {"use_mean_pooling": True}),
    "beit_no_layer_scale": ("beit", {"layer_scale_init_value": 0.0}),
    "dinov2_swiglu": ("dinov2_with_registers", {"use_swiglu_ffn": True}),
    "dinov2_no_registers": ("dinov2_with_registers", {"num_register_tokens": 0}),
    "dinov3_gated": ("dinov3_vit", {"use_gated_mlp": True, "num_register_tokens": 0}),
    "siglip_no_head": ("siglip_vision_model", {"vision_use_head": False}),
    "swinv2_other_pretraining_windows": ("swinv2", {"pretrained_window_sizes": [2, 2, 2, 2]}),
    "segformer_no_reduction": ("segformer", {"sr_ratios": [4, 2, 1, 1]}),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_seam_and_a_fresh_adapter_equal_the_model(variant, implementation):
    family, changes = VARIANTS[variant]
    row, seam, backbone = FAMILIES[family], get_family(family), make_backbone(family, **changes)
    backbone.set_attn_implementation(implementation)
    expected = {}
    for size in (row.size, *row.other_sizes):
        images = make_images(size, 1)
        expected[size] = backbone(images, **row.keywords).last_hidden_state
        tokens = seam.run_blocks(backbone, seam.stem(backbone, images), 0, len(seam.blocks(backbone.config)))
        found, hidden = tokens.feature_maps[-1], expected[size]
        if hidden.ndim == 3:
            found = found.flatten(2).transpose(1, 2)
            hidden = hidden[:, seam.num_prefix_tokens(backbone.config) :]
        assert torch.equal(found, hidden)
    model = get_peft_model(backbone, VtaAdapterConfig(tasks=["depth"]))
    for size, hidden in expected.items():
        assert torch.equal(model(make_images(size, 1), **row.keywords).last_hidden_state, hidden)
    assert differ(randomize(model)(make_images(size, 1), **row.keywords).last_hidden_state, hidden)
