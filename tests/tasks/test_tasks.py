"""Every kind of task: codes of labels, mirror images, predictions, pictures, refusals. A new task is one row."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mt_adapters import TASKS, get_task
from mt_adapters.tasks import get_tasks
from tiny_models import make_labels

SIZE = (6, 8)
NAN = float("nan")


class Row(NamedTuple):
    spec: dict[str, Any]
    num_channels: int
    no_label: float
    logits: list[float]  # of one pixel
    prediction: list[float]
    wrong: dict[float, str]  # a value that labels may not have, and what the message says of it
    wrong_dtype: torch.dtype


ROWS = {
    "semseg": Row(
        {"name": "semseg", "num_labels": 5},
        num_channels=5,
        no_label=255,
        logits=[0.0, -1.0, 3.0, 2.0, 1.0],
        prediction=[2],
        wrong={5: r"class id 5 .* 0 \.\. 4 and 255", -1: "class id -1"},
        wrong_dtype=torch.int32,
    ),
    "depth": Row(
        {"name": "depth"},
        num_channels=1,
        no_label=0.0,
        logits=[-2.0],
        prediction=[1e-3],
        wrong={-1.5: r"depth -1\.5 m is negative; allowed are metres > 0", float("inf"): "infinite"},
        wrong_dtype=torch.int64,
    ),
    "normals": Row(
        {"name": "normals"},
        num_channels=3,
        no_label=0.0,
        logits=[3.0, 0.0, -4.0],
        prediction=[0.6, 0.0, -0.8],
        wrong={0.2: r"length 0\.34.*unit vectors", NAN: "length nan"},
        wrong_dtype=torch.uint8,
    ),
    "edges": Row(
        {"name": "edges"},
        num_channels=1,
        no_label=NAN,
        logits=[0.0],
        prediction=[0.5],
        wrong={1.5: r"edge value 1\.5 .* 0 \.\. 1, and NaN", -0.5: "edge value -0.5"},
        wrong_dtype=torch.int64,
    ),
}
kinds = pytest.mark.parametrize("kind", ROWS)


def same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.allclose(left.float(), right.float(), equal_nan=True)


def test_every_kind_has_a_row():
    assert list(ROWS) == list(TASKS)


@kinds
def test_labels_in_the_code_are_accepted_and_others_are_refused(kind):
    row, task = ROWS[kind], get_task(ROWS[kind].spec)
    label = make_labels(SIZE)[kind]
    task.check_label(label, 2, *SIZE)
    for value, message in row.wrong.items():
        wrong = label.clone()
        wrong[1, ..., 5, 3] = value
        with pytest.raises(ValueError, match=rf"labels\['{kind}'\]: .*{message}"):
            task.check_label(wrong, 2, *SIZE)
    with pytest.raises(ValueError, match=rf"labels\['{kind}'\] has the shape .* must have \(2, .*6, 8\).*resize"):
        task.check_label(label[..., :-1], 2, *SIZE)
    with pytest.raises(ValueError, match=rf"{row.wrong_dtype}; {kind} labels are (int64|floating point): use label"):
        task.check_label(label.nan_to_num(0).to(row.wrong_dtype), 2, *SIZE)


@kinds
def test_no_label_is_accepted_and_gives_no_loss_and_no_gradient(kind):
    row, task = ROWS[kind], get_task(ROWS[kind].spec)
    nothing = task.no_label(*SIZE)
    assert same(nothing, torch.full(nothing.shape, row.no_label))
    batch = torch.stack([nothing, nothing])
    task.check_label(batch, 2, *SIZE)
    logits = torch.randn(2, row.num_channels, *SIZE, requires_grad=True)
    loss = task.loss(logits, batch)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()
    assert task.loss(logits, make_labels(SIZE)[kind]) > 0


@kinds
def test_a_mirrored_label_belongs_to_the_mirrored_image(kind):
    task, label = get_task(ROWS[kind].spec), make_labels(SIZE)[kind]
    flipped = task.mirror_values(label.flip(-1))
    for column in range(SIZE[1]):
        expected = label[..., SIZE[1] - 1 - column].clone()
        if kind == "normals":
            expected[:, 0] *= -1
        assert same(flipped[..., column], expected)
    assert same(task.mirror_values(flipped.flip(-1)), label)
    assert same(task.mirror_values(label[0].flip(-1)), flipped[0])
    task.check_label(flipped, 2, *SIZE)


@kinds
def test_a_prediction_has_the_units_of_a_label(kind):
    row, task = ROWS[kind], get_task(ROWS[kind].spec)
    logits = torch.tensor(row.logits).view(1, -1, 1, 1).expand(2, -1, *SIZE)
    assert task.num_channels == row.num_channels
    prediction = task.predict(logits)
    task.check_label(prediction, 2, *SIZE)
    expected = torch.tensor(row.prediction).view(1, -1, 1, 1).expand(2, -1, *SIZE)
    assert same(prediction, expected if kind == "normals" else expected[:, 0])
    assert task.predict(logits.bfloat16()).dtype in (torch.float32, torch.int64)


@pytest.mark.parametrize("size", [SIZE, (3, 20), (13, 9)])
@pytest.mark.parametrize("num_labels", [1, 4, 5, 19])
def test_classes_at_another_size_are_those_of_the_resized_logits(num_labels, size):
    task = get_task("semseg", num_labels=num_labels)
    logits = torch.randn(2, num_labels, *SIZE).round()  # many ties
    expected = F.interpolate(logits, size=size, mode="bilinear").argmax(dim=1)
    assert torch.equal(task.predict_at(logits, size), expected)


@kinds
def test_a_prediction_at_another_size_is_one_of_the_resized_logits(kind):
    task = get_task(ROWS[kind].spec)
    logits = torch.randn(2, task.num_channels, *SIZE)
    resized = F.interpolate(logits, size=(9, 5), mode="bilinear")
    assert torch.equal(task.predict_at(logits, (9, 5)), task.predict(resized))
    assert torch.equal(task.predict_at(logits, SIZE), task.predict(logits))


@kinds
def test_a_picture_is_rgb_black_where_there_is_no_label_and_not_black_elsewhere(kind):
    task, label = get_task(ROWS[kind].spec), make_labels(SIZE)[kind]
    picture = task.colorize(label[0])
    assert picture.dtype == torch.uint8
    assert picture.shape == (*SIZE, 3)
    assert not picture[:3].any(), "the first rows have no label"
    labelled = label[0, 3:] if kind != "normals" else label[0, :, 3:]
    if kind == "edges":
        assert torch.equal(picture[3:].any(dim=-1), labelled > 0)
    else:
        assert picture[3:].any(dim=-1).all()
    assert not task.colorize(task.no_label(*SIZE)).any()


def test_classes_have_different_colors():
    task = get_task({"name": "semseg", "num_labels": 40})
    colors = task.colorize(torch.arange(40).view(1, 40))[0]
    assert len({tuple(color) for color in colors.tolist()}) == 40


def test_depth_colors_span_the_values_of_the_map_they_are_compared_with():
    task = get_task("depth")
    label = torch.tensor([[1.0, 3.0, 5.0]])
    near = task.colorize(torch.tensor([[1.0, 1.1, 1.2]]), like=label)
    assert torch.equal(near[0, 0], task.colorize(label)[0, 0])
    assert near[0, 2].sum() > task.colorize(label)[0, 1].sum()
    assert torch.equal(task.colorize(torch.tensor([[9.0]]), like=label)[0, 0], task.colorize(label)[0, 2])


@kinds
def test_a_task_and_its_dict_are_the_same(kind):
    task = get_task(ROWS[kind].spec | {"name": f"my_{kind}", "type": kind, "weight": 2.5})
    assert task.to_dict()["type"] == kind
    assert get_task(task.to_dict()) == task
    assert task.name == f"my_{kind}"
    assert task.weight == 2.5


def test_defaults_fill_only_what_a_kind_has_and_the_spec_leaves_open():
    tasks = get_tasks(["semseg", {"name": "parts", "type": "semseg", "num_labels": 7}, "depth"], num_labels=18)
    assert [task.num_channels for task in tasks] == [18, 7, 1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("reshaping", r"unknown task 'reshaping'; known are \['semseg', 'depth', 'normals', 'edges'\].*\"type\""),
        ({"name": "far", "type": "dept"}, r"unknown task 'dept'.*\"name\": 'far'"),
        ({"name": "depth", "los": "l1"}, r"'depth' has the unknown setting 'los'; a depth task has \[.*'loss_type'"),
        ({"name": "depth", "loss_type": "l2"}, r"unknown depth loss 'l2' of task 'depth'; known: \['berhu'"),
        ({"name": "edges", "loss_type": "l2"}, r"unknown edge loss 'l2' of task 'edges'; known: \['balanced_bce'"),
        ({"name": "semseg"}, "num_labels=0; a segmentation task needs 1 to 255 classes: pass num_labels"),
        ({"name": "semseg", "num_labels": 256}, "num_labels=256"),
        ({"name": "depth", "weight": -1.0}, "loss weight -1.0; a weight is a number >= 0"),
        ({"name": "depth", "weight": NAN}, "loss weight nan"),
        ({"name": "Depth.far", "type": "depth"}, "'Depth.far' cannot be the name of a task: use lower case"),
        ({"name": "keys", "type": "depth"}, "'keys' cannot be the name"),
        ({"name": "training", "type": "depth"}, "'training' cannot be the name"),
    ],
)
def test_a_wrong_spec_is_refused_with_what_is_allowed(spec, message):
    with pytest.raises(ValueError, match=message):
        get_task(spec)


def test_names_must_differ():
    with pytest.raises(ValueError, match=r"different names, got \['depth', 'depth'\]"):
        get_tasks(["depth", {"name": "depth", "loss_type": "l1"}])
    with pytest.raises(ValueError, match="at least one task"):
        get_tasks([])
