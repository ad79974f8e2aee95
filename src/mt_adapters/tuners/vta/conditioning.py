"""The condition e_t of a task: its embedding averaged with the embeddings of the tasks that help it.

Shape suffixes: T tasks (S source, T target in affinities), E embedding, B batch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class TaskConditioning(nn.Module):
    """Task embeddings and the affinities that mix them (METHOD section 2).

    `task_embeddings`, T vectors (E,), are learned by the optimiser; apart from each other, so that one can be trained
    beside frozen ones. `affinity` (T,T), float32 in [0,1], and `mixing_weights` (T,T), whose columns sum to 1, are
    [source, target] buffers without gradient and stay float32 whatever type the model is cast to; both start as the
    identity.
    """

    affinity: Tensor
    mixing_weights: Tensor

    def __init__(self, num_tasks: int, embedding_dim: int) -> None:
        super().__init__()
        self.task_embeddings = nn.ParameterList(torch.empty(embedding_dim) for _ in range(num_tasks))
        for name in ("affinity", "mixing_weights"):
            self.register_buffer(name, torch.empty(num_tasks, num_tasks, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for embedding_E in self.task_embeddings:
            nn.init.normal_(embedding_E)
        nn.init.eye_(self.affinity)
        nn.init.eye_(self.mixing_weights)

    @property
    def num_tasks(self) -> int:
        return len(self.task_embeddings)

    @property
    def device(self) -> torch.device:
        return self.task_embeddings[0].device

    @torch.no_grad()
    def set_affinity(self, affinity_TT: Tensor, mixing_weights_TT: Tensor) -> None:
        """Sets what is reported and what mixes the embeddings, e.g. `average_weights(affinity)` of `troa`."""
        self.affinity.copy_(affinity_TT)
        self.mixing_weights.copy_(mixing_weights_TT)

    @torch.no_grad()
    def add_task(self) -> None:
        """Adds a task that has no affinity to the others.

        Ours: it starts as the mean of the conditions of the others, which the adapters already know.
        """
        num_tasks = self.num_tasks
        conditions_TE = self(torch.arange(num_tasks, device=self.device))
        self.task_embeddings.append(conditions_TE.mean(dim=0))
        for name in ("affinity", "mixing_weights"):
            extended_TT = torch.eye(num_tasks + 1, device=self.device)
            extended_TT[:num_tasks, :num_tasks] = getattr(self, name)
            setattr(self, name, extended_TT)

    @torch.no_grad()
    def keep_tasks(self, task_ids: Sequence[int]) -> None:
        """Keeps these tasks, in this order, with the conditions e_t that they have now as their embeddings.

        The others' share is in these, so nothing is mixed any more; `affinity` still tells what it was between those
        that are kept.
        """
        ids = torch.tensor(task_ids, device=self.device)
        conditions_TE = self(ids)
        self.task_embeddings = nn.ParameterList(condition_E.clone() for condition_E in conditions_TE)
        self.affinity = self.affinity[ids][:, ids].clone()
        self.mixing_weights = torch.eye(len(ids), device=self.device)

    def forward(self, task_ids_B: Tensor) -> Tensor:
        """e_t (B,E) = sum_s w[s,t] Theta[s] for the task t of each sample."""
        weights_BT = self.mixing_weights.to(self.task_embeddings[0].dtype).t()[task_ids_B]
        # Not a matrix product, whose rounding may depend on T: a source with the weight 0 must change no bit.
        terms = [weights_BT[:, s, None] * embedding_E for s, embedding_E in enumerate(self.task_embeddings)]
        return sum(terms[1:], start=terms[0])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TaskConditioning":
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if not moved.is_meta and not buffer.is_meta and moved.dtype != torch.float32:
                setattr(self, name, buffer.to(moved.device))
        return self
