"""The seam to transformers: one small file per family of backbones."""

from mt_adapters.backbones.base import BackboneFamily, Tokens
from mt_adapters.backbones.loading import align, check_report, load_backbone
from mt_adapters.backbones.table import FAMILIES, get_family

__all__ = [
    "FAMILIES",
    "BackboneFamily",
    "Tokens",
    "align",
    "check_report",
    "get_family",
    "load_backbone",
]
