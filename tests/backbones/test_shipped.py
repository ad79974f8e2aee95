"""The pretrained backbone that comes with the package, under its short name."""

import json
import shutil
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
from benchmarks.probe_backbones import ROWS, table
from examples.distill_backbone import STUDENT
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModel

from mt_adapters import VtaAdapterConfig, VtaModel
from mt_adapters.backbones import get_family, load_backbone
from mt_adapters.distillation import feature_maps
from mt_adapters.hub import shipped
from mt_adapters.hub.card import model_card
from mt_adapters.hub.push import rename_backbone
from mt_adapters.hub.record import describe
from mt_adapters.hub.shipped import SHIPPED

NAME = "mt-adapters/swin-nano-rooms"
FOLDER = SHIPPED[NAME]
RECORD = "distillation.json"
SOURCE = Path(shipped.__file__).parents[1]


def test_it_loads_without_a_network_in_float32_and_keeps_its_name():
    backbone = load_backbone(NAME)
    assert not backbone.training
    assert {x.dtype for x in backbone.parameters()} == {torch.float32}
    assert all(x.isfinite().all() for x in backbone.state_dict().values())
    assert backbone.name_or_path == backbone.config._name_or_path == NAME
    assert str(FOLDER) not in json.dumps(backbone.config.to_dict())


def test_the_file_is_small_half_precision_and_on_the_list_of_package_data():
    files = {path.name for path in FOLDER.iterdir()}
    assert files == {"config.json", "model.safetensors", "README.md", "distillation.json", "probe.json", "loss.png"}
    assert (FOLDER / "model.safetensors").stat().st_size <= 12e6
    with safe_open(FOLDER / "model.safetensors", framework="pt") as tensors:
        kinds = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}
    assert kinds == {"F16"}
    setup = ConfigParser()
    setup.read(SOURCE.parents[1] / "setup.cfg")
    patterns = setup["options.package_data"]["mt_adapters"].split()
    packed = {path for pattern in patterns for path in SOURCE.glob(pattern)}
    assert {path for path in FOLDER.iterdir() if path.is_file()} <= packed


def test_its_features_are_not_those_of_random_weights():
    backbone = load_backbone(NAME)
    torch.manual_seed(0)
    untrained = AutoModel.from_config(backbone.config).eval()
    pixels = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        trained_maps, random_maps = feature_maps(backbone, pixels), feature_maps(untrained, pixels)
    assert [map_.shape[1] for map_ in trained_maps] == get_family("swin").map_channels(backbone.config)
    for trained, other in zip(trained_maps, random_maps, strict=True):
        assert trained.isfinite().all()
        assert torch.corrcoef(torch.stack([trained.flatten(), other.flatten()]))[0, 1].abs() < 0.5


def test_a_model_an_adapter_and_what_is_published_of_them_keep_the_short_name(tmp_path):
    model = VtaModel.from_backbone(NAME, tasks=["depth", "edges"], adapter=VtaAdapterConfig(), decoder_dim=8).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".vta_" in name:
                parameter.normal_(std=0.02)
    assert model.config.backbone_name_or_path == NAME
    model.save_pretrained(tmp_path / "model")
    model.save_adapter(tmp_path / "adapter")
    load_backbone(NAME).save_pretrained(tmp_path / "model_backbone")
    rename_backbone(tmp_path / "adapter", describe(model)["base_model"])
    for file in tmp_path.rglob("*.json"):
        assert str(SOURCE) not in file.read_text()
    for file in ("model/config.json", "adapter/vta_config.json"):
        assert json.loads((tmp_path / file).read_text())["backbone_name_or_path"] == NAME
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == NAME
    pixels = torch.randn(1, 3, 128, 128)
    # As they lie in the file, weights give other last bits on some processors.
    loaded = [VtaModel.from_pretrained(tmp_path / "model"), load_backbone(tmp_path / "model_backbone")]
    assert {parameter.data_ptr() % 64 for one in loaded for parameter in one.parameters()} == {0}
    again = VtaModel.from_adapter(tmp_path / "adapter").eval()
    assert again.config.backbone_name_or_path == NAME
    whole = VtaModel.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        for task, expected in model(pixels).logits.items():
            assert torch.equal(again(pixels).logits[task], expected)
            assert torch.equal(whole(pixels).logits[task], expected)
    PeftModel.from_pretrained(load_backbone(NAME), tmp_path / "adapter")


def test_a_card_names_it_and_claims_no_repository_for_it():
    record = describe(VtaModel.from_backbone(NAME, tasks=["depth"], decoder_dim=8))
    assert record["base_model"] == NAME
    card = ModelCard(model_card(record, is_adapter=True))
    assert card.data.base_model is None
    assert card.data.get("base_model_relation") is None
    assert f"swin backbone ({NAME}, which comes with the package)" in card.text
    assert f'PeftModel.from_pretrained(load_backbone("{NAME}"), "org/name")' in card.text
    compile(card.text.split("```python")[2].split("```")[0], "card", "exec")


def test_an_installation_without_its_weights_says_what_to_do(tmp_path, monkeypatch):
    shutil.copy(FOLDER / "config.json", tmp_path)
    monkeypatch.setitem(SHIPPED, NAME, tmp_path)
    with pytest.raises(ValueError, match=r"the weights of 'mt-adapters/swin-nano-rooms' are missing.*was packed with"):
        VtaModel.from_backbone(NAME, tasks=["depth"])


def read(name: str) -> dict:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def test_the_card_shows_the_figures_and_commands_of_its_files():
    card, probe, distillation = (FOLDER / "README.md").read_text(encoding="utf-8"), read("probe.json"), read(RECORD)
    assert table(probe["rows"]) in card
    assert {"student", "random"} <= set(probe["rows"]) <= set(ROWS)
    assert probe["command"] in card
    assert distillation["command"] in card
    assert f"{distillation['parameters']:,} parameters" in card
    holdout = distillation["losses"]["holdout"]
    assert f"{holdout['unexplained_0']:.2f} and {holdout['unexplained_1']:.2f} of the two maps' variance" in card


def test_the_record_is_that_of_these_weights():
    backbone, record = load_backbone(NAME), read(RECORD)
    assert record["parameters"] == sum(parameter.numel() for parameter in backbone.parameters())
    settings = backbone.config.to_dict()
    assert {name: settings[name] for name in STUDENT} == STUDENT
    assert record["arguments"]["student"]["depths"] == STUDENT["depths"]
    assert record["arguments"]["save_dtype"] == "float16"


def test_its_linear_probe_is_far_above_that_of_random_weights():
    rows = {row: record["results"] for row, record in read("probe.json")["rows"].items()}
    student, untrained = rows["student"], rows["random"]
    assert student["semseg"]["miou"] > 2 * untrained["semseg"]["miou"]
    assert student["depth"]["rmse"] < 0.9 * untrained["depth"]["rmse"]
    assert student["normals"]["mean_angle"] < 0.9 * untrained["normals"]["mean_angle"]
