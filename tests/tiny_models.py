"""Tiny backbones of every family, and what tests do with them. A new backbone family is one row in `FAMILIES`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from mt_adapters import VtaModel
from mt_adapters.troa import average_weights
from mt_adapters.tuners.vta import find_context

ALL_TASKS = ("semseg", "depth", "normals", "edges")
NUM_LABELS = 5


class Family(NamedTuple):
    config: dict[str, Any]  # settings of a tiny backbone
    targets: list[str]  # the blocks that are adapted by default
    drop_path: str  # the config's name for it, or for another dropout in a family without
    size: tuple[int, int]  # height and width of the images of most tests: multiples of the patch
    other_sizes: tuple[tuple[int, int], ...]
    odd_size: tuple[int, int]  # no multiple of the patch
    too_small: tuple[int, int]
    # Another backbone of the same family, that an adapter of the first does not fit.
    other: dict[str, Any]
    # Another backbone of the same shape with another window or token grid, that it fits.
    other_grid: dict[str, Any]
    # Keywords of the plain backbone's forward that make it take images of any size.
    keywords: dict[str, Any] = {}


FAMILIES = {
    "swin": Family(
        config={
            "image_size": 64,
            "patch_size": 4,
            "embed_dim": 24,
            "depths": [2, 2, 3, 2],
            "num_heads": [1, 2, 4, 8],
            "window_size": 2,
            "mlp_ratio": 2.0,
        },
        targets=["encoder.layers.2.blocks.2", "encoder.layers.3.blocks.0", "encoder.layers.3.blocks.1"],
        drop_path="drop_path_rate",
        size=(64, 64),
        other_sizes=((96, 64), (48, 80)),
        odd_size=(67, 90),
        too_small=(32, 64),
        other={"depths": [2, 2, 2, 2]},
        other_grid={"window_size": 4},
    ),
    "dinov2": Family(
        config={
            "hidden_size": 48,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            "mlp_ratio": 2,
        },
        targets=["encoder.layer.4", "encoder.layer.5"],
        drop_path="drop_path_rate",
        size=(56, 56),
        other_sizes=((84, 56), (42, 70)),
        odd_size=(61, 90),
        too_small=(10, 56),
        other={"hidden_size": 32},
        other_grid={"image_size": 84},
    ),
}
TINY_VIT = Family(
    config={
        "hidden_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "image_size": 64,
        "patch_size": 16,
    },
    targets=["layers.4", "layers.5"],
    drop_path="hidden_dropout_prob",
    size=(64, 64),
    other_sizes=((96, 64), (48, 80)),
    odd_size=(67, 90),
    too_small=(10, 64),
    other={"hidden_size": 32},
    other_grid={"image_size": 96},
    keywords={"interpolate_pos_encoding": True},
)
FAMILIES |= {
    "vit": TINY_VIT,
    "deit": TINY_VIT,
    "dinov3_vit": TINY_VIT._replace(
        # Rescaling is an augmentation of positions in train mode.
        config=TINY_VIT.config | {"num_register_tokens": 3, "pos_embed_rescale": None},
        targets=["model.layer.4", "model.layer.5"],
        drop_path="drop_path_rate",
        keywords={},
    ),
    "siglip_vision_model": TINY_VIT._replace(
        targets=["encoder.layers.4", "encoder.layers.5"], drop_path="attention_dropout"
    ),
    "clip_vision_model": TINY_VIT._replace(
        targets=["encoder.layers.4", "encoder.layers.5"], drop_path="attention_dropout"
    ),
    "dinov2_with_registers": FAMILIES["dinov2"]._replace(
        config=FAMILIES["dinov2"].config | {"num_register_tokens": 3}
    ),
    "beit": TINY_VIT._replace(
        config=TINY_VIT.config | {"use_relative_position_bias": True, "use_mean_pooling": False},
        drop_path="drop_path_rate",
        keywords={},
    ),
    "segformer": FAMILIES["swin"]._replace(
        config={
            "depths": [2, 2, 3, 2],
            # Whole multiples of 32, as those of all published ones: on Intel processors with AMX, oneDNN's bfloat16
            # convolutions whose stride is their kernel are wrong for 24 channels.
            "hidden_sizes": [32, 32, 64, 64],
            "num_attention_heads": [1, 2, 4, 4],
            "mlp_ratios": [2, 2, 2, 2],
        },
        targets=["stages.2.blocks.2", "stages.3.blocks.0", "stages.3.blocks.1"],
        too_small=(28, 64),
        other_grid={"sr_ratios": [4, 4, 2, 2]},
    ),
    # The last stage's map is smaller than the window, in which transformers then builds smaller windows.
    "swinv2": FAMILIES["swin"]._replace(config=FAMILIES["swin"].config | {"window_size": 4}, too_small=(3, 64)),
}


def make_config(family: str, **changes: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(family, **FAMILIES[family].config | changes)


def make_backbone(family: str, **changes: Any) -> PreTrainedModel:
    """A backbone whose weights are all random, biases, norms and relative positions included."""
    backbone = AutoModel.from_config(make_config(family, **changes))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return backbone.eval()


def make_model(family: str, *, randomized: bool = True, **settings: Any) -> VtaModel:
    """A multitask model in eval mode, with adapters that are no longer a no-op."""
    changes = settings.pop("backbone_changes", {})
    settings = {"tasks": list(ALL_TASKS), "num_labels": NUM_LABELS, "decoder_dim": 16} | settings
    model = VtaModel.from_backbone(make_config(family, **changes), **settings)
    with torch.no_grad():
        for name, parameter in model.backbone.named_parameters():
            if "vta_" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return (randomize(model) if randomized else model).eval()


def randomize(model: nn.Module, std: float = 0.3) -> Any:
    """Gives adapters of any kind random weights, and VTA adapters random affinities: fresh ones are a no-op."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".vta_" in name or ".lora_" in name:
                parameter.normal_(std=std)
        context = find_context(model)
        for conditioning in context.conditioning.values() if context else ():
            affinity_TT = torch.empty_like(conditioning.affinity).uniform_(0.1, 1.0)
            conditioning.set_affinity(affinity_TT, average_weights(affinity_TT))
    return model


def make_images(size: tuple[int, int], batch_size: int = 2) -> Tensor:
    return torch.randn(batch_size, 3, *size, generator=torch.Generator().manual_seed(1))


def make_labels(size: tuple[int, int], batch_size: int = 2) -> dict[str, Tensor]:
    """Labels of all tasks, some pixels without one."""
    generator = torch.Generator().manual_seed(2)
    shape = (batch_size, *size)
    semseg = torch.randint(0, NUM_LABELS, shape, generator=generator)
    depth = torch.rand(shape, generator=generator) * 5 + 0.5
    normals = F.normalize(torch.randn(batch_size, 3, *size, generator=generator), dim=1)
    edges = (torch.rand(shape, generator=generator) > 0.8).float()
    semseg[:, :3], depth[:, :3], edges[:, :3], normals[:, :, :3] = 255, 0.0, float("nan"), 0.0
    return {"semseg": semseg, "depth": depth, "normals": normals, "edges": edges}


@torch.no_grad()
def logits_of(model: VtaModel, pixel_values: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    return model(pixel_values, **kwargs).logits


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to the last bit."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), f"{name}: {(found[name] - tensor).abs().max()}"


def differ(left: Tensor, right: Tensor) -> bool:
    """Whether two results are different by far more than rounding."""
    return bool((left - right).abs().max() > 1e-3)
