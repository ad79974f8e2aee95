"""Surface normals as an `evaluate` metric: angles in degrees and percentages of pixels within limits."""

from mt_adapters.evaluate_metrics import base


class Normals(base.TaskMetric):
    """Angles between predicted and true surface normals, pooled over the labelled pixels of the set.

    Inputs:
        predictions, references: (B,3,H,W) vectors of any length; all zeros in the references is no label, a
            prediction of zeros is 90 degrees off. `add` takes (3,H,W).

    Returns:
        mean_angle, median_angle, rmse_angle: degrees; the median is right to 0.01 degrees, and `rmse_angle` is the
            root of the mean square, where several papers print the mean under the name "rmse".
        within_11.25, within_22.5, within_30: percentages of pixels below so many degrees.
        All are NaN without any labelled pixel.

    Example:
        >>> import evaluate
        >>> import numpy as np
        >>> from mt_adapters import evaluate_metrics
        >>> metric = evaluate.load(evaluate_metrics.path("normals"))
        >>> label = np.zeros((1, 3, 2, 2))
        >>> label[:, 2] = 1
        >>> metric.compute(predictions=-label, references=label)["mean_angle"]
        180.0
    """

    kind = "normals"
    source = """\
@inproceedings{fouhey2013data,
    title = {Data-Driven {3D} Primitives for Single Image Understanding},
    author = {Fouhey, David F. and Gupta, Abhinav and Hebert, Martial},
    booktitle = {IEEE International Conference on Computer Vision},
    year = {2013},
}"""
