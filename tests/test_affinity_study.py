"""The figures of the study of affinities: ranks, correlations, spreads."""

import pytest
from benchmarks.affinity_study import METRICS, off_diagonal, ranks, spearman, summarize, table


def test_ranks_share_ties():
    assert ranks([0.3, 0.1, 0.3, 0.9]) == [1.5, 0.0, 1.5, 3.0]


def test_spearman_sees_the_order_only():
    assert spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with the rank differences 0, 1, 1, 0.
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert spearman([0.0, 0.0], [1.0, 2.0]) is None


def test_the_diagonal_is_left_out():
    assert off_diagonal([[1, 2, 3], [4, 5, 6], [7, 8, 9]]) == [2, 3, 4, 6, 7, 8]


def test_a_summary_has_means_half_ranges_and_correlations_of_all_pairs_of_seeds():
    def record(value: float, affinity: list[list[float]]) -> dict:
        results = {task: {metric: value} for task, metric in METRICS.items()}
        return {"results": results, "mean_gain": 10 * value, "affinity": affinity}

    runs = {
        "cosine": {
            0: record(1.0, [[1.0, 0.1], [0.2, 1.0]]),
            1: record(2.0, [[1.0, 0.3], [0.4, 1.0]]),
            2: record(3.0, [[1.0, 0.4], [0.3, 1.0]]),
        }
    }
    summary = summarize(runs)["cosine"]
    assert summary["mean"] == {"semseg": 2.0, "depth": 2.0, "normals": 2.0, "edges": 2.0, "gain": 20.0}
    assert summary["half_range"] == {"semseg": 1.0, "depth": 1.0, "normals": 1.0, "edges": 1.0, "gain": 10.0}
    assert summary["spearman"] == pytest.approx([1.0, -1.0, -1.0])
    row = "| cosine | 2.000 ± 1.000 | 2.000 ± 1.000 | 2.00 ± 1.00 | 2.000 ± 1.000 | 20.0 ± 10.0 | 1.00, -1.00, -1.00 |"
    assert row in table(summarize(runs), 3)
