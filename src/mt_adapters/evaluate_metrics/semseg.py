"""Semantic segmentation as an `evaluate` metric: mean intersection over union and pixel accuracy."""

from mt_adapters.evaluate_metrics import base


class Semseg(base.TaskMetric):
    """Mean intersection over union and pixel accuracy of semantic segmentation, pooled over the set.

    Settings:
        num_labels: number K of classes, 1 to 255.
        absent: an id that is in neither the predictions nor the references of the whole set is left out of the mean
            with "drop" (default) and counts 0 with "zero"; say which with the result.

    Inputs:
        predictions, references: (B,H,W) integer ids 0 .. K - 1; 255 in the references is no label. `add` takes (H,W).

    Returns:
        miou, pixel_accuracy: shares in [0,1]; NaN without any labelled pixel.

    Example:
        >>> import evaluate
        >>> from mt_adapters import evaluate_metrics
        >>> metric = evaluate.load(evaluate_metrics.path("semseg"), num_labels=3)
        >>> metric.compute(predictions=[[[0, 1, 1]]], references=[[[0, 1, 255]]])
        {'miou': 1.0, 'pixel_accuracy': 1.0}
    """

    kind = "semseg"
    source = """\
@article{everingham2010pascal,
    title = {The {PASCAL} Visual Object Classes ({VOC}) Challenge},
    author = {Everingham, Mark and Van Gool, Luc and Williams, Christopher K. I. and Winn, John and Zisserman, Andrew},
    journal = {International Journal of Computer Vision},
    year = {2010},
}"""
