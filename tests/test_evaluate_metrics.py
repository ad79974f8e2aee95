"""The scripts for the library `evaluate`: loaded by path, they give the digits of our metrics and store no maps."""

import inspect
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from torch import Tensor

from mt_adapters import evaluate_metrics
from mt_adapters.metrics import METRICS
from mt_adapters.tasks import TASKS

NAN = float("nan")
NO_LABEL = {"semseg": 255, "depth": NAN, "normals": 0, "edges": NAN}
SETTINGS = {"semseg": {"num_labels": 18}, "depth": {}, "normals": {}, "edges": {}}
every_kind = pytest.mark.parametrize("kind", SETTINGS)
every_setting = pytest.mark.parametrize(
    ("kind", "settings"),
    [*SETTINGS.items(), ("semseg", {"num_labels": 18, "absent": "zero"}), ("edges", {"tolerance": 2})],
)


def load(kind: str, **settings: object) -> evaluate.Metric:
    return evaluate.load(evaluate_metrics.path(kind), **settings)


def maps(kind: str, batch: int, height: int = 6, width: int = 7) -> tuple[Tensor, Tensor]:
    """Predictions and references, the first row of the references without a label."""
    if kind == "semseg":
        label = torch.randint(13, 17, (batch, height, width))  # large ids, whose pairs overflow uint8; some are absent
        prediction = torch.where(torch.rand(label.shape) < 0.4, 13, label)
    elif kind == "depth":
        label = 0.5 + 4 * torch.rand(batch, height, width)
        prediction = label * (0.6 + 0.9 * torch.rand(label.shape))
    elif kind == "normals":
        label = torch.randn(batch, 3, height, width)
        prediction = 3 * label + torch.randn(label.shape)
    else:
        label = (torch.rand(batch, height, width) < 0.2).float()
        prediction = 0.4 * label + 0.6 * torch.rand(label.shape)
    label[..., 0, :] = NO_LABEL[kind]
    return prediction, label


def ours(kind: str, settings: dict, *batches: tuple[Tensor, Tensor]) -> dict[str, float]:
    metric = METRICS[kind](**settings)
    for prediction, label in batches:
        metric.update(prediction, label)
    return metric.compute()


def assert_same(results: dict[str, float], expected: dict[str, float]) -> None:
    """Bit-equal, NaN included."""
    assert list(results) == list(expected)
    np.testing.assert_array_equal(list(results.values()), list(expected.values()))


def load_two(kind: str, folder: Path, *settings: dict) -> list[evaluate.Metric]:
    settings = settings or (SETTINGS[kind], SETTINGS[kind])
    shared = {"num_process": 2, "experiment_id": "two", "cache_dir": str(folder), "timeout": 20}
    return [load(kind, process_id=process_id, **shared, **settings[process_id]) for process_id in range(2)]


def compute_both(metrics: list[evaluate.Metric]) -> list[dict[str, float] | None]:
    """The results in two processes; threads here, because the files that `evaluate` locks keep threads apart, too."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda metric: metric.compute(), metrics))


@every_setting
@pytest.mark.filterwarnings("error::UserWarning")
def test_a_batch_gives_the_digits_of_our_metric(kind, settings):
    prediction, label = maps(kind, 3)
    expected = ours(kind, settings, (prediction, label))
    assert not any(np.isnan(list(expected.values())))
    metric = load(kind, **settings)
    assert_same(metric.compute(predictions=prediction, references=label), expected)
    assert_same(metric.compute(predictions=prediction.numpy(), references=label.numpy()), expected)
    assert_same(metric.compute(predictions=prediction.tolist(), references=label.tolist()), expected)
    assert_same(metric.compute(predictions=[*prediction], references=[*label.numpy()]), expected)


@pytest.mark.parametrize(("kind", "other"), [("semseg", {"absent": "zero"}), ("edges", {"tolerance": 0})])
def test_a_setting_changes_the_result(kind, other):
    prediction, label = maps(kind, 3)
    results = [
        load(kind, **SETTINGS[kind] | extra).compute(predictions=prediction, references=label) for extra in ({}, other)
    ]
    assert results[0] != results[1]


@every_kind
def test_batches_and_images_of_other_sizes_add_up(kind):
    batches = [maps(kind, 2), maps(kind, 1, 9, 4), maps(kind, 3, 4, 5), maps(kind, 1, 5, 8)]
    metric = load(kind, **SETTINGS[kind])
    for prediction, label in batches:
        if len(label) == 1:
            metric.add(prediction=prediction[0], reference=label[0].numpy())
        else:
            metric.add_batch(predictions=prediction, references=label)
    assert_same(metric.compute(), ours(kind, SETTINGS[kind], *batches))


@every_kind
def test_after_compute_a_metric_starts_anew(kind):
    metric = load(kind, **SETTINGS[kind])
    for batch in (maps(kind, 2), maps(kind, 1)):
        metric.add_batch(predictions=batch[0], references=batch[1])
        assert_same(metric.compute(), ours(kind, SETTINGS[kind], batch))
    with pytest.raises(ValueError, match="nothing was added"):
        metric.compute()


@every_kind
def test_without_any_label_every_value_is_nan(kind):
    prediction, label = maps(kind, 2)
    results = load(kind, **SETTINGS[kind]).compute(
        predictions=prediction, references=torch.full_like(label, NO_LABEL[kind])
    )
    assert_same(results, dict.fromkeys(ours(kind, SETTINGS[kind], (prediction, label)), NAN))


def test_without_a_true_edge_only_l1_is_a_number():
    prediction, label = torch.full((1, 4, 4), 0.25), torch.zeros(1, 4, 4)
    results = load("edges").compute(predictions=prediction, references=label)
    assert_same(results, {"f": NAN, "threshold": NAN, "precision": NAN, "recall": NAN, "l1": 0.25})


def test_ids_of_eight_bits_do_not_overflow():
    prediction, label = maps("semseg", 2)
    results = load("semseg", num_labels=18).compute(
        predictions=prediction.to(torch.uint8), references=label.numpy().astype(np.uint8)
    )
    assert_same(results, ours("semseg", {"num_labels": 18}, (prediction, label)))


@every_kind
def test_two_processes_give_the_digits_of_one_time_after_time(kind, tmp_path):
    metrics = load_two(kind, tmp_path)
    for num_first in (1, 3):  # the second time the second process has nothing to add
        batches = [maps(kind, 2), maps(kind, 1), maps(kind, 2, 4, 9)]
        for index, (prediction, label) in enumerate(batches):
            metrics[index >= num_first].add_batch(predictions=prediction, references=label)
        results, none = compute_both(metrics)
        assert_same(results, ours(kind, SETTINGS[kind], *batches))
        assert none is None


def test_processes_with_different_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not in step.*'tolerance': 1.*'tolerance': 2"):
        compute_both(load_two("edges", tmp_path, {}, {"tolerance": 2}))


def test_a_process_that_is_ahead_is_refused(tmp_path):
    metrics = load_two("depth", tmp_path)
    compute_both(metrics)
    with pytest.raises(ValueError, match="not in step.*'compute': 0.*'compute': 1"):
        compute_both([metrics[0], load_two("depth", tmp_path)[1]])


def test_the_processes_of_torch_distributed_are_not_added_up_once_more(monkeypatch):
    batch = maps("depth", 1)
    expected = ours("depth", {}, batch)
    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    with pytest.raises((RuntimeError, ValueError), match="process group"):
        ours("depth", {}, batch)
    assert_same(load("depth").compute(predictions=batch[0], references=batch[1]), expected)


@every_kind
def test_what_is_stored_depends_neither_on_the_size_nor_on_the_number_of_maps(kind, tmp_path, monkeypatch):
    sizes = []
    remove = os.remove

    def weigh_and_remove(path):
        sizes.append(os.path.getsize(path))
        remove(path)

    monkeypatch.setattr("evaluate.module.os.remove", weigh_and_remove)
    for batch, side, num_calls in ((1, 4, 1), (2, 64, 5)):
        metric = load(kind, cache_dir=str(tmp_path), **SETTINGS[kind])
        for _ in range(num_calls):
            prediction, label = maps(kind, batch, side, side)
            metric.add_batch(predictions=prediction, references=label)
        metric.compute()
    assert len(sizes) == 2
    assert sizes[0] == sizes[1] > 0
    # One row of int64 sums, in a file whose frame takes a few kB.
    num_sums = sum(state.numel() for state in METRICS[kind](**SETTINGS[kind]).metric_state.values())
    assert sizes[0] <= 8 * num_sums + 4096


def test_sums_may_stay_in_memory():
    batch = maps("depth", 2)
    metric = load("depth", keep_in_memory=True)
    assert_same(metric.compute(predictions=batch[0], references=batch[1]), ours("depth", {}, batch))


def test_metrics_can_be_combined():
    combined = evaluate.combine({"near": load("edges"), "far": load("edges", tolerance=2)}, force_prefix=True)
    prediction, label = maps("edges", 1)
    combined.add(prediction=prediction[0], reference=label[0])
    combined.add_batch(predictions=prediction, references=label)
    results = combined.compute()
    twice = [(prediction, label)] * 2
    assert results["near_f"] == ours("edges", {}, *twice)["f"]
    assert results["far_f"] == ours("edges", {"tolerance": 2}, *twice)["f"]


def test_what_is_written_lies_in_the_home_folder_of_hugging_face():
    home = Path(os.environ["HF_HOME"])
    metric = load("depth")
    assert home in Path(metric.data_dir).parents
    assert home in Path(inspect.getfile(type(metric))).parents


@every_setting
def test_the_usage_names_every_setting_and_result(kind, settings):
    metric = load(kind, **settings)
    assert metric.description == inspect.cleandoc(type(metric).__doc__).splitlines()[0]
    for name in [*settings, *ours(kind, settings, maps(kind, 1))]:
        assert name in metric.inputs_description
    assert metric.inputs_description in metric.compute.__doc__


def test_path_names_a_script_for_every_kind():
    for kind in TASKS:
        assert Path(evaluate_metrics.path(kind)).is_file()
    with pytest.raises(ValueError, match=r"'base'; known are \['semseg', 'depth', 'normals', 'edges'\]"):
        evaluate_metrics.path("base")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("semseg", {}, "pass num_labels="),
        ("semseg", {"num_labels": 256}, "num_labels=256"),
        ("semseg", {"num_labels": 2, "absent": "skip"}, "'drop' or 'zero'"),
        ("semseg", {"num_classes": 2}, r"'num_classes'; the metric of semseg has \['num_labels', 'absent'\]"),
        ("depth", {"num_labels": 2}, r"'num_labels'; the metric of depth has \[\]"),
        ("edges", {"tolerance": -1}, "tolerance is -1"),
    ],
)
def test_settings_without_meaning_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        load(kind, **settings)


@pytest.mark.parametrize(
    ("kind", "predictions", "references", "message"),
    [
        ("depth", np.ones((1, 2, 3)), np.ones((1, 3, 2)), "they must be equal"),
        ("depth", np.ones((2, 3)), np.ones((2, 3)), r"\(2, 3\), but that of depth is \(B,H,W\): .*\(H,W\) to add"),
        ("depth", np.ones((1, 1, 2, 3)), np.ones((1, 1, 2, 3)), r"\(1, 1, 2, 3\), but that of depth is \(B,H,W\)"),
        ("normals", np.ones((2, 4, 4, 3)), np.ones((2, 4, 4, 3)), r"\(2, 4, 4, 3\), but .* is \(B,3,H,W\)"),
        ("normals", np.ones((3, 4, 4)), np.ones((3, 4, 4)), r"one image \(3,H,W\) to add"),
        (
            "semseg",
            np.zeros((1, 2, 2)),
            np.zeros((1, 2, 2), int),
            "predictions are torch.float64; .* argmax of logits",
        ),
        ("depth", np.ones((1, 2, 2)), None, "references are missing"),
        ("depth", [np.ones((2, 2)), np.ones((3, 2))], np.ones((2, 2, 2)), "different sizes to add"),
        ("depth", [[["near"]]], np.ones((1, 1, 1)), "no batch of numbers"),
        ("edges", np.full((1, 2, 2), 3.0), np.zeros((1, 2, 2)), "apply a sigmoid"),
    ],
)
def test_wrong_inputs_are_refused_and_leave_no_trace(kind, predictions, references, message):
    metric = load(kind, **SETTINGS[kind])
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references)
    batch = maps(kind, 1)
    assert_same(metric.compute(predictions=batch[0], references=batch[1]), ours(kind, SETTINGS[kind], batch))


def test_an_image_of_one_dimension_more_is_refused():
    with pytest.raises(ValueError, match=r"one image \(H,W\) to add"):
        load("depth").add(prediction=np.ones((1, 2, 3)), reference=np.ones((1, 2, 3)))
