"""examples/distill_backbone.py: a tiny student of a tiny teacher on a few frames."""

import json
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples.distill_backbone import STUDENT, student_config
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel

from mt_adapters.backbones import get_family
from mt_adapters.distillation.arguments import DistillationArguments
from mt_adapters.hub.shipped import SHIPPED
from programs import BACKBONE_CONFIG, SIZE, run_program, start_program
from tiny_models import make_backbone

PROGRAM = "distill_backbone.py"
NUM_STEPS = 12


@pytest.fixture(scope="session")
def options(tmp_path_factory: pytest.TempPathFactory, rooms_folder: Path) -> tuple[object, ...]:
    folder = tmp_path_factory.mktemp("distillation")
    torch.manual_seed(0)
    make_backbone("dinov2").save_pretrained(folder / "teacher")
    # With drop-path: the random numbers of the model itself count.
    (folder / "student.json").write_text(json.dumps(BACKBONE_CONFIG | {"drop_path_rate": 0.5}))
    return (
        *("--teacher", folder / "teacher", "--student_config", folder / "student.json", "--data_dir", rooms_folder),
        *("--image_size", SIZE, "--teacher_image_size", 56, "--num_views", 4, "--batch_size", 4),
        *("--teacher_batch_size", 1, "--max_steps", NUM_STEPS, "--checkpoint_steps", 2, "--eval_steps", 6),
    )


@pytest.fixture(scope="session")
def distilled(tmp_path_factory: pytest.TempPathFactory, options: tuple[object, ...]) -> Path:
    output = tmp_path_factory.mktemp("distilled")
    printed = run_program(PROGRAM, *options, "--output_dir", output)
    (output / "printed.txt").write_text(printed)
    return output


def saved_step(output: Path) -> int:
    try:
        return json.loads((output / "checkpoints/last/loop_state.json").read_text())["loop"]["step"]
    except FileNotFoundError:
        return 0


def outcome(output: Path) -> dict[str, Any]:
    record = json.loads((output / "distillation.json").read_text())
    for name in ("seconds", "command"):
        del record[name]
    return {"record": record, "model": (output / "model.safetensors").read_bytes()}


def test_the_program_leaves_a_backbone_its_record_and_a_picture(distilled: Path, rooms_folder: Path) -> None:
    files = {path.name for path in distilled.iterdir()}
    assert files == {"config.json", "model.safetensors", "distillation.json", "loss.png", "checkpoints", "printed.txt"}
    student = AutoModel.from_pretrained(distilled)
    assert student.config.depths == BACKBONE_CONFIG["depths"]
    record = json.loads((distilled / "distillation.json").read_text())
    assert record["parameters"] == sum(parameter.numel() for parameter in student.parameters())
    assert record["steps"] == NUM_STEPS
    assert [entry["step"] for entry in record["history"] if "holdout" in entry] == [6, 12]
    assert set(record["losses"]["holdout"]) == {"loss_0", "loss_1", "unexplained_0", "unexplained_1"}
    assert record["seconds"]["teacher"] > 0
    assert record["arguments"]["student"]["model_type"] == "swin"
    assert f"--data_dir {rooms_folder.name} " in record["command"]
    assert not re.search(r'[" ]/', (distilled / "distillation.json").read_text()), "folders of one machine"
    assert "Held-out images" in (distilled / "printed.txt").read_text()
    assert min(Image.open(distilled / "loss.png").size) > 200


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(
    tmp_path: Path, distilled: Path, options: tuple[object, ...]
) -> None:
    output = tmp_path / "killed"
    output.mkdir()
    moments: tuple[Callable[[], bool], ...] = (
        lambda: (output / "views/train/views.json").exists(),
        lambda: saved_step(output) >= 2,
        lambda: (output / "checkpoints/.last.partial").is_dir(),
    )
    rng = random.Random(0)
    for number, moment in enumerate(moments):
        process = start_program(PROGRAM, *options, "--output_dir", output, "--resume", log=output / "log.txt")
        while not moment() and process.is_alive():
            pass
        time.sleep(rng.uniform(0, 0.02) if number < 2 else 0)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (output / "log.txt").read_text()
        assert not (output / "distillation.json").exists()
    printed = run_program(PROGRAM, *options, "--output_dir", output, "--resume")
    assert "resuming after step" in printed
    expected, found = outcome(distilled), outcome(output)
    assert found["record"] == expected["record"]
    assert found["model"] == expected["model"]


def test_the_loss_falls_and_pictures_in_a_folder_and_float16_work(
    tmp_path: Path, options: tuple[object, ...], rooms_folder: Path
) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "pictures/more").mkdir(parents=True)
    for number in range(4):
        # Smooth pictures of different sizes.
        small = Image.fromarray(rng.integers(0, 255, (3, 3, 3), np.uint8))
        small.resize((90 + number, 70)).save(tmp_path / "pictures/more" / f"{number}.jpg")
    own = ("--data_dir", tmp_path / "pictures", "--max_steps", 40, "--learning_rate", 0.01, "--save_dtype", "float16")
    run_program(PROGRAM, *options, *own, "--eval_steps", 40, "--keep_views", 1, "--output_dir", tmp_path / "out")
    record = json.loads((tmp_path / "out/distillation.json").read_text())
    losses = [entry["train"]["loss_1"] for entry in record["history"]]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert record["losses"]["holdout"]["unexplained_1"] < 1
    assert {x.dtype for x in load_file(tmp_path / "out/model.safetensors").values()} == {torch.float16}
    assert (tmp_path / "out/views/train/features_3.npy").is_file()


def test_a_finished_run_that_is_resumed_writes_its_model_again(
    tmp_path: Path, distilled: Path, options: tuple[object, ...]
) -> None:
    model = (distilled / "model.safetensors").read_bytes()
    (distilled / "model.safetensors").unlink()
    run_program(PROGRAM, *options, "--output_dir", distilled, "--resume")
    assert (distilled / "model.safetensors").read_bytes() == model


def test_the_default_student_is_what_the_package_ships() -> None:
    config = student_config(DistillationArguments())
    shipped = json.loads((SHIPPED["mt-adapters/swin-nano-rooms"] / "config.json").read_text())
    assert {name: shipped[name] for name in STUDENT} == STUDENT
    # The paper's layout: four stages, the last one 8C wide.
    assert get_family("swin").stage_channels(config) == [40, 80, 160, 320]


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"model_type": "resnet"}, r"unknown backbone type 'resnet'; known are \["),
        ({"depths": [1]}, r"has no model_type: give the config.json of a transformers backbone"),
        ([1], r"has no model_type"),
        ("{", r"is no readable JSON file"),
        (
            {**BACKBONE_CONFIG, "window_size": 7},
            r"the image is 128 x 128 pixels, but this swin backbone needs at least",
        ),
    ],
)
def test_a_student_that_does_not_work_is_refused(tmp_path: Path, config: Any, error: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(ValueError, match=error):
        student_config(DistillationArguments(student_config=str(file)))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"max_steps": 0}, "max_steps is 0; it must be at least 1"),
        ({"color_jitter": [0.1]}, r"color_jitter is \[0.1\]; it must be 4 numbers"),
        ({"crop_scale": [1.0]}, r"crop_scale is \[1.0\]; it must be 2 numbers"),
    ],
)
def test_settings_that_do_not_work_are_refused(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        DistillationArguments(**settings)
