"""The figures of the study of affinities: ranks, correlations, spreads."""

import pytest
from benchmarks.affinity_study import METRICS, REFERENCE, off_diagonal, ranks, spearman, summarize, table


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
        return {"results": {task: {metric: value} for task, metric in METRICS.items()}, "affinity": affinity}

    runs = {
        "cosine": {
            0: record(1.0, [[1.0, 0.1], [0.2, 1.0]]),
            1: record(2.0, [[1.0, 0.3], [0.4, 1.0]]),
            2: record(3.0, [[1.0, 0.4], [0.3, 1.0]]),
        },
        REFERENCE: dict.fromkeys(range(3), record(2.0, [[1.0, 0.1], [0.2, 1.0]])),
    }
    # In every second task lower is better.
    runs["cosine"][2]["results"]["semseg"]["miou"] = 4.0
    summary = summarize(runs)["cosine"]
    assert summary["mean"] == pytest.approx(
        {"semseg": 7 / 3, "depth": 2.0, "normals": 2.0, "edges": 2.0, "gain": 25 / 6}
    )
    assert summary["half_range"] == {"semseg": 1.5, "depth": 1.0, "normals": 1.0, "edges": 1.0, "gain": 6.25}
    assert summary["spearman"] == pytest.approx([1.0, -1.0, -1.0])
    row = "| cosine | 2.333 ± 1.500 | 2.000 ± 1.000 | 2.00 ± 1.00 | 2.000 ± 1.000 | 4.2 ± 6.2 | 1.00, -1.00, -1.00 |"
    assert row in table(summarize(runs), 3)
