"""An adapter on another backbone than its own: what carries over, and a report of what does not."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedConfig

from mt_adapters.backbones import get_family
from mt_adapters.tuners.vta import VtaLayer

if TYPE_CHECKING:
    from mt_adapters.models.vta.modeling_vta import VtaModel

Shape = tuple[int, ...]


@dataclass(frozen=True)
class AdapterReport:
    """What became of an adapter's tensors when it was put on a backbone; the fields go by transformers' names.

    Args:
        loaded_keys: tensors of the model that hold the adapter's values.
        mismatched_keys: {tensor of the model that starts anew: (shape in the file, shape in the model)}.
        unexpected_keys: tensors of the files that have no place in the model.
        missing_keys: tensors of the model that start anew, because the files have no such tensor.
    """

    loaded_keys: list[str] = field(default_factory=list)
    mismatched_keys: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    unexpected_keys: list[str] = field(default_factory=list)
    missing_keys: list[str] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether everything was loaded, so that nothing starts anew."""
        return not (self.mismatched_keys or self.unexpected_keys or self.missing_keys)

    def __str__(self) -> str:
        num_new = len(self.mismatched_keys) + len(self.missing_keys)
        lines = [f"{len(self.loaded_keys)} tensors carried over, {num_new} start anew"]
        lines += [
            f"  another shape: {key} {found}, here {here}" for key, (found, here) in self.mismatched_keys.items()
        ]
        lines += [f"  no place here: {key}" for key in self.unexpected_keys]
        lines += [f"  new: {key}" for key in self.missing_keys]
        return "\n".join(lines)


def settings_for(settings: Mapping[str, Any], old: PreTrainedConfig, new: PreTrainedConfig) -> dict[str, Any]:
    """An adapter's settings for a backbone; what depends on its kind or shape is found anew for another one."""
    old_family, new_family = get_family(old.model_type), get_family(new.model_type)
    if settings["peft_type"] != "VTA" or old_family.signature(old) == new_family.signature(new):
        return dict(settings)
    changes: dict[str, Any] = {"backbone_signature": None}
    if old_family.blocks(old) != new_family.blocks(new):
        changes["target_modules"] = None
    if old_family.windowed != new_family.windowed:
        # A window's matrix says nothing about a whole image; between windows, or images, of other sizes it is resized.
        changes["attention_grid"] = None
    return {**settings, **changes}


def adapted_blocks(model: "VtaModel") -> list[str]:
    """Paths in the backbone, in the order in which they run."""
    return [path for path, module in model.backbone.named_modules() if isinstance(module, VtaLayer)]


def renamed_keys(keys: list[str], prefix: str, old: "VtaModel", new: "VtaModel") -> Iterator[tuple[str, str | None]]:
    """(key of the old model, its key in the new one or None) of an adapter's weights.

    Adapted blocks are paired from the last one on, since those have the same part to play: the decoders read them.
    """
    old_blocks, new_blocks = adapted_blocks(old), adapted_blocks(new)
    pairs = dict(zip(reversed(old_blocks), reversed(new_blocks), strict=False))
    is_same_family = old.family.model_type == new.family.model_type
    for key in keys:
        path, separator, part = key.removeprefix(prefix).partition(".vta_")
        block = new_blocks[0] if part.startswith("shared.") else pairs.get(path)
        # Ours: a trained copy of a block belongs to its backbone and would be a stranger in one of another family.
        is_foreign = part.startswith("block.") and not is_same_family
        if not separator:
            yield key, key
        else:
            yield key, None if block is None or is_foreign else f"{prefix}{block}.vta_{part}"


def fit(
    found: Mapping[str, Tensor], names: Mapping[str, str | None], expected: Mapping[str, Tensor], report: AdapterReport
) -> dict[str, Tensor]:
    """The tensors that have a place of their shape in `expected`; the report is told of all others."""
    fitting, named = {}, set()
    for key, tensor in found.items():
        name = names.get(key)
        if name is None or name not in expected:
            report.unexpected_keys.append(key)
            continue
        named.add(name)
        shapes = tuple(tensor.shape), tuple(expected[name].shape)
        if shapes[0] == shapes[1]:
            fitting[name] = tensor
        else:
            report.mismatched_keys[name] = shapes
    report.loaded_keys.extend(fitting)
    report.missing_keys.extend(name for name in expected if name not in named)
    return fitting
