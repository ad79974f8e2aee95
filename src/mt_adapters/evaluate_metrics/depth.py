"""Depth as an `evaluate` metric: errors in metres and shares of pixels within ratios."""

from mt_adapters.evaluate_metrics import base


class Depth(base.TaskMetric):
    """Errors of depth, pooled over the labelled pixels of the set.

    Inputs:
        predictions, references: (B,H,W) metres; 0 or NaN in the references is no label. `add` takes (H,W).

    Returns:
        rmse: root of the mean squared error over pixels, in metres.
        rmse_image: mean over the images of their RMSEs, in metres.
        abs_rel: mean of |p - g| / g.
        delta1, delta2, delta3: shares in [0,1] of pixels with max(p/g, g/p) below 1.25, 1.25^2, 1.25^3.
        All are NaN without any labelled pixel.

    Example:
        >>> import evaluate
        >>> from mt_adapters import evaluate_metrics
        >>> metric = evaluate.load(evaluate_metrics.path("depth"))
        >>> metric.add(prediction=[[1.0, 2.0]], reference=[[1.0, 0.0]])  # the second pixel has no label
        >>> metric.add(prediction=[[2.0], [3.0], [4.0]], reference=[[2.0], [2.0], [4.0]])
        >>> results = metric.compute()
        >>> results["rmse"], results["abs_rel"], results["delta1"]
        (0.5, 0.125, 0.75)
    """

    kind = "depth"
    source = """\
@inproceedings{eigen2014depth,
    title = {Depth Map Prediction from a Single Image using a Multi-Scale Deep Network},
    author = {Eigen, David and Puhrsch, Christian and Fergus, Rob},
    booktitle = {Advances in Neural Information Processing Systems},
    year = {2014},
    note = {arXiv:1406.2283},
}"""
