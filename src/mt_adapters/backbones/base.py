"""The seam to transformers: what the adapters and the decoders need to know of one family of backbones.

Shape suffixes: B batch, N tokens, C channels, L tokens of one attention window or grid, b = 1 or B, W windows.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

# Implementations of attention that add a mask of numbers to the logits: through it TAA enters.
ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa")
# Far more than any vision transformer has; a config that asks for more would keep the machine busy for hours.
MAX_BLOCKS = 1000


@dataclass(frozen=True)
class Tokens:
    """Tokens on their way through a backbone.

    Args:
        hidden: (B,N,C), prefix tokens (class, registers) first.
        grid: rows and columns of the patch tokens.
        feature_maps: the maps (B,C,H,W) that are complete so far, finest first.
    """

    hidden: Tensor
    grid: tuple[int, int]
    feature_maps: tuple[Tensor, ...] = ()


class BackboneFamily(ABC):
    """One `model_type` of transformers. Has no state: everything is read from the config or the model it is given.

    Blocks are counted from 0 over all stages, in the order in which they run.
    """

    model_type: ClassVar[str]
    attention: ClassVar[str] = "attention"
    norms: ClassVar[tuple[str, str]]
    # The modules that the MLP begins and ends with.
    mlp: ClassVar[tuple[str, str]] = ("mlp", "mlp")
    # Windowed attention sees grids of one fixed size; global attention sees the token grid of the image at hand.
    windowed: ClassVar[bool]
    # Parts of the model whose weights a checkpoint may lack and nobody trains, because dense features never use them.
    unused_weights: ClassVar[tuple[str, ...]] = ("mask_token",)

    @abstractmethod
    def stages(self, config: PreTrainedConfig) -> list[list[str]]:
        """Paths of the blocks in the model, stage by stage."""

    @abstractmethod
    def stage_channels(self, config: PreTrainedConfig) -> list[int]:
        """Width C of each stage's tokens."""

    @abstractmethod
    def map_channels(self, config: PreTrainedConfig) -> list[int]:
        """Channels of the feature maps, finest first."""

    @abstractmethod
    def map_strides(self, config: PreTrainedConfig) -> list[int]:
        """Input pixels per position of the feature maps, finest first."""

    @abstractmethod
    def num_maps_before(self, config: PreTrainedConfig, block: int) -> int:
        """How many feature maps are complete before the block with this number runs."""

    @abstractmethod
    def patch_size(self, config: PreTrainedConfig) -> tuple[int, int]: ...

    @abstractmethod
    def attention_grid(self, config: PreTrainedConfig, stage: int = 0) -> tuple[int, int]:
        """Rows and columns of the tokens that attend to each other: the window, or the pretraining image's grid."""

    @abstractmethod
    def num_prefix_tokens(self, config: PreTrainedConfig) -> int:
        """Class and register tokens before the patch tokens."""

    @abstractmethod
    def default_targets(self, config: PreTrainedConfig) -> list[str]:
        """Paths of the blocks that are adapted unless the user says otherwise (METHOD section 1)."""

    @abstractmethod
    def min_image_size(self, config: PreTrainedConfig) -> int:
        """The smallest height and width, in pixels, that the family can take."""

    @abstractmethod
    def stem(self, model: PreTrainedModel, pixel_values: Tensor) -> Tokens:
        """Image (B,3,H,W) to the tokens that enter block 0."""

    @abstractmethod
    def run_blocks(self, model: PreTrainedModel, tokens: Tokens, start: int, stop: int) -> Tokens:
        """Runs the blocks start .. stop - 1 and what stands behind each, exactly as the model itself would."""

    @abstractmethod
    def add_attention_bias(
        self, attention: nn.Module, args: tuple, kwargs: dict[str, Any], bias_bLL: Tensor
    ) -> tuple[tuple, dict[str, Any]]:
        """The arguments of an attention module with a bias added to its logits, the same for all heads (and windows).

        `bias_bLL` is one bias for all samples (b = 1) or one per sample (b = B), for the patch tokens of one window or
        grid; prefix tokens are already counted in.
        """

    def bias_grid(self, args: tuple, kwargs: dict[str, Any], image_grid: tuple[int, int]) -> tuple[int, int]:
        """Token grid of a global attention from its arguments; `image_grid` is that of the first block."""
        return image_grid

    def block_grid(self, args: tuple, kwargs: dict[str, Any], image_grid: tuple[int, int]) -> tuple[int, int]:
        """Token grid of a block from the arguments of its forward; `image_grid` is that of the first block."""
        return image_grid

    def mergings(self, model: PreTrainedModel, first_stage: int, last_stage: int) -> Sequence[nn.Module]:
        """The modules that take tokens from one stage to a later one; each is called with (tokens, grid)."""
        return ()

    def is_unused(self, key: str) -> bool:
        """Whether a weight belongs to a part that dense features never use."""
        return not set(self.unused_weights).isdisjoint(key.split("."))

    def blocks(self, config: PreTrainedConfig) -> list[str]:
        return [path for stage in self.stages(config) for path in stage]

    def token_grid(self, config: PreTrainedConfig, height: int, width: int) -> tuple[int, int]:
        patch_height, patch_width = self.patch_size(config)
        return height // patch_height, width // patch_width

    def signature(self, config: PreTrainedConfig) -> dict[str, Any]:
        """What must be equal for an adapter's weights to fit: the family and the shape of its blocks."""
        return {
            "model_type": self.model_type,
            "blocks": [len(stage) for stage in self.stages(config)],
            "channels": self.stage_channels(config),
        }

    def check_num_blocks(self, config: PreTrainedConfig) -> None:
        """
        Raises:
            ValueError: if the config asks for more blocks than any backbone has.
        """
        depths = list(getattr(config, "depths", None) or [getattr(config, "num_hidden_layers", 0)])
        if min(depths) < 1 or sum(depths) > MAX_BLOCKS:
            raise ValueError(
                f"this {self.model_type} config asks for {depths} blocks; allowed are 1 to {MAX_BLOCKS} in all: the "
                "config is damaged or hostile, get it again"
            )

    def check_image_size(self, config: PreTrainedConfig, height: int, width: int) -> None:
        """
        Raises:
            ValueError: if the image is smaller than what the family's windows or patches need.
        """
        smallest = self.min_image_size(config)
        if min(height, width) < smallest:
            raise ValueError(
                f"the image is {height} x {width} pixels, but this {self.model_type} backbone needs at least "
                f"{smallest} x {smallest}: enlarge the images (the image processor's size) or choose a backbone with "
                "a smaller window"
            )

    def check_attention_implementation(self, config: PreTrainedConfig) -> None:
        """
        Raises:
            ValueError: if attention is computed by something that would drop or misread a bias on its logits.
        """
        found = config._attn_implementation
        if found not in ATTENTION_IMPLEMENTATIONS:
            raise ValueError(
                f"this {self.model_type} backbone runs attn_implementation={found!r}, which takes no bias on the "
                f"attention logits; a VTA adapter allows {list(ATTENTION_IMPLEMENTATIONS)}: call "
                'backbone.set_attn_implementation("sdpa") or load the backbone with attn_implementation="sdpa"'
            )


def to_map(hidden_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch tokens (B,N,C) to a feature map (B,C,rows,columns)."""
    # Not unflatten, which fixes the size of an ONNX export to the traced image's.
    map_BCHW = hidden_BNC.transpose(1, 2).reshape(hidden_BNC.shape[0], hidden_BNC.shape[2], *grid)
    # Contiguous, because torch 2.13 crashes in GroupNorm's CPU backward on a channels-last input without gradient.
    return map_BCHW.contiguous()
