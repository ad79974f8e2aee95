"""TSN, task-scaled norm: a frozen layer norm whose scale and shift depend on the task.

Shape suffixes: B batch, N tokens, C channels, E embedding, b = 1 or a divisor of B.
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F


class TaskScaledNorm(nn.Module):
    """TSN(x) = x^ (gamma (1 + g) + b1) + beta + b2, with [g, b1, b2] = FiLM(e_t) (METHOD section 4).

    x^ is the normalised input, gamma and beta are the pretrained norm's. In mode "code" b2 is 0, as in the authors'
    release. FiLM starts at zero: a new TSN equals the norm bit for bit.

    Args:
        norm: the frozen layer norm; it stays a part of the backbone and is not registered (nor saved) here.
    """

    def __init__(self, norm: nn.LayerNorm, embedding_dim: int, mode: Literal["slide", "code"] = "slide") -> None:
        super().__init__()
        # In a tuple a module is a plain attribute, not a submodule.
        self._norm = (norm,)
        self.mode = mode
        self.film = nn.Linear(embedding_dim, (3 if mode == "slide" else 2) * norm.normalized_shape[0])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    @property
    def norm(self) -> nn.LayerNorm:
        return self._norm[0]

    def forward(self, hidden_BNC: Tensor, task_embedding_bE: Tensor) -> Tensor:
        return self.modulate(hidden_BNC, self.norm(hidden_BNC), task_embedding_bE)

    def modulate(self, hidden_BNC: Tensor, normed_BNC: Tensor, task_embedding_bE: Tensor) -> Tensor:
        """Adds what the task changes to `normed` = norm(hidden).

        Written as a sum, because only x + 0 gives the pretrained result back to the last bit.
        """
        norm = self.norm
        standard_BNC = F.layer_norm(hidden_BNC, norm.normalized_shape, eps=norm.eps)
        film = (
            self.film(task_embedding_bE).unsqueeze(1).to(hidden_BNC.dtype).chunk(3 if self.mode == "slide" else 2, -1)
        )
        out_BNC = normed_BNC + standard_BNC * (norm.weight * film[0] + film[1])
        return out_BNC + film[2] if self.mode == "slide" else out_BNC
