"""The families of backbones that can be adapted."""

from mt_adapters.backbones.base import BackboneFamily
from mt_adapters.backbones.dinov2 import Dinov2Family
from mt_adapters.backbones.swin import SwinFamily

FAMILIES: dict[str, BackboneFamily] = {family.model_type: family for family in (Dinov2Family(), SwinFamily())}


def get_family(model_type: str) -> BackboneFamily:
    """
    Raises:
        ValueError: if there is no family for this `model_type`; names the known ones.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"unknown backbone type {model_type!r}; known are {sorted(FAMILIES)}: use one of these, or add a family "
            "(CONTRIBUTING.md, 'A new backbone family')"
        )
    return FAMILIES[model_type]
