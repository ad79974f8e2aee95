"""The training program runs on every data set: three steps on its true layout, by changing only the recipe."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from layouts.cityscapes import write_cityscapes
from layouts.nyuv2 import write_nyuv2_folders, write_nyuv2_mat
from layouts.omnidata import write_omnidata
from layouts.pascal_context import write_pascal_context
from layouts.synthia import write_synthia
from layouts.taskonomy import write_taskonomy
from layouts.vkitti2 import write_vkitti2
from mt_adapters.data import DATASETS, get_dataset
from mt_adapters.tasks import get_task
from programs import RECIPE, SIZE, run_program, write_recipe


class Row(NamedTuple):
    dataset: str
    write: Callable[[Path], Any]
    tasks: list[str | dict[str, str]]
    options: dict[str, Any] = {}


ALL_FOUR: list[str | dict[str, str]] = ["semseg", "depth", "normals", "edges"]
DERIVED = {"derive": ["normals", "edges"]}
ROWS = {
    "cityscapes": Row("cityscapes", write_cityscapes, ALL_FOUR, DERIVED),
    "cityscapes, 8 classes": Row("cityscapes", write_cityscapes, ["semseg", "depth"], {"num_classes": 8}),
    "nyuv2": Row("nyuv2", write_nyuv2_mat, ALL_FOUR, DERIVED),
    "nyuv2, 13 classes": Row("nyuv2", write_nyuv2_mat, ["semseg", "depth"], {"num_classes": 13}),
    "nyuv2, folders": Row("nyuv2", write_nyuv2_folders, ALL_FOUR),
    "omnidata, replica": Row("omnidata", write_omnidata, ALL_FOUR, {"component": "replica"}),
    "omnidata, hypersim": Row(
        "omnidata", partial(write_omnidata, component="hypersim"), ALL_FOUR, {"component": "hypersim"}
    ),
    "pascal_context": Row(
        "pascal_context",
        write_pascal_context,
        [
            "semseg",
            "normals",
            "edges",
            {"name": "parts", "type": "semseg"},
            {"name": "saliency", "type": "semseg"},
        ],
    ),
    "synthia": Row("synthia", write_synthia, ALL_FOUR, DERIVED),
    "taskonomy": Row("taskonomy", write_taskonomy, ALL_FOUR),
    "vkitti2": Row("vkitti2", write_vkitti2, ALL_FOUR, DERIVED),
}
# Of our own making, with tests of their own.
OWN = {"rooms", "prepared"}


def test_the_table_has_every_data_set() -> None:
    assert {row.dataset for row in ROWS.values()} == set(DATASETS) - OWN


@pytest.mark.parametrize("name", ROWS)
def test_a_set_says_what_it_is_and_every_label_keeps_the_tasks_rules(tmp_path: Path, name: str) -> None:
    row = ROWS[name]
    row.write(tmp_path)
    for split in ("train", "validation"):
        dataset = get_dataset(row.dataset)(split, tmp_path, **row.options)
        assert dataset.set_name == row.dataset
        assert len(dataset.summary) > 40
        assert "icen" in dataset.summary
        for index in range(len(dataset)):
            sample = dataset[index]
            height, width = sample["image"].shape[-2:]
            for label, value in sample["labels"].items():
                classes = dataset.labels[label]
                kind = label if classes is None else "semseg"
                task = get_task({"name": label, "type": kind}, num_labels=len(classes or "?"))
                task.check_label(value[None], 1, height, width)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_three_steps_by_changing_only_the_recipe(tmp_path: Path, backbone_folder: Path, name: str) -> None:
    row, folder = ROWS[name], tmp_path / "data"
    folder.mkdir()
    row.write(folder)
    settings = {"dataset": row.dataset, "data_dir": str(folder), "dataset_options": row.options, "tasks": row.tasks}
    recipe = write_recipe(tmp_path, **RECIPE | settings | {"backbone": str(backbone_folder)})
    output = tmp_path / "output"
    run_program("train_multitask.py", "--recipe", recipe, "--max_steps", 3, "--output_dir", output)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["steps"] == 3
    dataset = get_dataset(row.dataset)("validation", folder, **row.options)
    assert metrics["evaluation"] == f"{len(dataset)} validation images of {row.dataset} at {SIZE} x {SIZE} pixels"
    assert metrics["datasets"] == {row.dataset: dataset.summary}
    for task in metrics["heads"]:
        labels = dataset.labels[task["name"]]
        assert task.get("num_labels") == (None if labels is None else len(labels))
    assert all(metrics["results"][task["name"]] for task in metrics["heads"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cityscapes", "nyuv2", "vkitti2"])
def test_a_set_is_prepared_with_its_labels(tmp_path: Path, name: str) -> None:
    row, folder, output = ROWS[name], tmp_path / "data", tmp_path / "prepared"
    folder.mkdir()
    row.write(folder)
    options = [f"{key}={','.join(value)}" for key, value in row.options.items()]
    run_program("prepare_data.py", row.dataset, folder, output, "--jobs", 1, "--options", *options)
    raw = get_dataset(row.dataset)("train", folder, **row.options)
    prepared = get_dataset("prepared")("train", output)
    assert (len(prepared), prepared.labels, prepared.set_name) == (len(raw), raw.labels, row.dataset)
    samples = {raw.name(index): raw[index] for index in range(len(raw))}
    for index in range(len(prepared)):
        labels, expected = prepared[index]["labels"], samples[prepared.name(index)]["labels"]
        assert labels.keys() == expected.keys()
        assert (labels["semseg"] == expected["semseg"]).all()
        assert ((labels["depth"] - expected["depth"]).abs() <= raw.depth_unit / 2 + 1e-6).all()
