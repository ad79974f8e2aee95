"""What backbones with stages of falling resolution share: a feature map per stage, and where adapters go."""

from transformers import PreTrainedConfig

from mt_adapters.backbones.base import BackboneFamily


class HierarchicalFamily(BackboneFamily):
    """Stages of blocks, `config.depths` of them each, with a module that merges tokens between two stages."""

    def map_channels(self, config: PreTrainedConfig) -> list[int]:
        return self.stage_channels(config)

    def num_maps_before(self, config: PreTrainedConfig, block: int) -> int:
        return sum(sum(config.depths[: stage + 1]) <= block for stage in range(len(config.depths)))

    def num_prefix_tokens(self, config: PreTrainedConfig) -> int:
        return 0

    def default_targets(self, config: PreTrainedConfig) -> list[str]:
        *earlier, last = self.stages(config)
        if not earlier:
            return last
        # Paper (figure): blocks 15-18 of the 18 in stage 3, and stage 4. Ours: the rule for other depths.
        return earlier[-1][-min(4, max(1, len(earlier[-1]) // 3)) :] + last
