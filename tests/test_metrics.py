"""Metrics against loops over pixels, and the promises they share: partial labels, exact sums, one pass or two."""

import doctest
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mt_adapters import metrics
from mt_adapters.metrics import METRICS, DepthMetrics, EdgeMetrics, NormalsMetrics, SemsegMetrics, delta_m, get_metric

NAN = float("nan")
NUM_LABELS = 6
NUM_IMAGES = 5


def semseg_set(generator):
    label = torch.randint(NUM_LABELS - 1, (NUM_IMAGES, 6, 7), generator=generator)
    wrong = torch.rand(label.shape, generator=generator) < 0.4
    prediction = torch.where(wrong, torch.randint(NUM_LABELS - 1, label.shape, generator=generator), label)
    label[:, 0, :3] = 255
    return prediction, label


def depth_set(generator):
    label = 0.5 + 4 * torch.rand(NUM_IMAGES, 6, 7, generator=generator)
    prediction = label * (0.6 + 0.9 * torch.rand(label.shape, generator=generator))
    label[:, 0, :2] = 0
    label[1:, 1, 1] = NAN
    return prediction, label


def normals_set(generator):
    label = F.normalize(torch.randn(NUM_IMAGES, 3, 6, 7, generator=generator), dim=1)
    prediction = 3 * label + torch.randn(label.shape, generator=generator)
    label[:, :, 2, :2] = 0
    return prediction, label


def edges_set(generator):
    label = (torch.rand(NUM_IMAGES, 6, 7, generator=generator) < 0.2).float()
    prediction = 0.4 * label + 0.6 * torch.rand(label.shape, generator=generator)
    label[:, 3, 1:4] = NAN
    return prediction, label


def loop_semseg(prediction, label, absent="drop"):
    pairs = [(p, t) for p, t in zip(prediction.flatten().tolist(), label.flatten().tolist(), strict=True) if t != 255]
    ious = []
    for k in range(NUM_LABELS):
        union = sum(k in pair for pair in pairs)
        if union:
            ious.append(sum(pair == (k, k) for pair in pairs) / union)
        elif absent == "zero":
            ious.append(0.0)
    return {"miou": sum(ious) / len(ious), "pixel_accuracy": sum(p == t for p, t in pairs) / len(pairs)}


def loop_depth(prediction, label):
    images = []
    for image, truth in zip(prediction, label, strict=True):
        pairs = zip(image.flatten().tolist(), truth.flatten().tolist(), strict=True)
        images.append([(p, t) for p, t in pairs if t > 0])
    squares = [[(p - t) ** 2 for p, t in image] for image in images if image]
    pairs = [pair for image in images for pair in image]
    ratios = [max(p / t, t / p) for p, t in pairs]
    return {
        "rmse": math.sqrt(sum(map(sum, squares)) / len(pairs)),
        "rmse_image": sum(math.sqrt(sum(image) / len(image)) for image in squares) / len(squares),
        "abs_rel": sum(abs(p - t) / t for p, t in pairs) / len(pairs),
        **{f"delta{k}": sum(ratio < 1.25**k for ratio in ratios) / len(ratios) for k in (1, 2, 3)},
    }


def loop_angles(prediction, label):
    angles = []
    for p, g in zip(prediction.movedim(1, -1).reshape(-1, 3), label.movedim(1, -1).reshape(-1, 3), strict=True):
        p, g = p.tolist(), g.tolist()
        if any(g):
            cosine = sum(x * y for x, y in zip(p, g, strict=True)) / math.hypot(*p) / math.hypot(*g)
            angles.append(math.degrees(math.acos(cosine)))
    return angles


def loop_normals(prediction, label):
    angles = loop_angles(prediction, label)
    return {
        "mean_angle": sum(angles) / len(angles),
        "median_angle": float(np.median(angles)),
        "rmse_angle": math.sqrt(sum(angle**2 for angle in angles) / len(angles)),
        **{f"within_{x}": 100 * sum(angle < x for angle in angles) / len(angles) for x in (11.25, 22.5, 30)},
    }


def loop_edges(prediction, label, tolerance=1):
    def near(a, others):
        return any(max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= tolerance for b in others)

    errors, best = [], {"f": -1.0}
    for step in range(1, 20):
        num_predicted = num_matched = num_true = num_found = 0
        for image, truth in zip(prediction.numpy(), label.numpy(), strict=True):
            labelled = list(zip(*np.nonzero(~np.isnan(truth)), strict=True))
            true = [pixel for pixel in labelled if truth[pixel] >= 0.5]
            predicted = [pixel for pixel in labelled if image[pixel] >= np.float32(step / 20)]
            num_true += len(true)
            num_predicted += len(predicted)
            num_matched += sum(near(pixel, true) for pixel in predicted)
            num_found += sum(near(pixel, predicted) for pixel in true)
            if step == 1:
                errors += [abs(float(image[pixel]) - float(truth[pixel])) for pixel in labelled]
        precision = num_matched / num_predicted if num_predicted else 0.0
        recall = num_found / num_true
        f = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        if f > best["f"]:
            best = {"f": f, "threshold": step / 20, "precision": precision, "recall": recall}
    return {**best, "l1": sum(errors) / len(errors)}


loop_semseg_zero = partial(loop_semseg, absent="zero")
loop_edges_2 = partial(loop_edges, tolerance=2)

# a fresh metric, its loop, a set of images for it, the values of "no label", the allowed error
ALL = [
    pytest.param(lambda: SemsegMetrics(NUM_LABELS), loop_semseg, semseg_set, [255], 1e-12, id="semseg"),
    pytest.param(lambda: SemsegMetrics(NUM_LABELS, "zero"), loop_semseg_zero, semseg_set, [255], 1e-12, id="semseg-0"),
    pytest.param(DepthMetrics, loop_depth, depth_set, [0, NAN], 1e-7, id="depth"),
    pytest.param(NormalsMetrics, loop_normals, normals_set, [0], 0.01, id="normals"),
    pytest.param(EdgeMetrics, loop_edges, edges_set, [NAN], 1e-8, id="edges"),
    pytest.param(lambda: EdgeMetrics(2), loop_edges_2, edges_set, [NAN], 1e-8, id="edges-2"),
]
every_metric = pytest.mark.parametrize(("make", "loop", "make_set", "no_labels", "allowed"), ALL)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def results_of(metric, prediction, label):
    metric.update(prediction, label)
    return metric.compute()


def assert_same(results, expected):
    """Bit-equal, NaN included."""
    assert list(results) == list(expected)
    np.testing.assert_array_equal(list(results.values()), list(expected.values()))


@every_metric
def test_a_metric_equals_a_loop_over_labelled_pixels(make, loop, make_set, no_labels, allowed, generator):
    prediction, label = make_set(generator)
    metric = make()
    results = results_of(metric, prediction, label)
    assert results == pytest.approx(loop(prediction, label), abs=allowed)
    assert {type(value) for value in results.values()} == {float}
    assert metric.primary in results


@every_metric
def test_an_unlabelled_image_changes_nothing(make, loop, make_set, no_labels, allowed, generator):
    prediction, label = make_set(generator)
    expected = results_of(make(), prediction, label)
    for value in no_labels:
        longer = torch.cat([label, torch.full_like(label[:1], value)])
        assert_same(results_of(make(), torch.cat([prediction, prediction[:1]]), longer), expected)


@every_metric
def test_without_any_label_every_value_is_nan(make, loop, make_set, no_labels, allowed, generator):
    prediction, label = make_set(generator)
    expected = dict.fromkeys(results_of(make(), prediction, label), NAN)
    for value in no_labels:
        broken = prediction * (NAN if prediction.is_floating_point() else -1)
        assert_same(results_of(make(), broken, torch.full_like(label, value)), expected)


@every_metric
def test_two_processes_give_the_same_digits_as_one(make, loop, make_set, no_labels, allowed, generator):
    prediction, label = make_set(generator)
    whole, first, second, merged = make(), make(), make(), make()
    whole.update(prediction, label)
    for image in (0, 3):
        first.update(prediction[image : image + 1], label[image : image + 1])
    second.update(prediction[[4, 2, 1]], label[[4, 2, 1]])
    for name in whole._defaults:
        assert whole._reductions[name].__name__ == "dim_zero_sum"
        setattr(merged, name, getattr(first, name) + getattr(second, name))
        assert getattr(whole, name).dtype == torch.int64
        assert torch.equal(getattr(merged, name), getattr(whole, name))
    merged._update_count = 1
    assert_same(merged.compute(), whole.compute())


@every_metric
def test_shapes_that_would_broadcast_are_refused(make, loop, make_set, no_labels, allowed, generator):
    prediction, label = make_set(generator)
    with pytest.raises(ValueError, match="shape"):
        make().update(prediction.unsqueeze(1), label)


@pytest.mark.parametrize(("make", "make_set"), [(DepthMetrics, depth_set), (NormalsMetrics, normals_set)])
@pytest.mark.parametrize("broken", [NAN, math.inf])
def test_a_labelled_pixel_that_is_not_finite_is_refused_and_leaves_no_trace(make, make_set, broken, generator):
    prediction, label = make_set(generator)
    expected = results_of(make(), prediction, label)
    metric = make()
    spoilt = prediction.clone()
    spoilt[..., -1, -1] = broken
    with pytest.raises(ValueError, match="not finite"):
        metric.update(spoilt, label)
    assert_same(results_of(metric, prediction, label), expected)


def test_a_perfect_prediction_has_perfect_metrics(generator):
    _, label = semseg_set(generator)
    assert set(results_of(SemsegMetrics(NUM_LABELS), label.where(label != 255, 0), label).values()) == {1.0}
    _, label = depth_set(generator)
    assert list(results_of(DepthMetrics(), label.nan_to_num(), label).values()) == [0, 0, 0, 1, 1, 1]
    _, label = normals_set(generator)
    results = results_of(NormalsMetrics(), 5 * label, label)
    assert list(results.values()) == pytest.approx([0, 0, 0, 100, 100, 100], abs=0.01)
    _, label = edges_set(generator)
    assert list(results_of(EdgeMetrics(tolerance=0), label.nan_to_num(), label).values()) == [1, 0.05, 1, 1, 0]


@pytest.mark.parametrize("absent", ["drop", "zero"])
def test_thirteen_everywhere_against_twelve_everywhere_scores_zero(absent):
    label = torch.full((2, 8, 8), 12)
    assert results_of(SemsegMetrics(18, absent), label + 1, label) == {"miou": 0, "pixel_accuracy": 0}


def test_a_label_absent_from_prediction_and_truth_is_dropped_or_counts_zero():
    label = torch.tensor([[[0, 0, 1, 1]]])
    assert results_of(SemsegMetrics(4), label, label)["miou"] == 1
    assert results_of(SemsegMetrics(4, absent="zero"), label, label)["miou"] == 0.5


@pytest.mark.parametrize("absent", ["drop", "zero"])
def test_a_label_that_is_only_predicted_counts_zero_in_both_forms(absent):
    prediction = torch.tensor([[[0, 0, 0, 1]]])
    assert results_of(SemsegMetrics(2, absent), prediction, 0 * prediction)["miou"] == 0.75 / 2


@pytest.mark.parametrize(
    ("prediction", "label", "name"), [(4, 0, "prediction"), (-1, 0, "prediction"), (0, 4, "label"), (0, -1, "label")]
)
def test_an_id_out_of_range_is_refused(prediction, label, name):
    with pytest.raises(ValueError, match=f"{name} has ids .* allowed are 0 to 3"):
        SemsegMetrics(4).update(torch.full((1, 2, 2), prediction), torch.full((1, 2, 2), label))


def test_settings_without_meaning_are_refused():
    with pytest.raises(ValueError, match="'drop' or 'zero'"):
        SemsegMetrics(4, absent="skip")
    with pytest.raises(ValueError, match="num_labels is 256"):
        SemsegMetrics(256)
    with pytest.raises(ValueError, match="tolerance is -1"):
        EdgeMetrics(tolerance=-1)


def test_pooled_rmse_weighs_pixels_and_image_rmse_weighs_images():
    label = torch.tensor([[[1.0, 1, 1, 1]], [[1, 0, 0, 0]]])
    prediction = torch.tensor([[[1.0, 1, 1, 1]], [[3, 3, 3, 3]]])
    results = results_of(DepthMetrics(), prediction, label)
    assert (results["rmse"], results["rmse_image"]) == pytest.approx((math.sqrt(4 / 5), (0 + 2) / 2))


def test_delta_counts_neither_negative_nor_zero_depth_nor_the_limit_itself():
    prediction = torch.tensor([[[-1.0, 0.0, 1.2, 1.25, 1.25**2, 1.25**3]]])
    results = results_of(DepthMetrics(), prediction, torch.ones(1, 1, 6))
    assert [results[f"delta{k}"] for k in (1, 2, 3)] == [1 / 6, 2 / 6, 3 / 6]


def test_a_huge_depth_error_is_capped_and_does_not_overflow():
    results = results_of(DepthMetrics(), torch.full((1, 1, 4), 1e30), torch.ones(1, 1, 4))
    assert (results["rmse"], results["abs_rel"]) == (2**15, 2**30)


@pytest.mark.parametrize("num_pixels", [1, 2, 7, 500, 501])
def test_the_median_is_within_a_bin_of_numpy_and_the_means_are_exact(num_pixels, generator):
    label = F.normalize(torch.randn(1, 3, 1, num_pixels, generator=generator), dim=1)
    prediction = torch.randn(1, 3, 1, num_pixels, generator=generator)
    results = results_of(NormalsMetrics(), prediction, label)
    angles = loop_angles(prediction, label)
    assert results["median_angle"] == pytest.approx(np.median(angles), abs=0.01)
    assert results["mean_angle"] == pytest.approx(np.mean(angles), abs=1e-6)
    assert results["rmse_angle"] == pytest.approx(np.sqrt(np.mean(np.square(angles))), abs=1e-6)


def turned(angle):
    """The z axis turned by `angle` degrees, and the z axis: (1,3,1,1) each."""
    x, z = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    return torch.tensor([[x, 0, z], [0, 0, 1]]).view(2, 1, 3, 1, 1).unbind()


def test_angles_are_exact_near_zero_at_a_right_angle_and_at_a_half_turn():
    assert results_of(NormalsMetrics(), *turned(1e-3))["mean_angle"] == pytest.approx(1e-3, rel=1e-4)
    prediction, label = turned(0.0)
    assert results_of(NormalsMetrics(), 0 * prediction, label)["mean_angle"] == pytest.approx(90)  # no direction
    results = results_of(NormalsMetrics(), -prediction, label)
    assert results["mean_angle"] == results["rmse_angle"] == 180
    assert results["median_angle"] == pytest.approx(180, abs=0.01)


def line(column):
    edges = torch.zeros(1, 8, 9)
    edges[:, :, column] = 1
    return edges


def test_a_line_shifted_by_one_pixel_counts_with_tolerance_one_only():
    assert results_of(EdgeMetrics(tolerance=0), line(4), line(3))["f"] == 0
    assert results_of(EdgeMetrics(tolerance=1), line(4), line(3))["f"] == 1
    assert results_of(EdgeMetrics(tolerance=1), line(5), line(3))["f"] == 0
    assert results_of(EdgeMetrics(tolerance=2), line(5), line(3))["f"] == 1


def test_an_edge_predicted_where_nothing_is_labelled_finds_no_true_edge():
    label = line(3)
    label[:, :, 4:] = NAN
    prediction = line(4)
    assert results_of(EdgeMetrics(tolerance=1), prediction, label)["recall"] == 0
    prediction[:, :, 3] = 0.3
    results = results_of(EdgeMetrics(tolerance=1), prediction, label)
    assert results["f"] == 1
    assert results["l1"] == pytest.approx(8 * 0.7 / (8 * 4))


def test_precision_and_recall_belong_to_the_best_threshold():
    label = line(2)
    prediction = 0.6 * line(2) + 0.4 * line(7)
    prediction[:, 4:, 2] = 0.4
    # From 0.45 to 0.60 the true half of the line is alone; below, the line is whole and so is the false one.
    low = results_of(EdgeMetrics(tolerance=0), prediction, label)
    assert (low["threshold"], low["precision"], low["recall"]) == (0.05, 0.5, 1)
    prediction[:, :, 8] = 0.4
    high = results_of(EdgeMetrics(tolerance=0), prediction, label)
    assert (high["threshold"], high["precision"], high["recall"]) == (0.45, 1, 0.5)


def test_without_a_true_edge_f_is_undefined_and_l1_is_not():
    results = results_of(EdgeMetrics(), torch.full((1, 4, 4), 0.25), torch.zeros(1, 4, 4))
    assert list(results.values()) == pytest.approx([NAN] * 4 + [0.25], nan_ok=True)


def test_logits_given_as_edges_are_refused():
    with pytest.raises(ValueError, match="apply a sigmoid"):
        EdgeMetrics().update(torch.full((1, 4, 4), 3.0), torch.zeros(1, 4, 4))


def test_a_task_gets_the_metric_of_its_kind():
    assert list(METRICS) == ["semseg", "depth", "normals", "edges"]
    tasks = {kind: SimpleNamespace(kind=kind, num_channels=7) for kind in (*METRICS, "pose")}
    for kind, metric_class in METRICS.items():
        assert type(get_metric(tasks[kind])) is metric_class
    semseg = get_metric(tasks["semseg"], absent="zero")
    edges = get_metric(tasks["edges"], tolerance=3)
    assert (semseg.num_labels, semseg.absent, edges.tolerance) == (7, "zero", 3)
    with pytest.raises(ValueError, match="'pose'; supported"):
        get_metric(tasks["pose"])


KINDS = {"parts": "semseg", "depth": "depth", "normals": "normals", "edges": "edges"}
BASELINE = {"parts": {"miou": 0.5}, "depth": {"rmse": 0.8}, "normals": {"mean_angle": 20.0}, "edges": {"f": 0.4}}


def test_delta_m_is_the_mean_relative_gain_with_the_sign_of_each_metric():
    results = {"parts": {"miou": 0.6}, "depth": {"rmse": 0.6}, "normals": {"mean_angle": 21.0}, "edges": {"f": 0.3}}
    assert delta_m(results, BASELINE, KINDS) == pytest.approx((20 + 25 - 5 - 25) / 4)
    assert delta_m(BASELINE, BASELINE, KINDS) == 0


@pytest.mark.parametrize("value", [0.0, NAN, math.inf])
def test_delta_m_refuses_a_baseline_to_which_nothing_relates(value):
    with pytest.raises(ValueError, match=r"baseline\['depth'\]\['rmse'\]"):
        delta_m(BASELINE, {**BASELINE, "depth": {"rmse": value}}, KINDS)


def test_delta_m_refuses_missing_tasks_metrics_and_kinds():
    for results, baseline, kinds, message in [
        ({}, BASELINE, KINDS, "results has no task 'parts'"),
        (BASELINE, {}, KINDS, "baseline has no task 'parts'"),
        ({**BASELINE, "edges": {"l1": 0.1}}, BASELINE, KINDS, "has no 'f'"),
        (BASELINE, BASELINE, {"parts": "pose"}, "'pose'; supported"),
        (BASELINE, BASELINE, {}, "kinds is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            delta_m(results, baseline, kinds)


def test_the_examples_in_the_docstrings_run():
    result = doctest.testmod(metrics)
    assert result.attempted > 0
    assert result.failed == 0
