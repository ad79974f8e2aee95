"""The decoder contract: feature maps of one task in, one map of features for its head out.

Shapes: B batch, C channels of a level, D width of the decoder, H W size of a level, h w size after rescaling,
L levels.
"""

import math
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

FINEST_STRIDE = 4  # level i of the pyramid stands for a stride of 4 * 2**i pixels


class Decoder(nn.Module):
    """Turns a backbone's L feature maps, finest first, into one map (B, out_channels, about H/4, about W/4) per task.

    The first `num_shared` maps do not depend on the task. `prepare` does their work once per image, `forward` does the
    rest once per task. Task-independent modules live under `shared`, those of one task under `tasks[task]`, so a state
    dict splits by task on its keys. A subclass writes `build_shared` and `build_task`. No module mixes samples of a
    batch, and training and evaluation compute the same function.

    Args:
        task_names: names of the tasks, each once.
        channels: C_i of each level, finest first.
        strides: pixels of the image per cell of each level; all equal for a plain ViT.
        num_shared: how many of the levels, from the finest, are the same for all tasks (0 to L).
        dim: width D of the decoder.
        share_between_tasks: one decoder for all tasks instead of one each; `tasks` is then empty.

    Raises:
        ValueError: the arguments contradict each other.
    """

    def __init__(
        self,
        task_names: Sequence[str],
        channels: Sequence[int],
        strides: Sequence[int],
        num_shared: int,
        dim: int,
        share_between_tasks: bool = False,
    ) -> None:
        super().__init__()
        if len(set(task_names)) != len(task_names) or not task_names:
            raise ValueError(f"task_names must hold at least one name and each only once, got {list(task_names)}")
        if len(channels) != len(strides) or not channels:
            raise ValueError(
                f"channels and strides need one entry per feature map, got {list(channels)} and {list(strides)}"
            )
        if not 0 <= num_shared <= len(channels):
            raise ValueError(f"num_shared must be between 0 and the {len(channels)} feature maps, got {num_shared}")
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.task_names = list(task_names)
        self.channels = list(channels)
        self.strides = list(strides)
        self.num_shared = num_shared
        self.dim = dim
        self.share_between_tasks = share_between_tasks
        self.shared = nn.ModuleDict({"prepare": self.build_shared()})
        self.tasks = nn.ModuleDict()
        if share_between_tasks:
            self.shared["decode"] = self.build_task()
        else:
            self.tasks.update({name: self.build_task() for name in self.task_names})

    def build_shared(self) -> nn.Module:
        """The module of all tasks: shared maps [(B, C_i, H_i, W_i)] -> list of tensors for each task's module."""
        raise NotImplementedError

    def build_task(self) -> nn.Module:
        """The module of one task: (prepared tensors, task maps [(B, C_i, H_i, W_i)]) -> (B, out_channels, h, w)."""
        raise NotImplementedError

    @property
    def out_channels(self) -> int:
        """Channels of the map that a head reads."""
        return self.dim

    @property
    def is_task_independent(self) -> bool:
        """Whether all tasks get the same output: one decoder on maps that are all shared."""
        return self.share_between_tasks and self.num_shared == len(self.channels)

    def add_task(self, name: str) -> None:
        """Adds a task with a new decoder, or behind the shared one; those of the other tasks stay."""
        self.task_names.append(name)
        if not self.share_between_tasks:
            self.tasks[name] = self.build_task()

    def prepare(self, shared_maps: Sequence[Tensor]) -> list[Tensor]:
        """What all tasks need of the first `num_shared` maps [(B, C_i, H_i, W_i)]; call it once per image."""
        prepared = self.shared["prepare"](shared_maps)
        return [self.shared["decode"](prepared, [])] if self.is_task_independent else prepared

    def forward(self, task: str, prepared: list[Tensor], task_maps: Sequence[Tensor]) -> Tensor:
        """Features of one task.

        Args:
            task: one of `task_names`.
            prepared: what `prepare` returned for these images.
            task_maps: the other L - num_shared maps (B, C_i, H_i, W_i) of this task, finest first.

        Returns:
            (B, out_channels, h, w), about a quarter of the image's height and width.

        Raises:
            ValueError: the decoder has no such task.
        """
        if task not in self.task_names:
            raise ValueError(f"unknown task {task!r}; this decoder has: {', '.join(self.task_names)}")
        if self.is_task_independent:
            return prepared[0]
        module = self.shared["decode"] if self.share_between_tasks else self.tasks[task]
        return module(prepared, task_maps)


def octaves_to_pyramid(stride: int, level: int) -> int:
    """How often a map of this stride must be doubled (negative: halved) to take its level's place in the pyramid."""
    return round(math.log2(stride / (FINEST_STRIDE * 2**level)))


class Lateral(nn.Module):
    """Brings one level to the decoder's width and to its place in the pyramid: (B, C, H, W) -> (B, D, h, w).

    A map that is too coarse is enlarged by a sub-pixel convolution (Shi et al. 2016, arXiv 1609.05158): each token
    writes out its own block of 2**octaves cells, so detail that a ViT token holds is kept. One that is too fine is
    averaged. h = H * 2**octaves, rounded up.
    """

    def __init__(self, channels: int, dim: int, octaves: int) -> None:
        super().__init__()
        enlarge, shrink = 2 ** max(octaves, 0), 2 ** max(-octaves, 0)
        self.pool = nn.AvgPool2d(shrink, ceil_mode=True) if shrink > 1 else nn.Identity()
        self.norm = nn.GroupNorm(1, channels)
        self.projection = nn.Conv2d(channels, dim * enlarge**2, kernel_size=1)
        self.shuffle = nn.PixelShuffle(enlarge) if enlarge > 1 else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.shuffle(self.projection(self.norm(self.pool(x_BCHW))))


class Laterals(nn.ModuleList):
    """One `Lateral` per level: [(B, C_i, H_i, W_i)] -> [(B, D_i, h_i, w_i)]."""

    def __init__(self, laterals: Iterable[Lateral]) -> None:
        super().__init__(laterals)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [lateral(x_BCHW) for lateral, x_BCHW in zip(self, maps, strict=True)]
