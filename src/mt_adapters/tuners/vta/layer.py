"""One adapted block: the frozen block with TAA on its attention, TSN on its norms and a bottleneck on its output.

Everything acts through hooks on the block and its children, so that the block itself stays what transformers built:
its outputs can be recorded, several adapters can share it, and unloading gives it back untouched.

Shape suffixes: B batch, N tokens, C channels, E embedding, L tokens of one window or grid, b = 1 or B.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig

from mt_adapters.backbones import BackboneFamily
from mt_adapters.tuners.vta.attention import TaskAttentionBias
from mt_adapters.tuners.vta.bottleneck import TaskBottleneck
from mt_adapters.tuners.vta.conditioning import TaskConditioning
from mt_adapters.tuners.vta.config import VtaAdapterConfig
from mt_adapters.tuners.vta.context import TaskContext
from mt_adapters.tuners.vta.norm import TaskScaledNorm


class BlockAdapter(nn.Module):
    """What one adapter adds to one block."""

    def __init__(
        self,
        config: VtaAdapterConfig,
        norms: tuple[nn.LayerNorm, nn.LayerNorm],
        grid: tuple[int, int],
        skip_mergings: list[nn.Module],
    ) -> None:
        super().__init__()
        embedding_dim, dim = config.embedding_dim, norms[0].normalized_shape[0]
        self.attention_bias = TaskAttentionBias(grid, embedding_dim, dense=config.attention_matrix == "dense")
        if config.residual == "figure":
            # Ours: both norms of the figure's adapter are built on the MLP's norm.
            norms = (norms[1], norms[1])
        self.norm1 = TaskScaledNorm(norms[0], embedding_dim, config.norm_mode)
        self.norm2 = TaskScaledNorm(norms[1], embedding_dim, config.norm_mode)
        self.bottleneck = TaskBottleneck(dim, embedding_dim, config.reduction, config.activation)
        # An adapter has one type, whatever the backbone's, so that loading does not round its weights.
        self.skip_mergings = nn.ModuleList(skip_mergings).to(self.bottleneck.up.weight.dtype)
        self.residual = config.residual


class VtaLayer(nn.Module, BaseTunerLayer):
    """Wraps one transformer block; holds one `BlockAdapter` per adapter name."""

    adapter_layer_names = ("vta_adapter", "vta_block", "vta_shared")
    # Both are set by transformers on every module that has the first.
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable

    def __init__(
        self,
        base_layer: nn.Module,
        family: BackboneFamily,
        backbone_config: PreTrainedConfig,
        stage: int,
        context: TaskContext,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.family = family
        self.stage = stage
        self.context = context
        self.num_prefix_tokens = family.num_prefix_tokens(backbone_config)
        self.default_grid = family.attention_grid(backbone_config, stage)
        self.vta_adapter: Any = nn.ModuleDict()
        # Trained copies of the block itself (train_adapted_blocks).
        self.vta_block = nn.ModuleDict()
        # Task embeddings and affinity, in the first adapted block of an adapter only.
        self.vta_shared = nn.ModuleDict()
        # What the figure's wiring needs of the running block: what the MLP reads, LN2(y) in a pre-norm block, and
        # what it makes of it.
        self._captured: list[Tensor] = []
        self._handles = self._hook(base_layer)

    def update_layer(
        self,
        adapter_name: str,
        config: VtaAdapterConfig,
        mergings: list[nn.Module],
        inference_mode: bool = False,
    ) -> None:
        """Adds a new, untrained adapter under this name."""
        block = self.base_layer
        if config.train_adapted_blocks:
            # The copied hooks stay bound to this layer.
            block = self.vta_block[adapter_name] = deepcopy(self.base_layer, {id(self): self})
        norm1, norm2 = (getattr(block, name) for name in self.family.norms)
        rows, columns = config.attention_grid or self.default_grid
        # Ours: between stages the skip goes through its own patch merging, which starts as a copy of the frozen one.
        self.vta_adapter[adapter_name] = BlockAdapter(config, (norm1, norm2), (rows, columns), deepcopy(mergings))
        if adapter_name not in self.context.conditioning:
            conditioning = TaskConditioning(len(config.tasks or [""]), config.embedding_dim)
            self.vta_shared[adapter_name] = self.context.conditioning[adapter_name] = conditioning
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name = self.running_adapter()
        block: Any = self.vta_block[name] if name in self.vta_block else self.base_layer
        try:
            if not (self.gradient_checkpointing and self.vta_adapter.training and torch.is_grad_enabled()):
                return block(*args, **kwargs)
            if hasattr(block, "gradient_checkpointing"):
                # The block is run again together with what is added to it, hence not by itself.
                block.gradient_checkpointing = False
            checkpoint = self.context.keep_tasks(self._gradient_checkpointing_func)
            return checkpoint(partial(block, **kwargs), *args)
        finally:
            self._captured = []

    def remove_adapter(self, adapter_name: str) -> None:
        """Takes the adapter out, if it is there, and leaves open which one is active."""
        self.context.conditioning.pop(adapter_name, None)
        for name in self.adapter_layer_names:
            adapters = getattr(self, name)
            if adapter_name in adapters:
                del adapters[adapter_name]

    def delete_adapter(self, adapter_name: str) -> None:
        # By the first block already, so that no block chooses the deleted adapter as the next active one.
        self.context.conditioning.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _all_available_adapter_names(self) -> list[str]:
        # Out of these peft chooses the next active adapter: it must be the same in blocks that hold other adapters.
        return sorted(self.context.conditioning)

    def affinity_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """What all tasks share of one adapter, without the FiLM weights.

        Their gradient is an outer product with the task's embedding, so that it is orthogonal between tasks whatever
        the tasks are.
        """
        if adapter_name in self.vta_adapter:
            for name, parameter in self.vta_adapter[adapter_name].named_parameters():
                if not name.endswith(("film.weight", "condition.weight")):
                    yield parameter

    def remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        block: Any = self.base_layer
        if hasattr(block, "gradient_checkpointing"):
            block.gradient_checkpointing = self.gradient_checkpointing

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(
            "a VTA adapter cannot be merged: what it adds depends on the task and is not linear in the block's weights"
        )

    def unmerge(self) -> None:
        raise NotImplementedError("a VTA adapter cannot be merged, so that there is nothing to unmerge")

    def cast_trained_copy(self, adapter_name: str) -> None:
        """Gives a trained copy of the block the block's own type, in which tokens reach it."""
        if adapter_name in self.vta_block:
            self.vta_block[adapter_name].to(next(self.base_layer.parameters()).dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        self.cast_trained_copy(adapter_name)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, None]:
        # A block has no weight of its own; adapters keep their dtype.
        return next(base_layer.parameters()).device, None

    def running_adapter(self) -> str:
        """Name of the adapter that acts in this block, or "" if none does."""
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.vta_adapter]
        if len(names) > 1:
            raise ValueError(f"adapters {names} are active at once; a VTA backbone runs one: set_adapter('name')")
        return names[0] if names else ""

    def _hook(self, block: nn.Module) -> list[RemovableHandle]:
        family = self.family

        def child_hook(name: str, hook: Callable) -> RemovableHandle:
            return getattr(block, name).register_forward_hook(hook)

        return [
            getattr(block, family.attention).register_forward_pre_hook(self._before_attention, with_kwargs=True),
            child_hook(family.norms[0], self._after_norm1),
            child_hook(family.norms[1], self._after_norm2),
            getattr(block, family.mlp[0]).register_forward_pre_hook(self._before_mlp),
            child_hook(family.mlp[1], self._after_mlp),
            # Prepended, so that whoever records the block's output sees the adapted one.
            block.register_forward_hook(self._after_block, with_kwargs=True, prepend=True),
        ]

    def _before_attention(
        self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        name = self.running_adapter()
        if not name:
            return None
        grid = self.default_grid
        if not self.family.windowed:
            assert self.context.grid is not None
            grid = self.family.bias_grid(args, kwargs, self.context.grid)
        bias_bLL = self.vta_adapter[name].attention_bias(self.context.embedding(name), grid)
        if self.num_prefix_tokens:
            bias_bLL = F.pad(bias_bLL, (self.num_prefix_tokens, 0, self.num_prefix_tokens, 0))
        return self.family.add_attention_bias(attention, args, kwargs, bias_bLL)

    def _after_norm1(self, norm: nn.Module, args: tuple, output_BNC: Tensor) -> Tensor | None:
        name = self.running_adapter()
        if not name or self.vta_adapter[name].residual == "figure":
            return None
        return self.vta_adapter[name].norm1.modulate(args[0], output_BNC, self.context.embedding(name))

    def _after_norm2(self, norm: nn.Module, args: tuple, output_BNC: Tensor) -> Tensor | None:
        name = self.running_adapter()
        if not name or self.vta_adapter[name].residual == "figure":
            return None
        return self.vta_adapter[name].norm2.modulate(args[0], output_BNC, self.context.embedding(name))

    def _before_mlp(self, mlp: nn.Module, args: tuple) -> None:
        name = self.running_adapter()
        if name and self.vta_adapter[name].residual == "figure":
            self._captured = [args[0]]

    def _after_mlp(self, mlp: nn.Module, args: tuple, output_BNC: Tensor) -> None:
        name = self.running_adapter()
        if name and self.vta_adapter[name].residual == "figure":
            self._captured.append(output_BNC)

    def _after_block(self, block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        name = self.running_adapter()
        if not name:
            return None
        adapter, embedding_bE = self.vta_adapter[name], self.context.embedding(name)
        hidden_BNC = output[0] if isinstance(output, tuple) else output
        if adapter.residual == "stream":
            # Ours: the bottleneck stands beside the block and sees what the block sees.
            added_BNC = adapter.bottleneck(self._add_skip(adapter, args[0]), embedding_bE)
            hidden_BNC = hidden_BNC + added_BNC
        else:
            normed_BNC, mlp_BNC = self._captured
            merged_BNC = adapter.norm1(mlp_BNC + normed_BNC, embedding_bE)
            added_BNC = adapter.bottleneck(self._add_skip(adapter, merged_BNC), embedding_bE)
            hidden_BNC = adapter.norm2(added_BNC + normed_BNC, embedding_bE)
        context = self.context
        assert context.grid is not None
        context.skip_BNC = added_BNC
        context.skip_grid = self.family.block_grid(args, kwargs, context.grid)
        return (hidden_BNC, *output[1:]) if isinstance(output, tuple) else hidden_BNC

    def _add_skip(self, adapter: BlockAdapter, hidden_BNC: Tensor) -> Tensor:
        skip_BNC, grid = self.context.skip_BNC, self.context.skip_grid
        if skip_BNC is None or grid is None:
            return hidden_BNC
        for merging in adapter.skip_mergings:
            dtype = next(merging.parameters()).dtype
            skip_BNC = merging(skip_BNC.to(dtype), grid).to(hidden_BNC.dtype)
            grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
        return hidden_BNC + skip_BNC
