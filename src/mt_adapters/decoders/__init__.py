"""Decoders: from a backbone's feature maps to one map of features per task."""

from mt_adapters.decoders.base import Decoder
from mt_adapters.decoders.fpn import FpnDecoder
from mt_adapters.decoders.linear import LinearDecoder
from mt_adapters.decoders.swin_unet import SwinUnetDecoder

__all__ = ["DECODERS", "Decoder", "FpnDecoder", "LinearDecoder", "SwinUnetDecoder", "get_decoder"]

DECODERS: dict[str, type[Decoder]] = {
    "fpn": FpnDecoder,
    "swin_unet": SwinUnetDecoder,
    "linear": LinearDecoder,
}


def get_decoder(name: str) -> type[Decoder]:
    """The decoder class of a name in `DECODERS`.

    Raises:
        ValueError: there is no decoder of this name.
    """
    if name not in DECODERS:
        raise ValueError(f"unknown decoder {name!r}; known: {', '.join(DECODERS)}")
    return DECODERS[name]
