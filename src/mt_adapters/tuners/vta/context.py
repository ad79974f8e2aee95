"""What the adapted blocks of one backbone share during a forward pass.

Shape suffixes: B batch, N tokens, C channels, E embedding, b = 1 or B.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from mt_adapters.tuners.vta.conditioning import TaskConditioning


class TaskContext:
    """The tasks of the samples at hand, the token grid, and the skip that each adapter hands to the next.

    A plain object, reached by all adapted blocks: the parameters it points to belong to the first of them.
    """

    task_ids: Tensor | None
    grid: tuple[int, int] | None
    skip_BNC: Tensor | None
    skip_grid: tuple[int, int] | None

    def __init__(self) -> None:
        # Adapter name -> the conditioning that its first adapted block hosts.
        self.conditioning: dict[str, TaskConditioning] = {}
        self.end()

    def begin(self, task_ids_b: Tensor | None, grid: tuple[int, int] | None) -> None:
        self.end()
        self.task_ids = task_ids_b
        self.grid = grid

    def end(self) -> None:
        self.task_ids = self.grid = self.skip_BNC = self.skip_grid = None
        self._embeddings: dict[str, Tensor] = {}
        self._is_checkpointed = False

    @contextmanager
    def condition(self, task_ids_b: Tensor, grid: tuple[int, int]) -> Iterator[None]:
        """Conditions everything that runs inside on tasks: one for all samples (1,) or one per sample (B,)."""
        self.begin(task_ids_b, grid)
        try:
            yield
        finally:
            self.end()

    def keep_tasks(self, checkpoint: Callable) -> Callable:
        """The same gradient checkpointing, `checkpoint(function, *args)`, with what `self.checkpoint` adds to it."""
        keeps_them = getattr(checkpoint, "func", None) == self.checkpoint
        return checkpoint if keeps_them else partial(self.checkpoint, checkpoint)

    def checkpoint(self, checkpoint: Callable, function: Callable, *args: Any) -> Any:
        """Runs `function` under gradient checkpointing.

        Its second run, in the backward pass when the context is long gone, sees what the first one saw.

        Raises:
            ValueError: if the checkpointing is reentrant.
        """
        if getattr(checkpoint, "keywords", {}).get("use_reentrant") is not False:
            raise ValueError(
                "gradient checkpointing of a VTA backbone must not be reentrant, which loses the gradients of the "
                'adapters: model.gradient_checkpointing_enable({"use_reentrant": False})'
            )
        if self._is_checkpointed:
            return function(*args)
        seen, runs = self._state(), count()

        def run(*args: Any) -> Any:
            now, is_first = self._state(), next(runs) == 0
            if not is_first:
                vars(self).update(seen | {"_embeddings": dict(seen["_embeddings"])})
            self._is_checkpointed = True
            try:
                return function(*args)
            finally:
                if is_first:
                    # What the block hands on stays.
                    self._is_checkpointed = False
                else:
                    vars(self).update(now)

        return checkpoint(run, *args)

    def _state(self) -> dict[str, Any]:
        return vars(self) | {"_embeddings": dict(self._embeddings)}

    def embedding(self, adapter_name: str) -> Tensor:
        """e_t (b,E) of the tasks at hand.

        Raises:
            ValueError: if no task was given and the adapter has several.
        """
        if adapter_name not in self._embeddings:
            conditioning = self.conditioning[adapter_name]
            task_ids = self.task_ids
            if task_ids is None:
                if conditioning.num_tasks > 1:
                    raise ValueError(
                        f"the adapter {adapter_name!r} serves {conditioning.num_tasks} tasks: pass task_ids, a tensor "
                        "(B,) of positions in its config's list of tasks, e.g. model(pixel_values, "
                        "task_ids=torch.tensor([0, 1]))"
                    )
                task_ids = torch.zeros(1, dtype=torch.long, device=conditioning.device)
            self._embeddings[adapter_name] = conditioning(task_ids)
        return self._embeddings[adapter_name]


def check_task_ids(task_ids: Any, num_tasks: int, batch_size: int) -> Tensor:
    """
    Raises:
        ValueError: if `task_ids` is not a tensor (B,) of ids in 0 .. num_tasks - 1.
    """
    ids = torch.as_tensor(task_ids)
    if ids.shape not in ((batch_size,), (1,)) or ids.is_floating_point():
        raise ValueError(
            f"task_ids has the shape {tuple(ids.shape)} and type {ids.dtype}; give one integer per image: "
            f"({batch_size},)"
        )
    # Reading values would break a compiled graph.
    if not torch.compiler.is_compiling() and not ((ids >= 0) & (ids < num_tasks)).all():
        raise ValueError(f"task_ids {ids.tolist()} are out of range; the adapter has the tasks 0 .. {num_tasks - 1}")
    return ids.long()


def find_context(model: nn.Module) -> TaskContext | None:
    """The context of the adapted blocks inside `model`, or None if it has none."""
    contexts = (getattr(module, "context", None) for module in model.modules())
    return next((context for context in contexts if isinstance(context, TaskContext)), None)
