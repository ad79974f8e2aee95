"""TAA, task-adapted attention: a bias on the attention logits that depends on the task.

Shape suffixes: B batch, E embedding, h rows and w columns of a window or token grid, L = h * w tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TaskAttentionBias(nn.Module):
    """Bias (B,L,L) = block diagonal of A' = (1 + g) A + b, with [g, b] = FiLM(e_t) (METHOD section 3).

    A learned matrix `matrix` (L,w) holds, for each token, one value per column of its own grid row, so that the bias
    is non-zero only between tokens of one row. With `dense` the matrix is (L,L) and biases all pairs [ours].

    Both start at zero: a new bias is exactly zero, and gradients reach b and A first.
    """

    def __init__(self, grid: tuple[int, int], embedding_dim: int, dense: bool = False) -> None:
        super().__init__()
        self.grid = grid
        self.dense = dense
        rows, columns = self.grid
        width = rows * columns if dense else columns
        self.matrix = nn.Parameter(torch.empty(rows * columns, width))
        self.film = nn.Linear(embedding_dim, 2 * width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.matrix)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(self, task_embedding_BE: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Bias (B,L,L) for the module's own grid, or interpolated to `grid` (rows, columns)."""
        g_B1w, b_B1w = self.film(task_embedding_BE).unsqueeze(1).chunk(2, dim=-1)
        matrix_BLw = (1 + g_B1w) * self.matrix + b_B1w
        grid = self.grid if grid is None else grid
        if self.dense:
            return matrix_BLw if grid == self.grid else resize_dense(matrix_BLw, self.grid, grid)
        rows, columns = self.grid
        blocks_Bhww = matrix_BLw.view(-1, rows, columns, columns)
        if grid != self.grid:
            rows, columns = grid
            # Rows and both column axes are the three axes of a volume.
            blocks_Bhww = F.interpolate(blocks_Bhww.unsqueeze(1), size=(rows, columns, columns), mode="trilinear")[
                :, 0
            ]
        # A product, not an indexed write, which ONNX lacks between two axes that are apart.
        same_row_h1h1 = torch.eye(rows, dtype=blocks_Bhww.dtype, device=blocks_Bhww.device)[:, None, :, None]
        bias_Bhwhw = blocks_Bhww.unsqueeze(3) * same_row_h1h1
        return bias_Bhwhw.view(-1, rows * columns, rows * columns)


def resize_dense(bias_BLL: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Bilinear in the queries' grid, then in the keys' grid."""
    for _ in range(2):
        num_others = bias_BLL.shape[1]
        maps = bias_BLL.unflatten(2, old)
        resized = F.interpolate(maps, size=new, mode="bilinear").flatten(2)
        assert resized.shape[1] == num_others
        bias_BLL = resized.transpose(1, 2)
    return bias_BLL
