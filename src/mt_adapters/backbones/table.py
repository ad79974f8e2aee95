"""The families of backbones that can be adapted."""

from mt_adapters.backbones.base import BackboneFamily
from mt_adapters.backbones.beit import BeitFamily
from mt_adapters.backbones.clip import CLIPVisionFamily, SiglipVisionFamily
from mt_adapters.backbones.dinov2 import Dinov2Family, Dinov2WithRegistersFamily
from mt_adapters.backbones.dinov3 import DINOv3ViTFamily
from mt_adapters.backbones.segformer import SegformerFamily
from mt_adapters.backbones.swin import SwinFamily
from mt_adapters.backbones.swinv2 import Swinv2Family
from mt_adapters.backbones.vit import DeiTFamily, ViTFamily

FAMILIES: dict[str, BackboneFamily] = {
    family.model_type: family
    for family in (
        BeitFamily(),
        CLIPVisionFamily(),
        DeiTFamily(),
        Dinov2Family(),
        Dinov2WithRegistersFamily(),
        DINOv3ViTFamily(),
        SegformerFamily(),
        SiglipVisionFamily(),
        SwinFamily(),
        Swinv2Family(),
        ViTFamily(),
    )
}


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
