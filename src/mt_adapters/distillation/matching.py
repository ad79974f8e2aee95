"""A student that is trained to give a teacher's features.

Shapes: B batch, C channels, h w size of a map.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from mt_adapters.backbones import get_family


def feature_maps(backbone: PreTrainedModel, pixel_values: Tensor) -> tuple[Tensor, ...]:
    """All feature maps (B,C,h,w) that the backbone's family defines, finest first."""
    family = get_family(backbone.config.model_type)
    num_blocks = len(family.blocks(backbone.config))
    return family.run_blocks(backbone, family.stem(backbone, pixel_values), 0, num_blocks).feature_maps


class FeatureMatching(nn.Module):
    """The student, and linear heads that read the teacher's maps off the student's; only the student is kept.

    The heads read coarse to fine: what the student's coarsest map gives is enlarged, the next map's is added, and so
    on. Every partial sum has to fit the teacher's map, averaged to the size of that sum. So each student map carries
    what its resolution can hold, and all together, read linearly, carry the teacher's map in full. Student maps are
    normalised over channels first and the teacher's standardised per channel, as a few of its channels are far larger
    than all others. The loss is smooth L1, averaged over the partial sums.

    Args:
        student: any backbone of `mt_adapters.backbones`.
        channels: of the teacher's maps.

    Example:
        >>> from transformers import AutoModel, SwinConfig
        >>> config = SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
        >>> matching = FeatureMatching(AutoModel.from_config(config), channels=[384])
        >>> losses = matching(torch.zeros(2, 3, 32, 32), [torch.zeros(2, 16, 16, 384)])
        >>> list(losses)
        ['loss_0']
    """

    def __init__(self, student: PreTrainedModel, channels: Sequence[int]) -> None:
        super().__init__()
        family = get_family(student.config.model_type)
        self.student = student
        for name, parameter in student.named_parameters():
            parameter.requires_grad = not family.is_unused(name)
        widths = family.map_channels(student.config)
        self.heads = nn.ModuleList(nn.ModuleList(nn.Conv2d(width, out, 1) for width in widths) for out in channels)
        for number, out in enumerate(channels):
            self.register_buffer(f"mean_{number}", torch.zeros(out))
            self.register_buffer(f"std_{number}", torch.ones(out))

    def set_statistics(self, statistics: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Takes mean and standard deviation (C,) of each of the teacher's maps."""
        for number, (mean, std) in enumerate(statistics):
            self.get_buffer(f"mean_{number}").copy_(mean)
            # A channel that never changes teaches nothing.
            self.get_buffer(f"std_{number}").copy_(torch.where(std > 0, std, torch.inf))

    def forward(self, pixel_values: Tensor, features: Sequence[Tensor]) -> dict[str, Tensor]:
        """Scalars for each of the teacher's maps (B,h,w,C): `loss_0`, and in eval mode `unexplained_0`, the share of
        the map's variance that all heads together do not give (1 is no better than its mean, 0 is perfect)."""
        maps = [
            F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],)).permute(0, 3, 1, 2)
            for x in feature_maps(self.student, pixel_values)
        ]
        result: dict[str, Tensor] = {}
        for number, (heads, feature_BhwC) in enumerate(zip(self.heads, features, strict=True)):
            mean_C, std_C = (self.get_buffer(f"{name}_{number}") for name in ("mean", "std"))
            target_BChw = ((feature_BhwC.float() - mean_C) / std_C).permute(0, 3, 1, 2)
            sums = partial_sums(cast(nn.ModuleList, heads), maps, target_BChw.shape[-2:])
            targets = [averaged(target_BChw, total.shape[-2:]) for total in sums]
            losses = [F.smooth_l1_loss(total, target) for total, target in zip(sums, targets, strict=True)]
            result[f"loss_{number}"] = torch.stack(losses).mean()
            if not self.training:
                variance = targets[-1].square().mean().clamp(min=1e-12)
                result[f"unexplained_{number}"] = F.mse_loss(sums[-1], targets[-1]) / variance
        return result


def partial_sums(heads: nn.ModuleList, maps: Sequence[Tensor], size: Sequence[int]) -> list[Tensor]:
    """Heads' outputs added up from the coarsest map to the finest, each sum as fine as its map, but at most `size`."""
    sums: list[Tensor] = []
    for head, map_BChw in zip(reversed(heads), reversed(maps), strict=True):
        grid = (min(map_BChw.shape[-2], size[0]), min(map_BChw.shape[-1], size[1]))
        # Averaging and a linear head commute, and averaging first is cheaper.
        total = head(averaged(map_BChw, grid)).float()
        if sums:
            total = total + F.interpolate(sums[-1], size=grid, mode="bilinear", align_corners=False)
        sums.append(total)
    return sums


def averaged(map_BChw: Tensor, grid: Sequence[int]) -> Tensor:
    """The map at a coarser size, or itself at its own."""
    rows, columns = grid
    return map_BChw if map_BChw.shape[-2:] == (rows, columns) else F.adaptive_avg_pool2d(map_BChw, (rows, columns))
