"""Each example program runs as its docstring says, and leaves what it says."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModel, SwinConfig

from mt_adapters import VtaModel
from mt_adapters.hub.card import COLUMNS, affinity_table
from programs import BACKBONE_CONFIG, EXAMPLES, NUM_VALIDATION, RECIPE, SIZE, run_program, write_recipe

TASKS = {"semseg": "semseg", "depth": "depth", "normals": "normals", "edges": "edges"}


def read_metrics(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


def colors(picture: Image.Image, box: tuple[int, int, int, int] | None = None) -> int:
    """The number of colours, of which every third row and column is looked at."""
    pixels = np.asarray(picture.convert("RGB").crop(box))[::3, ::3].astype(np.int64)
    return len(np.unique(pixels @ (1, 256, 65536)))


def test_training_leaves_the_files_that_its_docstring_names(trained: Path) -> None:
    files = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "metrics.json"} <= files
    assert {"predictions.png", "affinity.png", "README.md", "checkpoints/last/loop_state.json"} <= files
    assert {"affinity_history.json", "affinity_history.png"} <= files
    assert {"adapter/adapter_config.json", "adapter/vta_config.json", "adapter/preprocessor_config.json"} <= files
    assert {f"adapter/task_{name}.safetensors" for name in TASKS} <= files
    assert [file for file in files if file.startswith("logs/mt_adapters/") and "tfevents" in file]
    assert not [file for file in files if "partial" in file or file.endswith(".old")]


def test_the_history_of_the_affinities_ends_with_those_of_the_model(trained: Path) -> None:
    history = json.loads((trained / "affinity_history.json").read_text())
    assert [entry["step"] for entry in history] == [2, 4]
    assert [entry["num_updates"] for entry in history] == [[1] * 4, [2] * 4]
    assert all(entry["num_skipped"] == [0] * 4 for entry in history)
    metrics = read_metrics(trained)
    reported = next(entry for entry in history if entry["step"] == metrics["best_step"])
    assert metrics["affinity"] == pytest.approx(np.array(reported["affinity"]), abs=1e-6)
    assert metrics["affinity_updates"] == {
        "num_updates": dict.fromkeys(TASKS, 2),
        "num_skipped": dict.fromkeys(TASKS, 0),
    }
    assert history[0]["affinity"] != np.eye(4).tolist()
    events = EventAccumulator(str(next(trained.glob("logs/mt_adapters")))).Reload()
    logged = [event.value for event in events.Scalars("affinity/semseg_to_depth")]
    assert logged == pytest.approx([entry["affinity"][0][1] for entry in history])
    assert affinity_table(metrics["affinity"], list(TASKS)) in (trained / "README.md").read_text()


def test_metrics_json_carries_the_results_and_what_gives_them_again(trained: Path) -> None:
    metrics = read_metrics(trained)
    assert metrics["tasks"] == TASKS
    for results in (metrics["results"], metrics["input_blind"], *(entry["results"] for entry in metrics["history"])):
        assert list(results) == list(TASKS)
        assert all(math.isfinite(value) for values in results.values() for value in values.values())
    assert (metrics["steps"], [entry["step"] for entry in metrics["history"]]) == (4, [2, 4])
    best = max(metrics["history"], key=lambda entry: entry["score"])
    assert (metrics["best_step"], metrics["mean_gain"], metrics["results"]) == tuple(
        best[name] for name in ("step", "score", "results")
    )
    assert metrics["evaluation"] == f"{NUM_VALIDATION} validation images of rooms at {SIZE} x {SIZE} pixels"
    assert metrics["parameters"]["backbone"]["trainable"] == 0
    assert metrics["parameters"]["total"]["total"] == sum(
        count["total"] for group, count in metrics["parameters"].items() if group != "total"
    )
    assert np.array(metrics["affinity"]).shape == (4, 4)
    assert metrics["seconds"] > 0
    assert metrics["device"] == "1 process(es), cpu"
    assert {"torch", "transformers", "peft", "accelerate", "mt-adapters"} == set(metrics["versions"])
    arguments = metrics["arguments"]
    assert (arguments["max_steps"], arguments["adapter"], arguments["batch_size"]) == (4, "vta", 2)
    assert metrics["command"].startswith("python examples/train_multitask.py --recipe recipe.yaml")


def test_the_card_is_a_model_card_whose_figures_are_those_of_metrics_json(trained: Path) -> None:
    metrics, card = read_metrics(trained), ModelCard((trained / "README.md").read_text())
    assert card.data.library_name == "mt-adapters"
    assert card.data.license == "apache-2.0"
    assert {"mt-adapters", *TASKS} <= set(card.data.tags)
    assert card.data.base_model is None
    results_section = card.text.partition("## Results")[2].partition("## Parameters")[0]
    rows = re.findall(r"^\| (\w+) \| (.+?) \| (\S+) \| (\S+) \|$", results_section, flags=re.MULTILINE)
    found = {(task, heading): figures for task, heading, *figures in rows if task in TASKS}
    expected = {}
    for task, kind in TASKS.items():
        for metric, heading, factor, form in COLUMNS[kind]:
            expected[task, heading] = [
                format(factor * metrics[results][task][metric], form) for results in ("results", "input_blind")
            ]
    assert found == expected
    assert f"Mean gain over input-blind: {metrics['mean_gain']:.1f} %" in card.text
    assert f"{metrics['parameters']['adapters']['total']:,}" in card.text
    assert "A frozen swin backbone with task-conditioned adapters" in card.text
    assert "import mt_adapters" in card.text
    assert json.loads(card.text.split("```json\n")[1].split("```")[0]) == metrics["arguments"]


def test_what_is_published_names_no_folder(trained: Path, recipe: Path) -> None:
    arguments = read_metrics(trained)["arguments"]
    assert "/" not in arguments["data_dir"]
    assert "/" not in arguments["backbone"]
    for name in ("README.md", "metrics.json"):
        text = (trained / name).read_text()
        folders = {str(folder) for path in (trained, recipe) for folder in path.parents if len(folder.parts) > 1}
        assert not [folder for folder in folders if folder in text]
        assert not re.findall(r"(?<=[\s\"'=])/[\w.-]+", text)


def test_the_pictures_open_and_are_not_blank(trained: Path) -> None:
    with Image.open(trained / "predictions.png") as picture:
        assert picture.width > 500
        assert picture.height > 500
        # Every cell of 5 columns (image, 4 tasks) and 8 rows shows something, save the empty one under each image.
        for row in range(8):
            for column in range(5):
                box = (
                    (column * picture.width + picture.width // 5) // 5,
                    row * picture.height // 8,
                    (column + 1) * picture.width // 5,
                    (row + 1) * picture.height // 8,
                )
                assert column == 0 and row % 2 or colors(picture, box) > 1, (row, column)
        assert colors(picture) > 1000
    with Image.open(trained / "affinity.png") as picture:
        assert colors(picture) > 10


def test_the_training_prints_parameters_and_results(trained: Path) -> None:
    printed, metrics = (trained / "printed.txt").read_text(), read_metrics(trained)
    assert f"| adapters | {metrics['parameters']['adapters']['total']:,} |" in printed
    assert f"| {metrics['results']['depth']['rmse']:.3f} | {metrics['input_blind']['depth']['rmse']:.3f} |" in printed
    assert str(trained / "predictions.png") in printed


def test_predictions_have_the_size_of_the_photo_also_of_one_that_lies_on_its_side(
    tmp_path: Path, trained: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    output = tmp_path / "maps"
    photos = [tmp_path / name for name in ("wide.png", "turned.jpg", "grey.png")]
    printed = run_program("predict.py", *photos, "--model", trained, "--output_dir", output)
    for stem, size in (("wide", (90, 70)), ("turned", (70, 90)), ("grey", (90, 70))):
        for task in TASKS:
            with Image.open(output / f"{stem}_{task}.png") as picture:
                assert picture.size == size
                assert picture.mode == "RGB"
            assert str(output / f"{stem}_{task}.png") in printed
    assert len(list(output.iterdir())) == 12
    with Image.open(output / "wide_depth.png") as depth:
        assert colors(depth) > 10


@pytest.mark.parametrize(
    ("options", "peft_type"),
    [
        (("--adapter", "none"), None),
        (("--adapter", "none", "--decoder", "linear"), None),
        (("--adapter", "lora"), "LORA"),
        (("--trackers", "none", "--mixed_precision", "bf16", "--tasks", "depth"), "VTA"),
    ],
    ids=["no adapter", "linear probe", "LoRA", "bf16 and one task"],
)
def test_baselines_and_options_run_through_the_program(
    tmp_path: Path, recipe: Path, options: tuple[str, ...], peft_type: str | None
) -> None:
    run_program("train_multitask.py", "--recipe", recipe, "--output_dir", tmp_path, "--max_steps", 2, *options)
    metrics = read_metrics(tmp_path)
    assert (metrics["steps"], metrics["parameters"]["backbone"]["trainable"]) == (2, 0)
    assert (metrics["affinity"] is not None) == (tmp_path / "affinity.png").exists() == (peft_type == "VTA")
    assert (tmp_path / "adapter").exists() == (peft_type is not None)
    if peft_type is not None:
        assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["peft_type"] == peft_type
        adapted, loaded = VtaModel.from_adapter(tmp_path / "adapter"), VtaModel.from_pretrained(tmp_path)
        for (name, found), expected in zip(adapted.state_dict().items(), loaded.state_dict().values(), strict=True):
            assert torch.equal(found, expected), name
    assert not (tmp_path / "logs").exists()
    card = (tmp_path / "README.md").read_text()
    assert {None: "with no adapters", "LORA": "with LoRA adapters", "VTA": "task-conditioned"}[peft_type] in card


def test_the_backbone_can_be_trained_from_random_weights(tmp_path: Path, rooms_folder: Path) -> None:
    settings = {"backbone_config": BACKBONE_CONFIG, "train_backbone": True, "data_dir": str(rooms_folder)}
    recipe = write_recipe(tmp_path, **RECIPE | settings)
    output = tmp_path / "output"
    run_program("train_multitask.py", "--recipe", recipe, "--output_dir", output, "--max_steps", 2)
    metrics = read_metrics(output)
    assert metrics["parameters"]["backbone"]["trainable"] == metrics["parameters"]["backbone"]["total"] > 0
    assert not (output / "adapter").exists()
    assert "A trained swin backbone" in (output / "README.md").read_text()
    assert "base_model" not in (output / "README.md").read_text()
    assert load_file(output / "model.safetensors")


def test_an_adapter_is_trained_on_another_backbone_and_compared_with_one_from_scratch(
    tmp_path: Path, trained: Path, recipe: Path
) -> None:
    other, output = tmp_path / "other", tmp_path / "attached"
    AutoModel.from_config(SwinConfig(**BACKBONE_CONFIG | {"depths": [1, 1, 2, 2]})).save_pretrained(other)
    options = ("--recipe", recipe, "--backbone", other, "--max_steps", 4, "--output_dir", output)
    printed = run_program("attach_to_backbone.py", trained / "adapter", *options)
    assert re.search(r"\d+ tensors carried over, \d+ start anew", printed)
    record = json.loads((output / "attached.json").read_text())
    assert str(record["report"]["missing_keys"][0]) in printed
    assert {name: len(losses) for name, losses in record["losses"].items()} == {"attached": 4, "from scratch": 4}
    assert record["losses"]["attached"] != record["losses"]["from scratch"]
    assert set(record["results"]["attached"]) == set(TASKS)
    assert printed.count("| semseg | mIoU |") == 1
    assert re.findall(r"\n\| (\d) \| \d", printed) == ["1", "2", "3", "4"]
    model = VtaModel.from_adapter(output / "adapter")
    assert model.config.backbone_name_or_path == str(other)


def fails(name: str, *arguments: object) -> str:
    with pytest.raises(AssertionError) as error:
        run_program(name, *arguments)
    return str(error.value)


def test_a_missing_data_folder_is_named(tmp_path: Path, recipe: Path) -> None:
    options = ("--recipe", recipe, "--output_dir", tmp_path / "out", "--data_dir", tmp_path / "nowhere")
    assert re.search(r"ValueError: There is no train.parquet in .*nowhere", fails("train_multitask.py", *options))


def test_two_backbones_at_once_are_refused(tmp_path: Path, rooms_folder: Path, backbone_folder: Path) -> None:
    recipe = write_recipe(tmp_path, **RECIPE, backbone_config=BACKBONE_CONFIG, data_dir=str(rooms_folder))
    options = ("--recipe", recipe, "--output_dir", tmp_path / "out", "--backbone", backbone_folder)
    assert re.search(
        r"ValueError: backbone is .* and backbone_config .*; give one", fails("train_multitask.py", *options)
    )


@pytest.mark.parametrize("program", ["predict.py", "attach_to_backbone.py", "export_onnx.py"])
def test_a_program_explains_itself_with_its_docstring(program: str) -> None:
    docstring = (EXAMPLES / program).read_text().split('"""')[1]
    assert docstring.strip() in run_program(program, "--help")


def test_the_training_program_explains_its_settings() -> None:
    printed = run_program("train_multitask.py", "--help")
    assert "--learning_rate" in printed
    assert "Side of the training crops in pixels." in " ".join(printed.split())
