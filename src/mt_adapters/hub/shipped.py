"""Backbones that come with the package: the names that models and adapters keep, and the folders behind them.

They are on no Hub: whoever has the package has them, also without a network.
"""

from pathlib import Path

from mt_adapters.hub.download import WEIGHT_FILE

SHIPPED_BACKBONES: dict[str, Path] = {
    "mt-adapters/swin-nano-rooms": Path(__file__).parents[1] / "backbones" / "shipped" / "swin_nano_rooms",
}


def is_shipped(source: object) -> bool:
    return isinstance(source, str) and source in SHIPPED_BACKBONES


def shipped_folder(name: str) -> Path:
    """The folder of one of `SHIPPED_BACKBONES`.

    Raises:
        ValueError: if this installation was made without its weights.
    """
    folder = SHIPPED_BACKBONES[name]
    if not (folder / WEIGHT_FILE).is_file():
        raise ValueError(
            f"the weights of {name!r} are missing: this installation of mt-adapters was packed without {WEIGHT_FILE}. "
            f"Copy it from a checkout of the source (src/mt_adapters/backbones/shipped/{folder.name}) to "
            f"{str(folder)!r} or install from that checkout, make it with examples/distill_backbone.py, or choose "
            "another backbone (a Hub id or a folder)"
        )
    return folder
