"""Balancing: what the losses of the tasks weigh against each other, from the losses alone or from the gradients.

Shape suffixes: T tasks, P parameters that all tasks share.
"""

import importlib
from typing import Any

import torch
from torch import Tensor, nn


class Balancing(nn.Module):
    """Fixed weights, those of the tasks; the base of all others. Factors multiply the tasks' own weights."""

    needs_gradients = False
    needs_losses = False

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks

    def factors(self, step: int) -> Tensor:
        """(T,) float32 for the optimiser step with this number; the same on every process."""
        return torch.ones(self.num_tasks)

    def observe(self, losses_T: Tensor, labelled_T: Tensor) -> None:
        """Takes in the unweighted losses of a step and which tasks had labels, before the optimiser moves."""


class Uncertainty(Balancing):
    """Learned log variances s: the loss is the sum of exp(-s_t) L_t + s_t (Kendall et al. 2018, arXiv:1705.07115).

    Ours: one form for all kinds of losses, without the factor 1/2 of regression. A task without labels in a step gives
    its variance no gradient.
    """

    needs_losses = True

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.log_variances = nn.Parameter(torch.zeros(num_tasks))

    def factors(self, step: int) -> Tensor:
        return (-self.log_variances.detach()).exp()

    def observe(self, losses_T: Tensor, labelled_T: Tensor) -> None:
        gradient_T = 1 - self.factors(0) * losses_T.to(self.log_variances.device)
        self.log_variances.grad = torch.where(labelled_T.to(gradient_T.device), gradient_T, 0.0)


class DynamicWeightAverage(Balancing):
    """DWA: tasks whose loss falls slowly weigh more (Liu et al. 2019, arXiv:1803.10704, equation 7).

    factor_t = T softmax(r_t / temperature), r_t = mean loss of the last window over that of the window before. The
    paper's windows are epochs; ours are numbers of steps. A task that a window has no labels of has r_t = 1.
    """

    needs_losses = True
    sums: Tensor
    counts: Tensor
    means: Tensor
    num_steps: Tensor

    def __init__(self, num_tasks: int, window: int = 100, temperature: float = 2.0) -> None:
        super().__init__(num_tasks)
        if window < 1 or temperature <= 0:
            raise ValueError(
                f"dwa has window={window} and temperature={temperature}; the window is at least 1, the temperature "
                "positive"
            )
        self.window, self.temperature = window, temperature
        self.register_buffer("sums", torch.zeros(num_tasks))
        self.register_buffer("counts", torch.zeros(num_tasks))
        # Of the last two complete windows, the older first; zero where there is none.
        self.register_buffer("means", torch.zeros(2, num_tasks))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    def factors(self, step: int) -> Tensor:
        before_T, last_T = self.means
        ratio_T = torch.where((before_T > 0) & (last_T > 0), last_T / before_T, 1.0)
        return self.num_tasks * (ratio_T / self.temperature).softmax(dim=0)

    def observe(self, losses_T: Tensor, labelled_T: Tensor) -> None:
        self.sums += torch.where(labelled_T, losses_T, 0.0)
        self.counts += labelled_T
        self.num_steps += 1
        if self.num_steps % self.window == 0:
            mean_T = torch.where(self.counts > 0, self.sums / self.counts, self.means[1])
            self.means.copy_(torch.stack([self.means[1], mean_T]))
            self.sums.zero_()
            self.counts.zero_()


class RandomLossWeights(Balancing):
    """RLW: new random factors every step, T softmax(normal) (Lin et al. 2022, arXiv:2111.10603)."""

    def factors(self, step: int) -> Tensor:
        # By the step alone, so that every process and a resumed run draw the same.
        generator = torch.Generator().manual_seed(step)
        return self.num_tasks * torch.randn(self.num_tasks, generator=generator).softmax(dim=0)


class GradientBalancing(Balancing):
    """One step for the shared parameters out of the tasks' gradients, by an aggregator of torchjd (torchjd.org)."""

    needs_gradients = True

    def __init__(self, num_tasks: int, aggregator: str, is_mean: bool, **settings: Any) -> None:
        super().__init__(num_tasks)
        self.is_mean = is_mean
        try:
            aggregation = importlib.import_module("torchjd.aggregation")
            self.aggregator: nn.Module = getattr(aggregation, aggregator)(**settings)
        except ImportError as error:
            raise ValueError(
                f'balancing by gradients needs torchjd: pip install "mt-adapters[balancing]" ({error})'
            ) from error

    def aggregate(self, gradients_TP: Tensor, step: int) -> Tensor:
        """(P,) from the gradients of the weighted losses. Equal gradients give their sum, as without balancing
        (cagrad's strength c adds to it).

        A task without gradient takes no part: no step at all would be the one that hurts it least.
        """
        gradients_TP = gradients_TP[gradients_TP.any(dim=1)]
        if len(gradients_TP) == 0:
            return gradients_TP.sum(dim=0)
        # torchjd gives up on gradients below an absolute size, so they all come to it with a norm of 1.
        size = gradients_TP.norm()
        with torch.random.fork_rng(devices=[gradients_TP.device] if gradients_TP.is_cuda else []):
            # PCGrad and GradDrop draw: the same on every process and in a resumed run.
            torch.manual_seed(step)
            return self.aggregator(gradients_TP / size) * size * (len(gradients_TP) if self.is_mean else 1)


LOSS_BALANCING: dict[str, type[Balancing]] = {
    "fixed": Balancing,
    "uncertainty": Uncertainty,
    "dwa": DynamicWeightAverage,
    "random": RandomLossWeights,
}

# Name -> class of torchjd.aggregation, whether it gives a mean (or a sum), and settings that have no default there.
# Only such as keep no state between steps, which checkpoints would lose.
GRADIENT_BALANCING: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "aligned_mtl": ("AlignedMTL", True, {}),
    "cagrad": ("CAGrad", True, {"c": 0.5}),
    "config": ("ConFIG", False, {}),
    "dualproj": ("DualProj", True, {}),
    "graddrop": ("GradDrop", False, {}),
    "imtl_g": ("IMTLG", True, {}),
    "mgda": ("MGDA", True, {}),
    "pcgrad": ("PCGrad", False, {}),
    "upgrad": ("UPGrad", True, {}),
}


def get_balancing(name: str, num_tasks: int, settings: dict[str, Any] | None = None) -> Balancing:
    """
    Args:
        settings: keyword arguments of the balancing, e.g. {"window": 50} of "dwa" or {"c": 0.4} of "cagrad".

    Raises:
        ValueError: if the name or a setting is unknown, or torchjd is needed and missing.

    Example:
        >>> get_balancing("uncertainty", num_tasks=2).factors(step=0)
        tensor([1., 1.])
    """
    settings = settings or {}
    try:
        if name in LOSS_BALANCING:
            return LOSS_BALANCING[name](num_tasks, **settings)
        if name in GRADIENT_BALANCING:
            aggregator, is_mean, defaults = GRADIENT_BALANCING[name]
            return GradientBalancing(num_tasks, aggregator, is_mean, **(defaults | settings))
    except TypeError as error:
        raise ValueError(f"balancing {name!r} does not take the settings {settings}: {error}") from error
    raise ValueError(
        f"unknown balancing {name!r}; known are {[*LOSS_BALANCING]} by losses and {[*GRADIENT_BALANCING]} by gradients"
    )
