"""The metrics of the dense tasks for the library `evaluate`: a script per task kind, loaded by path, without network.

With several processes give `evaluate.load` an `experiment_id` of its own for each metric, besides `num_process` and
`process_id`, and call `compute` in every process. They wait for one another there, `timeout` seconds at most (default
100), but the first works on while the others return: let them meet (a barrier) before the next `compute`.
"""

from pathlib import Path

from mt_adapters.tasks import TASKS


def path(kind: str) -> str:
    """The script that `evaluate.load` takes, for a task kind: "semseg", "depth", "normals" or "edges".

    Raises:
        ValueError: if the kind is unknown; names the known ones.

    Example:
        >>> import evaluate
        >>> from mt_adapters import evaluate_metrics
        >>> metric = evaluate.load(evaluate_metrics.path("edges"), tolerance=2)
        >>> metric.compute(predictions=[[[0.0, 0.0, 0.9]]], references=[[[1, 0, 0]]])["f"]
        1.0
    """
    if kind not in TASKS:
        raise ValueError(f"no script for the kind {kind!r}; known are {[*TASKS]}")
    return str(Path(__file__).with_name(f"{kind}.py"))


__all__ = ["path"]
