"""The command line does what its help says, and names what went wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from hub_server import HubServer
from mt_adapters import TASKS, VtaModel
from mt_adapters.backbones import FAMILIES
from mt_adapters.data.rooms import SAMPLE_DIR
from mt_adapters.hub.card import metrics_table, parameter_table
from mt_adapters_cli import distinct_names, main
from programs import COMMAND_LINE, NUM_VALIDATION, SIZE, run_program


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Runs the command line in this process and returns its exit status."""
    monkeypatch.setattr(sys, "argv", [COMMAND_LINE, *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """18 photos in two folders, a truncated one, and a text under the name of a photo."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    column = pyarrow.parquet.read_table(SAMPLE_DIR / "validation.parquet", columns=["image"])["image"]
    images = [column[row].as_py()["bytes"] for row in range(19)]
    for number, image in enumerate(images[:18]):
        (folder / ("more" if number % 5 == 0 else "") / f"photo_{number:02d}.jpg").write_bytes(image)
    (folder / "cut.jpg").write_bytes(images[18][:900])
    (folder / "text.jpg").write_text("not a photo")
    (folder / "notes.txt").write_text("not meant to be a photo")
    return folder


def test_predicting_a_folder_does_what_can_be_read_and_names_the_rest(monkeypatch, capsys, trained, photos, tmp_path):
    output = tmp_path / "maps"
    assert call(monkeypatch, "predict", photos, "--model", trained, "--output-dir", output) == 1
    printed = capsys.readouterr()
    problems = [line for line in printed.err.splitlines() if "cannot read the picture" in line]
    assert len(problems) == 2
    assert "cut.jpg" in problems[0]
    assert "text.jpg" in problems[1]
    assert "18 of 20 pictures predicted" in printed.err
    files = sorted(path.name for path in output.iterdir())
    names = [f"photo_{number:02d}" for number in range(18)]
    assert files == sorted(
        [f"{name}_{task}.png" for name in names for task in TASKS] + [f"{name}.npz" for name in names]
    )
    assert len(printed.out.splitlines()) == len(files)

    arrays = np.load(output / "photo_03.npz", allow_pickle=False)
    shapes = {task: (array.shape, str(array.dtype)) for task, array in arrays.items()}
    size = (128, 128)
    assert shapes == {
        "semseg": (size, "int64"),
        "depth": (size, "float32"),
        "normals": ((3, *size), "float32"),
        "edges": (size, "float32"),
    }
    with Image.open(output / "photo_03_edges.png") as picture:
        # The picture of edges is the probability in 255 steps.
        np.testing.assert_allclose(np.asarray(picture.convert("L")) / 255, arrays["edges"], atol=0.005)


def test_one_task_of_good_pictures_as_json(monkeypatch, capsys, trained, photos, tmp_path):
    picture = photos / "photo_03.jpg"
    options = ("--task", "depth", "--no-arrays", "--json", "--output-dir", tmp_path / "maps")
    monkeypatch.setattr(
        sys, "argv", [COMMAND_LINE, "predict", str(picture), "--model", str(trained), *map(str, options)]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    file = str(tmp_path / "maps" / "photo_03_depth.png")
    assert json.loads(capsys.readouterr().out) == {
        "results": [{"picture": str(picture), "files": {"depth": file}}],
        "problems": [],
    }
    assert os.listdir(tmp_path / "maps") == ["photo_03_depth.png"]


def test_pictures_of_one_name_do_not_overwrite_each_others_results():
    assert distinct_names([Path("a/x.jpg"), Path("a/y.jpg")]) == ["x", "y"]
    assert distinct_names([Path("a/x.jpg"), Path("a/x.png")]) == ["x_jpg", "x_png"]
    assert distinct_names([Path("a/x.jpg"), Path("b/x.jpg")]) == ["000000_x", "000001_x"]


@pytest.mark.parametrize("adapter", [False, True], ids=["model", "adapter"])
def test_evaluating_what_was_trained_gives_the_results_of_the_training(
    tmp_path: Path, trained: Path, rooms_folder: Path, adapter: bool
) -> None:
    output = tmp_path / "results.json"
    options = ("--data-dir", rooms_folder, "--batch-size", 2, "--num-workers", 0, "--output", output)
    printed = run_program(COMMAND_LINE, "evaluate", trained / "adapter" if adapter else trained, *options)
    results = json.loads(output.read_text())
    assert results == read_metrics(trained)["results"]
    assert f"{NUM_VALIDATION} validation images of rooms at {SIZE} x {SIZE} pixels" in printed
    assert f"| depth | RMSE, m | {results['depth']['rmse']:.3f} |" in printed


def test_an_adapter_is_evaluated_on_a_backbone_that_has_moved(
    tmp_path: Path, trained: Path, rooms_folder: Path, backbone_folder: Path
) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in backbone_folder.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    output = tmp_path / "results.json"
    options = ("--data-dir", rooms_folder, "--batch-size", 2, "--num-workers", 0, "--output", output)
    run_program(COMMAND_LINE, "evaluate", trained / "adapter", "--backbone", moved, *options)
    assert json.loads(output.read_text()) == read_metrics(trained)["results"]


def test_info_shows_tasks_parameters_and_affinities(monkeypatch, capsys, trained):
    metrics = read_metrics(trained)
    assert call(monkeypatch, "info", trained) == 0
    printed = capsys.readouterr().out
    assert parameter_table(metrics["parameters"]) in printed
    assert "| depth | depth | metres along the optical axis" in printed
    assert "| semseg | 1.00 |" in printed or f"| semseg | {metrics['affinity'][0][0]:.2f} |" in printed
    assert call(monkeypatch, "info", trained / "adapter", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == metrics["parameters"]
    assert found["affinity"] == metrics["affinity"]
    assert found["weights"] == metrics["weights"], "model and adapter are one model"
    assert found["config"]["decoder"] == "fpn"


def test_the_tables_of_backbones_and_tasks_hold_them_all(monkeypatch, capsys):
    assert call(monkeypatch, "backbones", "--json") == 0
    assert {row["model_type"] for row in json.loads(capsys.readouterr().out)} == set(FAMILIES)
    assert call(monkeypatch, "tasks", "--json") == 0
    rows = {row["kind"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(TASKS)
    assert "metres" in rows["depth"]["output"]
    assert call(monkeypatch, "tasks") == 0
    assert "| edges | probability of a contour" in capsys.readouterr().out
    assert call(monkeypatch, "backbones") == 0
    assert "| swin | windows |" in capsys.readouterr().out


@pytest.mark.parametrize("adapter", [False, True], ids=["model", "adapter"])
def test_push_publishes_a_run_with_its_results(hub: HubServer, monkeypatch, capsys, trained, adapter):
    options = ("--adapter", "--base-model", "org/swin") if adapter else ()
    assert call(monkeypatch, "push", trained, "org/pushed", *options) == 0
    assert "org/pushed" in capsys.readouterr().out
    files, metrics = hub.files("org/pushed"), read_metrics(trained)
    assert ("adapter_model.safetensors" in files) == adapter
    assert ("model.safetensors" in files) == (not adapter)
    assert {"predictions.png", "affinity.png", "metrics.json", "preprocessor_config.json"} <= set(files)
    card = ModelCard.load("org/pushed")
    card.validate()
    columns = {"this model": metrics["results"], "input-blind": metrics["input_blind"]}
    assert metrics_table(columns, metrics["tasks"]) in card.content
    assert json.loads(files["metrics.json"])["results"] == metrics["results"]
    if not adapter:
        assert VtaModel.from_pretrained("org/pushed").task_names == list(TASKS)


def test_card_writes_the_card_of_a_run_anew(monkeypatch, capsys, trained, tmp_path):
    (tmp_path / "metrics.json").write_bytes((trained / "metrics.json").read_bytes())
    (tmp_path / "predictions.png").write_bytes((trained / "predictions.png").read_bytes())
    assert call(monkeypatch, "card", tmp_path, "--repo-id", "org/name", "--license", "mit") == 0
    card = ModelCard((tmp_path / "README.md").read_text())
    assert card.data.license == "mit"
    assert "# org/name" in card.text
    assert "(predictions.png)" in card.text
    assert "(affinity.png)" not in card.text, "a picture that is not there"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "nowhere/at/all"), "cannot load 'nowhere/at/all'"),
        (("info", "{trained}", "--backbone", "x"), "give no other backbone"),
        (("predict", "{photos}", "--model", "{trained}", "--task", "parts"), "this model's tasks ['semseg', 'depth'"),
        (("evaluate", "{trained}", "--dataset", "roms"), "Unknown data set 'roms'; known are: "),
        (("evaluate", "{trained}", "--data-dir", "{photos}"), "There is no validation.parquet"),
        (("card", "{photos}"), "has no readable metrics.json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_1(monkeypatch, capsys, trained, photos, arguments, message):
    filled = [text.format(trained=trained, photos=photos) for text in arguments]
    assert call(monkeypatch, *filled) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("predict", "not_there.jpg"), "does not exist"),
        (("predict",), "Missing argument"),
        (("predct",), "predict"),
        (("push", "not_there", "org/name"), "does not exist"),
    ],
)
def test_a_wrong_use_is_explained_with_exit_status_2(monkeypatch, capsys, arguments, message):
    assert call(monkeypatch, *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_help_and_completion_are_quick_because_nothing_heavy_is_imported(tmp_path: Path) -> None:
    program = (
        "import json, sys; from mt_adapters_cli import main\n"
        "try:\n    main()\nfinally:\n    print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    completing = {"_MT_ADAPTERS_COMPLETE": "complete_bash", "COMP_WORDS": "mt-adapters pre", "COMP_CWORD": "1"}
    for arguments, environment, expected in ((["--help"], {}, "predict"), ([], completing, "predict")):
        # The program's name is that of the first word, after which completion's variable is called.
        code = f"import sys; sys.argv = ['mt-adapters', *{arguments!r}]\n{program}"
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert expected in result.stdout, result.stderr
        modules = set(json.loads(result.stderr.splitlines()[-1]))
        assert not modules & {"torch", "transformers", "peft", "mt_adapters", "numpy"}
