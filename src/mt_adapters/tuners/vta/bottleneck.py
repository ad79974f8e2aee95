"""The bottleneck adapter: capacity of its own, conditioned on the task.

Shape suffixes: B batch, N tokens, C channels, E embedding, b = 1 or B.
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F


class TaskBottleneck(nn.Module):
    """d = up(act(down((1 + g) v + b))), with [g, b] = FiLM(condition(e_t)) (METHOD section 5).

    FiLM and `up` start at zero: a new bottleneck gives exactly zero.
    """

    def __init__(
        self,
        dim: int,
        embedding_dim: int,
        reduction: int = 3,
        activation: Literal["gelu", "identity"] = "gelu",
    ) -> None:
        super().__init__()
        hidden_dim = max(1, dim // reduction)
        self.activation = activation
        self.condition = nn.Linear(embedding_dim, embedding_dim)
        self.film = nn.Linear(embedding_dim, 2 * dim)
        self.down = nn.Linear(dim, hidden_dim)
        self.up = nn.Linear(hidden_dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.condition.reset_parameters()
        self.down.reset_parameters()
        for layer in (self.film, self.up):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden_BNC: Tensor, task_embedding_bE: Tensor) -> Tensor:
        g_b1C, b_b1C = self.film(self.condition(task_embedding_bE)).unsqueeze(1).chunk(2, dim=-1)
        # The backbone may run in bfloat16 around an adapter that is kept in float32.
        hidden = self.down((1 + g_b1C) * hidden_BNC.to(self.down.weight.dtype) + b_b1C)
        return self.up(F.gelu(hidden) if self.activation == "gelu" else hidden).to(hidden_BNC.dtype)
