"""A smaller adapter file: half the bytes, and results that are those of the rounded weights."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mt_adapters import VtaModel
from mt_adapters.hub.record import describe, measured_record
from programs import run_program


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def shrunk(
    request: pytest.FixtureRequest, trained: Path, rooms_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    options = ("--output_dir", folder, "--dtype", request.param, "--data_dir", rooms_folder)
    printed = run_program("shrink_adapter.py", trained, *options)
    before, after = (
        sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (trained / "adapter", folder)
    )
    assert f"{before / 1e6:.2f} MB became {after / 1e6:.2f} MB" in printed
    assert 0.45 < after / before < 0.65  # headers do not shrink
    assert re.search(rf"\| task \| metric \| float32 \| {request.param} \|", printed)
    return folder


def test_every_tensor_is_the_trained_one_rounded_once(shrunk: Path, trained: Path) -> None:
    names = {file.name for file in (trained / "adapter").glob("*.safetensors")}
    assert {file.name for file in shrunk.glob("*.safetensors")} == names
    dtype = getattr(torch, json.loads((shrunk / "metrics.json").read_text())["stored_as"])
    for name in names:
        with safe_open(shrunk / name, "pt") as small, safe_open(trained / "adapter" / name, "pt") as large:
            assert small.keys() == large.keys()
            for key in small.keys():
                assert small.get_tensor(key).dtype == dtype
                assert torch.equal(small.get_tensor(key), large.get_tensor(key).to(dtype)), key


def test_the_record_holds_what_the_rounded_weights_reach(shrunk: Path, trained: Path, rooms_folder: Path) -> None:
    model = VtaModel.from_adapter(shrunk)
    # Fails if the results were measured with other weights.
    record = measured_record(describe(model), shrunk)
    own = {"results", "mean_gain", "weights", "stored_as", "affinity"}
    before = json.loads((trained / "metrics.json").read_text())
    assert {key: value for key, value in record.items() if key not in own} == {
        key: value for key, value in before.items() if key not in own
    }
    run_program(
        "mt-adapters",
        "evaluate",
        shrunk,
        "--data-dir",
        rooms_folder,
        "--output",
        shrunk / "again.json",
    )
    assert json.loads((shrunk / "again.json").read_text()) == record["results"]
    assert f"{record['mean_gain']:.1f} %" in (shrunk / "README.md").read_text()


def test_one_task_of_it_predicts_what_it_does_among_all(shrunk: Path) -> None:
    pixels = torch.randn(1, 3, 64, 64)
    whole, one = VtaModel.from_adapter(shrunk), VtaModel.from_adapter(shrunk, tasks=["edges"])
    with torch.no_grad():
        assert torch.equal(one(pixels).logits["edges"], whole(pixels).logits["edges"])
