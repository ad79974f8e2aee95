"""Settings of the VTA adapter."""

from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig, PeftType

CHOICES = {
    "activation": ("gelu", "identity"),
    "residual": ("stream", "figure"),
    "norm_mode": ("slide", "code"),
    "attention_matrix": ("rows", "dense"),
}


@dataclass
class VtaAdapterConfig(PeftConfig):
    """Settings of a vision transformer adapter (`peft_type` VTA).

    Defaults start as an exact no-op; the settings that reproduce the authors' release are named in the help texts.

    Raises:
        ValueError: if a setting has a value that is not allowed.

    Example:
        >>> VtaAdapterConfig(tasks=["semseg", "depth"]).peft_type.value
        'VTA'
    """

    tasks: list[str] | None = field(
        default=None, metadata={"help": "Task names in the order of task_ids. VtaModel fills them in."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Paths of the adapted blocks (list of suffixes or a regular expression). Default: the last third, "
            "at most 4, of the second-to-last stage and the whole last stage; of a plain ViT the last third."
        },
    )
    embedding_dim: int = field(
        default=64, metadata={"help": "Size E of the task embeddings; the release uses window ** 3 (343)."}
    )
    reduction: int = field(default=3, metadata={"help": "The bottleneck has C // reduction channels."})
    activation: Literal["gelu", "identity"] = field(
        default="gelu", metadata={"help": "Inside the bottleneck; the release uses the identity."}
    )
    residual: Literal["stream", "figure"] = field(
        default="stream",
        metadata={
            "help": "'stream' adds the bottleneck to the block's output and starts as a no-op; 'figure' is wired as "
            "in the paper's figure, where the adapter replaces the end of the block."
        },
    )
    norm_mode: Literal["slide", "code"] = field(
        default="slide",
        metadata={"help": "'slide' shifts the layer norm's weight and bias; 'code' its weight only, as the release."},
    )
    attention_matrix: Literal["rows", "dense"] = field(
        default="rows",
        metadata={
            "help": "'rows': bias between tokens of one grid row, as in the paper; 'dense': between all tokens."
        },
    )
    attention_grid: list[int] | None = field(
        default=None,
        metadata={
            "help": "Rows and columns of the token grid that the attention matrices are made for; other grids are "
            "interpolated. Default: the window, or the pretraining image's token grid."
        },
    )
    train_adapted_blocks: bool = field(
        default=False,
        metadata={"help": "Also train a copy of the adapted blocks' own weights, as the release does."},
    )
    backbone_signature: dict[str, Any] | None = field(
        default=None, metadata={"help": "Family and shape of the backbone that the weights fit. Filled in."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("VTA")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"VtaAdapterConfig has {name}={getattr(self, name)!r}; allowed are {list(allowed)}")
        for name in ("embedding_dim", "reduction"):
            if getattr(self, name) < 1:
                raise ValueError(f"VtaAdapterConfig has {name}={getattr(self, name)}; it must be at least 1")
        if self.attention_grid is not None:
            self.attention_grid = list(self.attention_grid)
            if len(self.attention_grid) != 2 or min(self.attention_grid) < 1:
                raise ValueError(
                    f"VtaAdapterConfig has attention_grid={self.attention_grid}; give [rows, columns] >= 1"
                )
        if isinstance(self.target_modules, (set, tuple)):
            self.target_modules = sorted(self.target_modules)
