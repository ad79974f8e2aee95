"""Backbones and adapters that come with the package: the names that models keep, and the folders behind them.

They are on no Hub: whoever has the package has them, also without a network.
"""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
SHIPPED: dict[str, Path] = {
    "mt-adapters/swin-nano-rooms": PACKAGE / "backbones" / "shipped" / "swin_nano_rooms",
    "mt-adapters/vta-swin-nano-rooms": PACKAGE / "models" / "shipped" / "vta_swin_nano_rooms",
}


def is_shipped(source: object) -> bool:
    return isinstance(source, str) and source in SHIPPED


def local_source(source: str | Path) -> str | Path:
    """The folder of one of `SHIPPED`; any other source as it is.

    Raises:
        ValueError: if this installation was made without its weights.
    """
    if not is_shipped(source):
        return source
    folder = SHIPPED[str(source)]
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"the weights of {str(source)!r} are missing: this installation of mt-adapters was packed without its "
            f"safetensors files. Copy those of {folder.name} from a checkout of the source to {str(folder)!r} or "
            "install from that checkout; or choose another model or backbone (a Hub id or a folder)"
        )
    return folder
