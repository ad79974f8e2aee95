"""Dense losses that skip pixels without a label; each is a float32 scalar, whatever the dtype of its inputs.

A call in which nothing is labelled gives exactly zero with exactly zero gradients, so a batch may lack any task. Both
inputs are masked before the arithmetic, not after it: the gradient of an unlabelled NaN would be NaN * 0 = NaN.

Shape legend: B batch, K labels, H height, W width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = 255


def labelled_depth(target: Tensor) -> Tensor:
    """Where a depth map has a label: above zero, so neither 0 nor NaN. (B,H,W) metres -> (B,H,W) bool."""
    return target > 0


def labelled_normals(target: Tensor) -> Tensor:
    """Where a normal map has a label: not all zeros. (B,3,H,W) -> (B,H,W) bool."""
    return (target != 0).any(dim=1)


def labelled_edges(target: Tensor) -> Tensor:
    """Where an edge map has a label: not NaN. (B,H,W) -> (B,H,W) bool."""
    return ~target.isnan()


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Cross entropy, the mean over labelled pixels.

    `logits` (B,K,H,W); `labels` (B,H,W) int64 in 0..K-1, or `ignore_index` for no label. ValueError if the shapes do
    not fit.

    ```python
    >>> import torch
    >>> from mt_adapters.losses import cross_entropy
    >>> loss = cross_entropy(torch.zeros(1, 4, 1, 2), torch.tensor([[[3, 255]]]))
    >>> round(loss.item(), 4)  # log 4: the second pixel has no label
    1.3863

    ```
    """
    if logits.ndim != 4 or (logits.shape[0], *logits.shape[2:]) != labels.shape:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; "
            "give logits (B,K,H,W) with labels (B,H,W)"
        )
    valid = labels != ignore_index  # (B,H,W)
    logits = torch.where(valid.unsqueeze(1), logits.float(), 0.0)
    pixel_loss = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")  # (B,H,W)
    return _mean_over(valid, pixel_loss)


def berhu(prediction: Tensor, target: Tensor) -> Tensor:
    """Reverse Huber loss of depth: L1 up to c, above it (r^2 + c^2) / 2c; the mean over labelled pixels, in metres.

    `prediction`, `target` (B,H,W) metres; 0 or NaN in `target` is no label. c is 0.2 times the largest residual of the
    batch and is a constant to the gradient. ValueError if the shapes differ. Source: Laina et al. 2016
    (arXiv:1606.00373).
    """
    residual, valid = _masked_residual(prediction, target, labelled_depth(target))
    residual = residual.abs()
    # The floor keeps a perfect prediction, whose c is zero, away from 0 / 0.
    c = (0.2 * residual.detach().amax()).clamp(min=torch.finfo(torch.float32).tiny)
    return _mean_over(valid, torch.where(residual <= c, residual, residual.square() / (2 * c) + c / 2))


def depth_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Absolute error of depth, the mean over labelled pixels, in metres.

    `prediction`, `target` (B,H,W) metres; 0 or NaN in `target` is no label. ValueError if the shapes differ.
    """
    residual, valid = _masked_residual(prediction, target, labelled_depth(target))
    return _mean_over(valid, residual.abs())


def scale_invariant_log(prediction: Tensor, target: Tensor, weight: float = 0.5, min_depth: float = 1e-3) -> Tensor:
    """Scale-invariant log error of depth: mean(d^2) - weight * mean(d)^2 per image, d = log prediction - log target.

    `prediction`, `target` (B,H,W) metres; 0 or NaN in `target` is no label. The result is the mean over the images
    that have a label, since a scale belongs to one image. Predictions below `min_depth` metres are raised to it and
    get no gradient: use it behind a head with positive output. ValueError if the shapes differ. Source: Eigen et al.
    2014 (arXiv:1406.2283), equation 4, whose training weight is 0.5; Lee et al. 2019, BTS (arXiv:1907.10326), use 0.85
    and also take the root.
    """
    _check_same_shape(prediction, target)
    valid = labelled_depth(target)
    prediction = torch.where(valid, prediction.float(), 1.0).clamp(min=min_depth)
    d = prediction.log() - torch.where(valid, target.float(), 1.0).log()  # (B,H,W), zero without a label
    num_pixels = valid.sum(dim=(1, 2))  # (B,)
    divisor = num_pixels.clamp(min=1)
    error = d.square().sum(dim=(1, 2)) / divisor - weight * (d.sum(dim=(1, 2)) / divisor).square()  # (B,)
    return _mean_over(num_pixels > 0, error)


def cosine_distance(prediction: Tensor, target: Tensor, eps: float = 1e-3) -> Tensor:
    """One minus the cosine between predicted and true normals, the mean over labelled pixels; 0 to 2.

    `prediction` (B,3,H,W) of any length; `target` (B,3,H,W) unit vectors, all zeros is no label. A prediction shorter
    than `eps` is divided by `eps` instead of its length. ValueError if the shapes differ.
    """
    _check_same_shape(prediction, target)
    if prediction.ndim != 4 or prediction.shape[1] != 3:
        raise ValueError(f"normals have shape {tuple(prediction.shape)}; give (B,3,H,W)")
    valid = labelled_normals(target)
    prediction = torch.where(valid.unsqueeze(1), prediction.float(), 0.0)
    # The gradient of a direction grows as 1 / length; eps bounds it where a zero-initialised head predicts zeros.
    # Written out: torch's norm over a dimension that is not the last is many times slower on CPUs.
    length = prediction.square().sum(dim=1, keepdim=True).clamp(min=eps * eps).sqrt()  # (B,1,H,W)
    cosine = (prediction / length * target.float()).sum(dim=1)  # (B,H,W)
    return _mean_over(valid, 1 - cosine)


def balanced_bce(logits: Tensor, target: Tensor) -> Tensor:
    """Class-balanced binary cross entropy of edges, the mean over labelled pixels.

    `logits` (B,H,W) before the sigmoid; `target` (B,H,W) in [0,1], soft values allowed, NaN is no label. The edge term
    is weighted with the share of non-edges and the other term with the share of edges, both over the labelled pixels
    of the batch. ValueError if the shapes differ. Source: Xie and Tu 2015, HED (arXiv:1504.06375), equation 2, which
    balances each image and takes the sum.
    """
    _check_same_shape(logits, target)
    valid = labelled_edges(target)
    logits = torch.where(valid, logits.float(), 0.0)
    target = torch.where(valid, target.float(), 0.0)
    share = _mean_over(valid, target)
    edge_term = (1 - share) * target * -F.logsigmoid(logits)
    other_term = share * (1 - target) * -F.logsigmoid(-logits)
    return _mean_over(valid, edge_term + other_term)


def edge_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Absolute error of edge strength, the mean over labelled pixels.

    `prediction` (B,H,W); `target` (B,H,W) in [0,1], NaN is no label. ValueError if the shapes differ.
    """
    residual, valid = _masked_residual(prediction, target, labelled_edges(target))
    return _mean_over(valid, residual.abs())


DEPTH_LOSSES: dict[str, Callable[..., Tensor]] = {"berhu": berhu, "l1": depth_l1, "silog": scale_invariant_log}
EDGE_LOSSES: dict[str, Callable[..., Tensor]] = {"balanced_bce": balanced_bce, "l1": edge_l1}


def _check_same_shape(prediction: Tensor, target: Tensor) -> None:
    """(B,1,H,W) against (B,H,W) would broadcast to (B,B,H,W) in silence."""
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)} and target {tuple(target.shape)}; they must be equal"
        )


def _masked_residual(prediction: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """prediction - target in float32, zero where `valid` is false; and `valid`."""
    _check_same_shape(prediction, target)
    return torch.where(valid, prediction.float(), 0.0) - torch.where(valid, target.float(), 0.0), valid


def _mean_over(valid: Tensor, values: Tensor) -> Tensor:
    """Mean of `values` where `valid`, zero (connected to the graph) where that is nowhere."""
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)
