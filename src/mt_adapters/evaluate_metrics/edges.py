"""Edges as an `evaluate` metric: the best F over the set's thresholds, and the absolute error."""

from mt_adapters.evaluate_metrics import base


class Edges(base.TaskMetric):
    """Best F of edges over the set's thresholds 0.05, 0.10 .. 0.95 with a pixel tolerance, and their absolute error.

    This is not odsF, which thins predictions and matches pixels one to one; the two cannot be compared.

    Settings:
        tolerance: distance in pixels, in a square, within which an edge pixel matches; 1 by default.

    Inputs:
        predictions, references: (B,H,W) in [0,1]; NaN in the references is no label, and a value of at least 0.5 an
            edge. `add` takes (H,W).

    Returns:
        f: best harmonic mean of precision and recall, in [0,1].
        threshold, precision, recall: those of the best f, at the lowest threshold if several have it.
        l1: mean of |p - g|.
        All but l1 are NaN if the references have no edge, and l1 without any labelled pixel.

    Example:
        >>> import evaluate
        >>> from mt_adapters import evaluate_metrics
        >>> metric = evaluate.load(evaluate_metrics.path("edges"), tolerance=1)
        >>> metric.compute(predictions=[[[0.0, 0.5, 0.0]]], references=[[[1.0, 0.0, 0.0]]])
        {'f': 1.0, 'threshold': 0.05, 'precision': 1.0, 'recall': 1.0, 'l1': 0.5}
    """

    kind = "edges"
