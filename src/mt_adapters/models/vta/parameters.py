"""Which of a model's parameters adapters of any kind add, and how many there are of each part."""

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def adapter_parameter_names(model: nn.Module) -> Iterator[str]:
    """Names of the parameters that adapters of any kind add; trained copies of blocks do not count."""
    for layer_name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and isinstance(layer, nn.Module):
            for name, _ in layer.named_parameters():
                if not name.startswith(("base_layer.", "vta_block.")):
                    yield f"{layer_name}.{name}"


def copy_requires_grad(described: nn.Module, loaded: nn.Module) -> None:
    """What trains is what trained before saving; transformers lets every tensor that it loads ask for a gradient."""
    for parameter, meta in zip(loaded.parameters(), described.parameters(), strict=True):
        parameter.requires_grad = meta.requires_grad


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """{group: {"total", "trainable"}} of backbone, adapters, decoders, heads, and in total."""
    adapters = set(adapter_parameter_names(model))
    report = {group: {"total": 0, "trainable": 0} for group in ("backbone", "adapters", "decoders", "heads", "total")}
    for name, parameter in model.named_parameters():
        root = name.partition(".")[0]
        group = "adapters" if name in adapters else {"backbone": "backbone", "decoder": "decoders"}.get(root, "heads")
        for counted in (group, "total"):
            report[counted]["total"] += parameter.numel()
            report[counted]["trainable"] += parameter.numel() if parameter.requires_grad else 0
    return report
