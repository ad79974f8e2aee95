"""The training program on several data sets at once, on prepared data, and on damaged files."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import ModelCard

from layouts.cityscapes import write_cityscapes
from layouts.vkitti2 import write_vkitti2
from programs import NUM_TRAIN, NUM_VALIDATION, RECIPE, SIZE, run_program, write_recipe

THREE_STEPS = ("--max_steps", 3, "--checkpoint_steps", 3)


def read_metrics(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def prepared_rooms(tmp_path_factory: pytest.TempPathFactory, rooms_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("prepared_rooms")
    printed = run_program("prepare_data.py", "rooms", rooms_folder, folder, "--jobs", 1, "--frames_per_shard", 4)
    assert f"train: {NUM_TRAIN} frames, 0 skipped" in printed
    assert "depth: 100.0% of the frames" in printed
    assert f"{NUM_VALIDATION} frames" in printed
    return folder


def test_prepared_data_give_the_results_of_the_data_they_were_prepared_from(
    tmp_path: Path, recipe: Path, prepared_rooms: Path, rooms_folder: Path
) -> None:
    results = []
    for name, options in (("raw", ()), ("prepared", ("--dataset", "prepared", "--data_dir", prepared_rooms))):
        run_program("train_multitask.py", "--recipe", recipe, *THREE_STEPS, "--output_dir", tmp_path / name, *options)
        results.append(read_metrics(tmp_path / name))
    raw, prepared = results
    assert (
        prepared["evaluation"] == raw["evaluation"] == f"{NUM_VALIDATION} validation images of rooms at 64 x 64 pixels"
    )
    assert prepared["datasets"] == raw["datasets"]
    # Normals are stored anew in 8 bits; everything else is the same, and so is what does not learn.
    for task, metric in (("semseg", "pixel_accuracy"), ("depth", "rmse"), ("edges", "f")):
        assert prepared["input_blind"][task][metric] == raw["input_blind"][task][metric]
    assert prepared["input_blind"]["normals"]["mean_angle"] == pytest.approx(
        raw["input_blind"]["normals"]["mean_angle"], abs=0.1
    )


def test_sources_with_other_tasks_and_weights_train_one_model(
    tmp_path: Path, prepared_rooms: Path, rooms_folder: Path, backbone_folder: Path
) -> None:
    """Classes, depth and normals from one source; classes of another task, and edges, from the other."""
    settings = {
        "backbone": str(backbone_folder),
        "tasks": ["semseg", "depth", "normals", "edges", {"name": "other_classes", "type": "semseg"}],
        "sources": [
            {
                "dataset": "rooms",
                "data_dir": str(rooms_folder),
                "weight": 3,
                "labels": {"edges": None, "other_classes": None},
            },
            {
                "dataset": "prepared",
                "data_dir": str(prepared_rooms),
                "weight": 1,
                "labels": {"other_classes": "semseg", "semseg": None, "depth": None, "normals": None},
                "evaluate": False,
            },
        ],
    }
    recipe = write_recipe(tmp_path, **RECIPE | settings)
    output = tmp_path / "output"
    run_program("train_multitask.py", "--recipe", recipe, *THREE_STEPS, "--output_dir", output)
    metrics = read_metrics(output)
    assert [head.get("num_labels") for head in metrics["heads"]] == [18, None, None, None, 18]
    assert [source["data_dir"] for source in metrics["arguments"]["sources"]] == [
        rooms_folder.name,
        prepared_rooms.name,
    ]
    assert metrics["evaluation"] == f"{NUM_VALIDATION} validation images of rooms at {SIZE} x {SIZE} pixels"
    # The evaluated source has no edges and none of the other classes.
    assert metrics["results"]["depth"]["rmse"] > 0
    assert metrics["results"]["edges"]["l1"] != metrics["results"]["edges"]["l1"]
    card = (output / "README.md").read_text()
    assert "Trained and evaluated on rooms: path-traced" in card
    assert "| edges | L1 | nan |" in card


def test_a_card_names_every_set_that_was_trained_on_and_evaluates_those_that_are_to_be(
    tmp_path: Path, backbone_folder: Path
) -> None:
    sources = []
    for name, write in (("vkitti2", write_vkitti2), ("cityscapes", write_cityscapes)):
        folder = tmp_path / name
        folder.mkdir()
        write(folder)
        options = {"num_classes": 8}
        sources.append({"dataset": name, "data_dir": str(folder), "options": options, "evaluate": name == "vkitti2"})
    settings = {"backbone": str(backbone_folder), "tasks": ["semseg", "depth"], "sources": sources}
    output = tmp_path / "output"
    recipe = write_recipe(tmp_path, **RECIPE | settings)
    run_program("train_multitask.py", "--recipe", recipe, *THREE_STEPS, "--output_dir", output)
    metrics, card = read_metrics(output), (output / "README.md").read_text()
    assert list(metrics["datasets"]) == ["vkitti2", "cityscapes"]
    assert metrics["evaluated_on"] == ["vkitti2"]
    assert "validation images of vkitti2 at" in metrics["evaluation"]
    assert "Evaluated on vkitti2; trained on Virtual KITTI 2" in card
    assert "Cityscapes (fine labels" in card
    assert {result.dataset_type for result in ModelCard(card).data.eval_results} == {"vkitti2"}


@pytest.fixture
def damaged_rooms(tmp_path: Path, rooms_folder: Path) -> Path:
    """Frame 2 of 9 has a depth that was cut off."""
    folder = tmp_path / "damaged"
    shutil.copytree(rooms_folder, folder)
    table = pyarrow.parquet.read_table(folder / "train.parquet")
    rows = table.to_pylist()
    rows[2]["depth"]["bytes"] = rows[2]["depth"]["bytes"][:200]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, table.schema), folder / "train.parquet")
    return folder


def test_a_damaged_frame_stops_a_training_and_is_named(tmp_path: Path, recipe: Path, damaged_rooms: Path) -> None:
    options = ("--recipe", recipe, *THREE_STEPS, "--output_dir", tmp_path / "output", "--data_dir", damaged_rooms)
    printed = run_program("train_multitask.py", *options, exit_status=1)
    assert "rooms, frame 2: train.parquet, row 2, column 'depth': the picture is damaged" in printed


def test_damaged_frames_are_skipped_counted_and_named_and_too_many_stop_the_training(
    tmp_path: Path, recipe: Path, damaged_rooms: Path
) -> None:
    steps = ("--max_steps", 9, "--checkpoint_steps", 9, "--on_bad_sample", "skip")
    options = ("--recipe", recipe, *steps, "--data_dir", damaged_rooms)
    output = tmp_path / "output"
    printed = run_program("train_multitask.py", *options, "--max_bad_share", 0.2, "--output_dir", output)
    assert printed.count("skipped a bad frame: rooms, frame 2: train.parquet, row 2, column 'depth'") == 1
    # Two epochs of nine frames.
    assert read_metrics(output)["bad_samples"] == {"num_drawn": 18, "num_bad": 2}
    assert "bad_samples" not in (output / "README.md").read_text()
    printed = run_program(
        "train_multitask.py", *options, "--max_bad_share", 0.1, "--output_dir", tmp_path / "stopped", exit_status=1
    )
    assert re.search(
        r"2 of the 1\d frames drawn were bad, more than max_bad_share=0\.1\. One is rooms, frame 2", printed
    )
