"""Fixtures of the tests of the Hub: a backbone there, a model on it, and what a training of that model leaves."""

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from PIL import Image

from hub_server import HubServer
from mt_adapters import TASKS, VtaImageProcessorPil, VtaModel
from mt_adapters.data import RoomsDataset
from mt_adapters.hub.card import COLUMNS, PICTURES
from mt_adapters.hub.record import describe
from tiny_models import FAMILIES, make_backbone, randomize

BASE = "org/swin"


def results(shift: float) -> dict:
    """Made up values of every metric that a card shows; of depth one that is not a number."""
    values = {
        task: {metric: shift + number / 7 for number, (metric, *_) in enumerate(COLUMNS[task])} for task in TASKS
    }
    values["depth"]["abs_rel"] = float("nan")
    return values


@pytest.fixture
def base(hub: HubServer, tmp_path: Path) -> str:
    """The Hub id of a backbone."""
    backbone = make_backbone("swin")
    backbone.save_pretrained(tmp_path / "base")
    HfApi().create_repo(BASE)
    HfApi().upload_folder(repo_id=BASE, folder_path=tmp_path / "base")
    return BASE


@pytest.fixture
def model(base: str) -> VtaModel:
    return randomize(VtaModel.from_backbone(base, tasks=list(TASKS), num_labels=5, decoder_dim=16)).eval()


@pytest.fixture
def run_folder(model: VtaModel, tmp_path: Path) -> Path:
    """What a training leaves, with made up results."""
    folder = tmp_path / "run"
    model.save_pretrained(folder)
    height, width = FAMILIES["swin"].size
    processor = VtaImageProcessorPil(size={"height": height, "width": width}, tasks=model.config.tasks)
    processor.save_pretrained(folder)
    record = describe(model) | {
        "results": results(0.25),
        "input_blind": results(0.5),
        "mean_gain": 12.5,
        "evaluation": "5 validation images of rooms at 64 x 64 pixels",
        "datasets": {"rooms": RoomsDataset.summary},
        "steps": 4,
        "best_step": 4,
        "seconds": 60.0,
        "device": "1 process(es), cpu",
        "command": "python examples/train_multitask.py --max_steps 4",
        "arguments": {"dataset": "rooms", "seed": 3, "max_steps": 4},
    }
    (folder / "metrics.json").write_text(json.dumps(record))
    for name in PICTURES:
        Image.new("RGB", (4, 4), "red").save(folder / name)
    return folder
