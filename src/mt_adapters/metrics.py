"""Metrics of the dense tasks as torchmetrics classes; each `compute()` gives a dict of Python floats.

Every state is a sum of integers, so the results do not depend on how a set is cut into batches or processes: two
processes give the same digits as one. A pixel without a label counts nowhere. A metric that has seen no labelled pixel
is NaN. Shares are in [0,1] except `within_*`, which are percent as tables of normals print them.

Shape legend: B batch, K labels, H height, W width, P labelled pixels, L thresholds.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from .losses import IGNORE_INDEX, labelled_depth, labelled_edges, labelled_normals

# An exact sum is a pair of int64: the sum of the integer parts and that of the fractions in units of 2^-30. With every
# value at most 2^30 neither can overflow below 2^33 pixels, about 8.6 billion.
_UNITS = 2**30
_MAX_VALUE = 2.0**30

_NAN = float("nan")


class TaskMetrics(Metric):
    """What the metrics of all task kinds share: `primary`, the key that Delta_m reads, and its direction."""

    primary: ClassVar[str]
    lower_is_better: ClassVar[bool]
    full_state_update = False

    def _add_sums(self, **shapes: tuple[int, ...]) -> None:
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")


class SemsegMetrics(TaskMetrics):
    """Mean intersection over union and pixel accuracy, both in [0,1], pooled over the set.

    `update(prediction, label)`: (B,H,W) int64 ids in 0..K-1; 255 in `label` is no label. An id that is in neither the
    predictions nor the labels of the whole set is left out of the mean with `absent="drop"`, and counts 0 with
    `absent="zero"`, as in the research code of multitask learning; say which with the result. ValueError for an id out
    of range at a labelled pixel.

    ```python
    >>> import torch
    >>> from mt_adapters.metrics import SemsegMetrics
    >>> metrics = SemsegMetrics(num_labels=3)
    >>> metrics.update(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 255]]]))
    >>> metrics.compute()
    {'miou': 1.0, 'pixel_accuracy': 1.0}

    ```
    """

    primary = "miou"
    lower_is_better = False
    confusion: Tensor  # (K,K) int64, [label, prediction]

    def __init__(self, num_labels: int, absent: Literal["drop", "zero"] = "drop", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 1 <= num_labels <= IGNORE_INDEX:
            raise ValueError(f"num_labels is {num_labels}; it must be 1 to {IGNORE_INDEX}: {IGNORE_INDEX} is no label")
        if absent not in ("drop", "zero"):
            raise ValueError(f"absent is {absent!r}; it must be 'drop' or 'zero'")
        self.num_labels = num_labels
        self.absent = absent
        self._add_sums(confusion=(num_labels, num_labels))

    def update(self, prediction: Tensor, label: Tensor) -> None:
        _check_same_shape(prediction, label)
        valid = label != IGNORE_INDEX
        prediction, label = prediction[valid], label[valid]  # (P,)
        _check_ids("prediction", prediction, self.num_labels)
        _check_ids("label", label, self.num_labels)
        pairs = torch.bincount(label * self.num_labels + prediction, minlength=self.num_labels**2)
        self.confusion += pairs.view_as(self.confusion)

    def compute(self) -> dict[str, float]:
        num_pixels = self.confusion.sum().item()
        if num_pixels == 0:
            return {"miou": _NAN, "pixel_accuracy": _NAN}
        correct = self.confusion.diagonal()  # (K,)
        union = self.confusion.sum(dim=0) + self.confusion.sum(dim=1) - correct
        iou = correct.double() / union.clamp(min=1)  # 0 for an absent label
        num_averaged = (union > 0).sum().item() if self.absent == "drop" else self.num_labels
        return {"miou": iou.sum().item() / num_averaged, "pixel_accuracy": correct.sum().item() / num_pixels}


class DepthMetrics(TaskMetrics):
    """Errors of depth, pooled over the labelled pixels of the set.

    `update(prediction, label)`: (B,H,W) metres; 0 or NaN in `label` is no label. `rmse` in metres, over pixels;
    `rmse_image` in metres, the mean of the RMSEs of the images that have a label; `abs_rel` the mean of |p - g| / g;
    `delta1..3` the shares in [0,1] with max(p/g, g/p) below 1.25, 1.25^2, 1.25^3. A squared error is
    kept to 2^-30 square metres, so 0.02 mm counts as none, and one above 2^30 counts as 2^30. ValueError for a value
    that is not finite at a labelled pixel. Source of the definitions: Eigen et al. 2014 (arXiv:1406.2283).
    """

    primary = "rmse"
    lower_is_better = True
    num_pixels: Tensor
    num_images: Tensor
    num_within: Tensor
    squared_error: Tensor
    image_rmse: Tensor
    relative_error: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sums(num_pixels=(), num_images=(), num_within=(3,))
        self._add_sums(squared_error=(2,), image_rmse=(2,), relative_error=(2,))

    def update(self, prediction: Tensor, label: Tensor) -> None:
        _check_same_shape(prediction, label)
        valid = labelled_depth(label)
        num_pixels = valid.sum(dim=(1, 2))  # (B,)
        prediction = torch.where(valid, prediction.double(), 1.0)
        label = torch.where(valid, label.double(), 1.0)
        error = (prediction - label).abs()  # (B,H,W), zero without a label
        squared_error = _exact_sum(error.square(), dim=(1, 2))  # (B,2)
        relative_error = _exact_sum(error / label)
        mean_square = (squared_error[:, 0] + squared_error[:, 1].double() / _UNITS) / num_pixels.clamp(min=1)

        self.num_pixels += num_pixels.sum()
        self.num_images += (num_pixels > 0).sum()
        self.squared_error += squared_error.sum(dim=0)
        self.image_rmse += _exact_sum(mean_square.sqrt())
        self.relative_error += relative_error
        for index, limit in enumerate((1.25, 1.25**2, 1.25**3)):
            # Products, not ratios: the ratios of a negative prediction would pass.
            within = (prediction < limit * label) & (label < limit * prediction)
            self.num_within[index] += (within & valid).sum()

    def compute(self) -> dict[str, float]:
        num_pixels = self.num_pixels.item()
        within = enumerate(self.num_within.tolist(), start=1)
        return {
            "rmse": math.sqrt(_ratio(_to_float(self.squared_error), num_pixels)),
            "rmse_image": _ratio(_to_float(self.image_rmse), self.num_images.item()),
            "abs_rel": _ratio(_to_float(self.relative_error), num_pixels),
            **{f"delta{power}": _ratio(count, num_pixels) for power, count in within},
        }


class NormalsMetrics(TaskMetrics):
    """Angles between predicted and true normals in degrees, pooled over the labelled pixels of the set.

    `update(prediction, label)`: (B,3,H,W), both of any length; all zeros in `label` is no label, a prediction of zeros
    is 90 degrees off. `mean_angle`, `median_angle`, `rmse_angle` in degrees; `within_*` the percentage of pixels below
    11.25, 22.5 and 30 degrees. The median comes from a histogram with bins of 0.01 degrees, interpolated linearly
    inside the bin, and is right to 0.01 degrees. ValueError for a value that is not finite at a labelled pixel.
    Several papers print the mean angle under the name "rmse"; here `rmse_angle` is the root of the mean square.
    """

    primary = "mean_angle"
    lower_is_better = True
    bins_per_degree: ClassVar[int] = 100
    limits: ClassVar[tuple[float, ...]] = (11.25, 22.5, 30)
    angle: Tensor
    squared_angle: Tensor
    num_within: Tensor
    histogram: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sums(angle=(2,), squared_angle=(2,))
        self._add_sums(num_within=(len(self.limits),), histogram=(180 * self.bins_per_degree,))

    def update(self, prediction: Tensor, label: Tensor) -> None:
        _check_same_shape(prediction, label)
        valid = labelled_normals(label)
        # (P,3) each
        p, g = (F.normalize(normals.movedim(1, -1)[valid].double(), dim=-1) for normals in (prediction, label))
        # Accurate at all angles, where arccos loses half of its digits near 0 and 180 degrees.
        angle = torch.rad2deg(2 * torch.atan2(_length(p - g), _length(p + g)))  # (P,)
        angle_sum, squared_angle_sum = _exact_sum(angle), _exact_sum(angle.square())
        num_bins = len(self.histogram)
        bins = (angle * self.bins_per_degree).long().clamp(max=num_bins - 1)  # 180 degrees fall into the last bin

        self.angle += angle_sum
        self.squared_angle += squared_angle_sum
        self.num_within += torch.stack([(angle < limit).sum() for limit in self.limits])
        self.histogram += torch.bincount(bins, minlength=num_bins)

    def compute(self) -> dict[str, float]:
        num_pixels = int(self.histogram.sum())
        within = zip(self.limits, self.num_within.tolist(), strict=True)
        return {
            "mean_angle": _ratio(_to_float(self.angle), num_pixels),
            "median_angle": self._median(num_pixels),
            "rmse_angle": math.sqrt(_ratio(_to_float(self.squared_angle), num_pixels)),
            **{f"within_{limit}": 100 * _ratio(count, num_pixels) for limit, count in within},
        }

    def _median(self, num_pixels: int) -> float:
        """Mean of the two middle angles (one and the same for an odd number of pixels)."""
        if num_pixels == 0:
            return _NAN
        cumulative = self.histogram.cumsum(dim=0)
        ranks = torch.tensor([(num_pixels - 1) // 2, num_pixels // 2], device=cumulative.device)
        bins = torch.searchsorted(cumulative, ranks, right=True)  # first bin whose cumulative count exceeds the rank
        count = self.histogram[bins]
        rank_in_bin = ranks - (cumulative[bins] - count)
        angles = (bins + (rank_in_bin + 0.5).double() / count) / self.bins_per_degree
        return angles.mean().item()


class EdgeMetrics(TaskMetrics):
    """Best F over the set's thresholds 0.05, 0.10 .. 0.95 with a pixel tolerance, and the absolute error of edges.

    `update(prediction, label)`: (B,H,W) in [0,1]; NaN in `label` is no label. An edge is a `label` of at least 0.5, or
    a `prediction` of at least the threshold. `precision` is the share of predicted edge pixels within `tolerance`
    pixels (in a square, the Chebyshev distance) of a true one, `recall` the share of true ones within it of a
    predicted one, `f` their harmonic mean, all at the `threshold` of the best `f` (the lowest if several); NaN if the
    set has no true edge. `l1` is the mean of |prediction - label|. ValueError for a prediction outside [0,1] at a
    labelled pixel.

    This is not odsF, and the two cannot be compared: odsF thins the prediction by non-maximum suppression and matches
    pixels one to one, within a distance that is a share of the image diagonal. Here a thick line inside the tolerance
    costs nothing. In return it needs no thinning and no assignment on the CPU, and its counts add up.
    """

    primary = "f"
    lower_is_better = False
    thresholds: ClassVar[tuple[float, ...]] = tuple(step / 20 for step in range(1, 20))
    level_counts: Tensor  # (3,L+1) pixels by the number of thresholds reached: predicted, of these matched, true
    absolute_error: Tensor

    def __init__(self, tolerance: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if tolerance < 0:
            raise ValueError(f"tolerance is {tolerance}; it must be a number of pixels, 0 or more")
        self.tolerance = tolerance
        self._add_sums(level_counts=(3, len(self.thresholds) + 1), absolute_error=(2,))

    def update(self, prediction: Tensor, label: Tensor) -> None:
        _check_same_shape(prediction, label)
        prediction, label = prediction.float(), label.float()
        valid = labelled_edges(label)
        absolute_error = _exact_sum((prediction[valid].double() - label[valid].double()).abs())
        if ((prediction < 0) | (prediction > 1))[valid].any():
            raise ValueError("prediction has values outside [0,1]; give probabilities: apply a sigmoid or clamp")
        true_edge = valid & (label >= 0.5)
        near_true = self._dilate(true_edge.float()) > 0
        # Dilating the probabilities once equals dilating the predicted edges at every threshold.
        near_prediction = self._dilate(torch.where(valid, prediction, -1.0))

        self.absolute_error += absolute_error
        groups = (prediction[valid], prediction[valid & near_true], near_prediction[true_edge])
        self.level_counts += torch.stack([self._count_levels(group) for group in groups])

    def compute(self) -> dict[str, float]:
        reached = self.level_counts.flip(1).cumsum(dim=1).flip(1)  # pixels that reach so many thresholds, or more
        num_pixels, _, num_true = reached[:, 0].tolist()
        l1 = _ratio(_to_float(self.absolute_error), num_pixels)
        if num_true == 0:
            return {"f": _NAN, "threshold": _NAN, "precision": _NAN, "recall": _NAN, "l1": l1}
        predicted, matched, found = reached[:, 1:].double()  # (L,) each
        precision = matched / predicted.clamp(min=1)
        recall = found / num_true
        total = precision + recall
        f = torch.where(total > 0, 2 * precision * recall / total, 0.0).tolist()
        best = f.index(max(f))
        at_best = {
            "threshold": self.thresholds[best],
            "precision": precision[best].item(),
            "recall": recall[best].item(),
        }
        return {"f": f[best], **at_best, "l1": l1}

    def _dilate(self, values: Tensor) -> Tensor:
        """Largest value within `tolerance` pixels. (B,H,W) -> (B,H,W)."""
        size = 2 * self.tolerance + 1
        return F.max_pool2d(values.unsqueeze(1), size, stride=1, padding=self.tolerance).squeeze(1)

    def _count_levels(self, probabilities: Tensor) -> Tensor:
        """How many pixels reach exactly 0, 1 .. L thresholds. (P,) -> (L+1,) int64."""
        thresholds = probabilities.new_tensor(self.thresholds)
        levels = torch.bucketize(probabilities, thresholds, right=True)
        return torch.bincount(levels, minlength=len(self.thresholds) + 1)


METRICS: dict[str, type[TaskMetrics]] = {
    "semseg": SemsegMetrics,
    "depth": DepthMetrics,
    "normals": NormalsMetrics,
    "edges": EdgeMetrics,
}


class _TaskLike(Protocol):
    @property
    def kind(self) -> str: ...

    @property
    def num_channels(self) -> int: ...


def get_metric(task: _TaskLike, **options: Any) -> TaskMetrics:
    """A fresh metric for `task`; `options` go to its class, such as `absent` of semseg or `tolerance` of edges.

    ValueError for a kind of task that has no metric.
    """
    metrics = _metrics_of_kind(task.kind)
    return metrics(num_labels=task.num_channels, **options) if metrics is SemsegMetrics else metrics(**options)


def delta_m(
    results: Mapping[str, Mapping[str, float]],
    baseline: Mapping[str, Mapping[str, float]],
    kinds: Mapping[str, str],
) -> float:
    """Mean gain over `baseline` in percent: 100/T sum_t (-1)^(lower is better) (M_t - B_t) / B_t.

    `kinds` maps each of the T tasks to its kind, whose primary metric is read from `results` and `baseline` (task ->
    metric -> value). The baseline of the literature is one single-task model per task with the same backbone.
    ValueError for a task or metric that is missing, or a baseline value that is zero or not finite. Source: Maninis et
    al. 2019 (arXiv:1904.08918).

    ```python
    >>> from mt_adapters.metrics import delta_m
    >>> delta_m({"depth": {"rmse": 0.75}}, {"depth": {"rmse": 1.0}}, {"depth": "depth"})
    25.0

    ```
    """
    if not kinds:
        raise ValueError("kinds is empty; name at least one task and its kind")
    gains = []
    for task, kind in kinds.items():
        metrics = _metrics_of_kind(kind)
        value = _primary_value("results", results, task, metrics)
        reference = _primary_value("baseline", baseline, task, metrics)
        if reference == 0 or not math.isfinite(reference):
            raise ValueError(f"baseline[{task!r}][{metrics.primary!r}] is {reference}; it must be finite and not zero")
        sign = -1 if metrics.lower_is_better else 1
        gains.append(sign * (value - reference) / reference)
    return 100 * sum(gains) / len(gains)


def _metrics_of_kind(kind: str) -> type[TaskMetrics]:
    if kind not in METRICS:
        raise ValueError(f"no metric for tasks of kind {kind!r}; supported: {sorted(METRICS)}")
    return METRICS[kind]


def _primary_value(
    source: str, values: Mapping[str, Mapping[str, float]], task: str, metrics: type[TaskMetrics]
) -> float:
    if task not in values:
        raise ValueError(f"{source} has no task {task!r}, only {sorted(values)}; evaluate it or drop it from kinds")
    if metrics.primary not in values[task]:
        raise ValueError(f"{source}[{task!r}] has no {metrics.primary!r}, only {sorted(values[task])}")
    return values[task][metrics.primary]


def _check_same_shape(prediction: Tensor, label: Tensor) -> None:
    if prediction.shape != label.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)} and label {tuple(label.shape)}; they must be equal"
        )


def _check_ids(name: str, ids: Tensor, num_labels: int) -> None:
    if ids.numel() > 0 and (ids.min() < 0 or ids.max() >= num_labels):
        raise ValueError(
            f"{name} has ids {ids.min().item()} to {ids.max().item()}; allowed are 0 to {num_labels - 1}, "
            f"and {IGNORE_INDEX} in label for no label"
        )


def _exact_sum(values: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """Sum of float64 values of 0 or more as (..., 2) int64: integer parts, and fractions in units of 2^-30."""
    if not values.isfinite().all():
        raise ValueError("a labelled pixel has a prediction or a label that is not finite; look for NaN or infinity")
    dim = dim or tuple(range(values.ndim))
    values = values.clamp(max=_MAX_VALUE)
    whole = values.floor()
    fraction = ((values - whole) * _UNITS).round()
    return torch.stack([whole.long().sum(dim=dim), fraction.long().sum(dim=dim)], dim=-1)


def _to_float(exact: Tensor) -> float:
    whole, fraction = exact.tolist()
    return (whole * _UNITS + fraction) / _UNITS  # Python integers: rounded once, here


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else _NAN


def _length(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1)
