"""The condition e_t of a task: its embedding averaged with the embeddings of the tasks that help it.

Shape suffixes: T tasks (S source, T target in affinities), E embedding, B batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class TaskConditioning(nn.Module):
    """Task embeddings and the affinities that mix them (METHOD section 2).

    `task_embedding` (T,E) is learned by the optimiser. `affinity` (T,T), float32 in [0,1], [source, target], is a
    buffer without gradient and stays float32 whatever type the model is cast to; it starts as the identity.
    """

    affinity: Tensor

    def __init__(self, num_tasks: int, embedding_dim: int) -> None:
        super().__init__()
        self.task_embedding = nn.Parameter(torch.empty(num_tasks, embedding_dim))
        self.register_buffer("affinity", torch.empty(num_tasks, num_tasks, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.task_embedding)
        nn.init.eye_(self.affinity)

    @property
    def num_tasks(self) -> int:
        return self.task_embedding.shape[0]

    def weights(self) -> Tensor:
        """w (T,T), [source, target]: the affinity with columns that sum to 1; a column of zeros counts as identity."""
        total_T = self.affinity.sum(dim=0, keepdim=True)
        identity = torch.eye(self.num_tasks, device=self.affinity.device)
        return torch.where(total_T > 0, self.affinity / total_T.clamp(min=torch.finfo(torch.float32).tiny), identity)

    def forward(self, task_ids_B: Tensor) -> Tensor:
        """e_t (B,E) = sum_s w[s,t] Theta[s] for the task t of each sample."""
        weights_BT = self.weights().to(self.task_embedding.dtype).t()[task_ids_B]
        return weights_BT @ self.task_embedding

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TaskConditioning":
        exact = self.affinity
        super()._apply(fn, recurse)
        if not self.affinity.is_meta and not exact.is_meta and self.affinity.dtype != torch.float32:
            self.affinity = exact.to(self.affinity.device)
        return self
