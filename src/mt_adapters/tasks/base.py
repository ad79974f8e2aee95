"""What every task kind says of itself: its channels, its loss, its labels' rules, its picture.

Shape suffixes: B batch, K output channels, H height, W width.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Task(ABC):
    """One dense prediction task: a name, a kind and the kind's settings.

    Labels follow one code everywhere; `no_label` maps say "not labelled" and add nothing to loss, gradient or metric.

    Args:
        name: what the task is called in outputs, labels and files; lower case letters, digits and underscores.
        weight: factor of this task's loss in the sum that is trained.

    Raises:
        ValueError: if the name cannot be the name of a module.
    """

    name: str
    weight: float = 1.0

    kind: ClassVar[str]
    # The unit and shape of one predicted map, for people.
    output: ClassVar[str]
    unlabelled: ClassVar[float | int]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name) or hasattr(nn.ModuleDict(), self.name):
            raise ValueError(
                f"{self.name!r} cannot be the name of a task: use lower case letters, digits and underscores, "
                "starting with a letter, and no name of a dict's method (e.g. 'depth', 'parts', 'depth_far')"
            )
        if not self.weight >= 0:
            raise ValueError(f"task {self.name!r} has the loss weight {self.weight}; a weight is a number >= 0")

    @property
    @abstractmethod
    def num_channels(self) -> int:
        """Channels K of the task's logits."""

    @abstractmethod
    def loss(self, logits_BKHW: Tensor, label: Tensor) -> Tensor:
        """Float32 scalar, mean over the labelled pixels; an exact zero, still on the graph, where there are none."""

    @abstractmethod
    def predict(self, logits_BKHW: Tensor) -> Tensor:
        """Turns logits into a map in the units and shape of the labels."""

    def predict_at(self, logits_BKHW: Tensor, size: tuple[int, int]) -> Tensor:
        """`predict` at another height and width: the logits are resized (bilinear), not the map."""
        if tuple(size) == tuple(logits_BKHW.shape[-2:]):
            return self.predict(logits_BKHW)
        return self.predict(F.interpolate(logits_BKHW.float(), size=tuple(size), mode="bilinear"))

    @abstractmethod
    def colorize(self, map_: Tensor, like: Tensor | None = None) -> Tensor:
        """Picture (H,W,3) uint8 of one map in the labels' units; no label is black.

        `like` is a second map of the same task whose range of values the colours are to span.
        """

    @abstractmethod
    def _range_error(self, label: Tensor) -> str | None:
        """What is wrong with the values of a label of the right shape, or None."""

    def label_shape(self, batch_size: int, height: int, width: int) -> tuple[int, ...]:
        return (batch_size, height, width)

    @abstractmethod
    def labelled(self, label: Tensor) -> Tensor:
        """Where a label of a batch is one: (B,H,W) bool."""

    def no_label(self, height: int, width: int) -> Tensor:
        """A label map (one image) that says "not labelled" at every pixel."""
        return torch.full(self.label_shape(1, height, width)[1:], self.unlabelled)

    def mirror_values(self, label: Tensor) -> Tensor:
        """The values of a label whose columns already stand in the order of the image mirrored left to right."""
        return label

    def check_label(self, label: Tensor, batch_size: int, height: int, width: int) -> None:
        """
        Raises:
            ValueError: if the label's shape, type or values break the task's code; says which and what is allowed.
        """
        expected = self.label_shape(batch_size, height, width)
        if tuple(label.shape) != expected:
            raise ValueError(
                f"labels[{self.name!r}] has the shape {tuple(label.shape)}, but {self.kind} labels of this batch must "
                f"have {expected}: resize labels with nearest neighbour to the size of pixel_values"
            )
        is_float = isinstance(self.unlabelled, float)
        if not (label.is_floating_point() if is_float else label.dtype == torch.int64):
            wanted, cast = ("floating point", "float") if is_float else ("int64", "long")
            raise ValueError(
                f"labels[{self.name!r}] is {label.dtype}; {self.kind} labels are {wanted}: use label.{cast}()"
            )
        problem = self._range_error(label)
        if problem is not None:
            raise ValueError(f"labels[{self.name!r}]: {problem}")

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "type": self.kind, **{k: v for k, v in asdict(self).items() if k != "name"}}


def ramp(value: Tensor, anchors: tuple[tuple[int, int, int], ...]) -> Tensor:
    """Colours (...,3) uint8 of values in [0,1], linear between equally spaced anchor colours."""
    table = torch.tensor(anchors, dtype=torch.float32, device=value.device)
    position = value.float().nan_to_num(0.0).clamp(0, 1) * (len(anchors) - 1)
    low = position.floor().long().clamp(max=len(anchors) - 2)
    share = (position - low).unsqueeze(-1)
    return (table[low] * (1 - share) + table[low + 1] * share).round().to(torch.uint8)
