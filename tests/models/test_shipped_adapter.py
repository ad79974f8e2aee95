"""The trained adapter that comes with the package: what it weighs, what it is, and that it needs no network."""

import json
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors import safe_open

from mt_adapters import MultitaskDensePredictionPipeline, VtaModel
from mt_adapters.backbones import load_backbone
from mt_adapters.data import get_dataset
from mt_adapters.hub.card import PICTURES, model_card
from mt_adapters.hub.record import describe, read_record
from mt_adapters.hub.shipped import PACKAGE, SHIPPED
from mt_adapters.training.evaluation import eval_loader
from mt_adapters_cli import SHIPPED_MODEL, main

FOLDER = SHIPPED[SHIPPED_MODEL]
BACKBONE = "mt-adapters/swin-nano-rooms"
TASKS = ["semseg", "depth", "normals", "edges"]
REPOSITORY = Path(__file__).parents[2]
# Imported by every Python at its start: as if there were no network.
NO_NETWORK = """
import socket

def refuse(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        raise RuntimeError(f"no network, but something tried to reach {address}")
    return connect(self, address)

connect, socket.socket.connect = socket.socket.connect, refuse
socket.getaddrinfo = lambda *args, **options: refuse(socket.socket(), args[0])
"""


@pytest.fixture(scope="module")
def model() -> VtaModel:
    return VtaModel.from_adapter(SHIPPED_MODEL)


def test_all_of_it_is_small_half_precision_and_on_the_list_of_package_data() -> None:
    assert sum(file.stat().st_size for file in FOLDER.glob("*.safetensors")) <= 3e6
    kinds = set()
    for file in FOLDER.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            kinds |= {tensors.get_slice(key).get_dtype() for key in tensors.keys()}
    assert kinds == {"F16"}
    setup = ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    patterns = setup["options.package_data"]["mt_adapters"].split()
    packed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    assert {path for path in FOLDER.iterdir() if path.is_file()} <= packed
    assert not [file for file in FOLDER.glob("*.json") if str(PACKAGE) in file.read_text(encoding="utf-8")]


def test_it_loads_in_float32_on_the_shipped_backbone_and_keeps_its_name(model: VtaModel) -> None:
    assert (model.name_or_path, model.config.backbone_name_or_path) == (SHIPPED_MODEL, BACKBONE)
    assert model.task_names == TASKS
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    PeftModel.from_pretrained(load_backbone(BACKBONE), FOLDER)


def test_one_task_predicts_what_it_does_among_all(model: VtaModel) -> None:
    pixels = torch.randn(1, 3, 128, 128)
    one = VtaModel.from_adapter(SHIPPED_MODEL, tasks=["normals"])
    with torch.no_grad():
        assert torch.equal(one(pixels).logits["normals"], model(pixels).logits["normals"])


def test_its_record_and_card_are_those_of_these_weights(model: VtaModel) -> None:
    record = read_record(FOLDER)
    assert record["weights"] == describe(model)["weights"]
    pictures = [name for name in PICTURES if (FOLDER / name).is_file()]
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert card == model_card(record, SHIPPED_MODEL, pictures, is_adapter=True)


@torch.no_grad()
def test_it_predicts_unseen_rooms_far_better_than_what_never_looks_at_them(model: VtaModel) -> None:
    """On frames that the sample has and the training had not; the record's figures are of all validation frames."""
    loader = eval_loader(get_dataset("rooms")("validation"), model.tasks, 128, batch_size=8, num_frames=8)
    batch = next(iter(loader))
    logits = model(batch["pixel_values"]).logits
    classes, known = logits["semseg"].argmax(dim=1), batch["labels"]["semseg"] != 255
    assert (classes == batch["labels"]["semseg"])[known].float().mean() > 0.6
    predicted = {task.name: task.predict(logits[task.name]) for task in model.tasks}
    has_depth = batch["labels"]["depth"] > 0
    error = (predicted["depth"] - batch["labels"]["depth"])[has_depth]
    spread = batch["labels"]["depth"][has_depth].std()
    assert error.square().mean().sqrt() < 0.8 * spread
    assert (predicted["normals"] * batch["labels"]["normals"]).sum(dim=1)[has_depth].mean() > 0.85


def test_the_pipeline_loads_it_by_its_name(model: VtaModel) -> None:
    pipe = MultitaskDensePredictionPipeline.from_pretrained(SHIPPED_MODEL)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    maps = pipe(pixels)
    assert {name: result["map"].shape[-2:] for name, result in maps.items()} == dict.fromkeys(TASKS, (60, 90))
    expected = VtaModel.from_adapter(FOLDER)
    with torch.no_grad():
        logits = expected(pipe.image_processor(pixels, return_tensors="pt")["pixel_values"]).logits
    (processed,) = pipe.image_processor.post_process(logits, target_sizes=[(60, 90)])
    for name, map_ in processed.items():
        np.testing.assert_array_equal(maps[name]["map"], map_.numpy())


def test_an_installation_without_its_weights_says_what_to_do(tmp_path, monkeypatch, capsys) -> None:
    for file in FOLDER.glob("*.json"):
        shutil.copy(file, tmp_path)
    monkeypatch.setitem(SHIPPED, SHIPPED_MODEL, tmp_path)
    monkeypatch.setattr(sys, "argv", ["mt-adapters", "predict", str(FOLDER / "affinity.png")])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr().err
    assert f"the weights of '{SHIPPED_MODEL}' are missing" in printed
    assert str(tmp_path) in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_predict_and_demo_work_without_network_cache_or_offline_switch(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    switches = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in switches}
    environment |= {"PYTHONPATH": str(tmp_path), "HF_HOME": str(tmp_path / "cache")}

    def run(*words: str) -> str:
        return subprocess.run(
            [sys.executable, *words], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    seen = "import socket; socket.create_connection(('192.0.2.1', 80), 1)"
    with pytest.raises(subprocess.CalledProcessError) as stopped:
        run("-c", seen)
    assert "no network, but" in stopped.value.stderr
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    printed = run("-m", "mt_adapters_cli", "predict", "photo.png")
    files = [f"outputs/predictions/photo_{task}.png" for task in TASKS]
    assert printed.split() == [*files, "outputs/predictions/photo.npz"]
    assert all((tmp_path / file).is_file() for file in files)

    run(str(REPOSITORY / "examples" / "train_multitask.py"), "--max_steps", "1", "--num_workers", "0")
    record = json.loads((tmp_path / "outputs/demo/metrics.json").read_text())
    assert (record["base_model"], record["train_adapted_blocks"], record["parameters"]["backbone"]["trainable"]) == (
        BACKBONE,
        False,
        0,
    )
