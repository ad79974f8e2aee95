"""What every family must keep of what it saves: a fresh process gives the same outputs, whichever way it loads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from mt_adapters import VtaAdapterConfig, VtaModel
from mt_adapters.backbones import align, get_family
from mt_adapters.tuners.vta import find_context
from tiny_models import (
    ALL_TASKS,
    FAMILIES,
    NUM_LABELS,
    assert_same,
    differ,
    logits_of,
    make_backbone,
    make_images,
    randomize,
)

OPTIONS = {
    "default": {},
    "all_others": {
        "residual": "figure",
        "norm_mode": "code",
        "activation": "identity",
        "attention_matrix": "dense",
        "attention_grid": [3, 5],
        "train_adapted_blocks": True,
    },
}
CASES = [(family, option) for family in FAMILIES for option in OPTIONS]
WAYS = ("auto", "from_adapter", "from_adapter_named_base", "peft", "peft_other_name", "transformers")
FRESH_PROCESS = """
import json, sys
from pathlib import Path
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel
import mt_adapters
from mt_adapters import VtaModel

@torch.no_grad()
def features(model, images):
    ids = torch.full((len(images),), 1)
    return {"features": model.eval()(images, task_ids=ids).last_hidden_state.contiguous()}

@torch.no_grad()
def logits(model, images):
    return {name: value.contiguous() for name, value in model.eval()(images).logits.items()} | {
        "affinity": model.affinity}

for folder in map(Path, sys.argv[1:]):
    images = load_file(folder / "images.safetensors")["images"]
    base, adapter = folder / "base", folder / "adapter"
    found = {
        "auto": logits(AutoModel.from_pretrained(folder / "full"), images),
        "from_adapter": logits(VtaModel.from_adapter(adapter, backbone=base), images),
        "from_adapter_named_base": logits(VtaModel.from_adapter(str(adapter)), images),
        "peft": features(PeftModel.from_pretrained(AutoModel.from_pretrained(base), adapter), images),
        "peft_other_name": features(
            PeftModel.from_pretrained(AutoModel.from_pretrained(base), adapter, adapter_name="second"), images),
    }
    plain = AutoModel.from_pretrained(base)
    plain.load_adapter(adapter, adapter_name="third")
    found["transformers"] = features(plain, images)
    for way, tensors in found.items():
        save_file(tensors, folder / f"{way}.safetensors")
    AutoModel.from_pretrained(folder / "full").save_pretrained(folder / "full_again")
    VtaModel.from_adapter(adapter).save_adapter(folder / "adapter_again")
"""


def case_folder(root: Path, family: str, option: str) -> Path:
    return root / f"{family}-{option}"


def expected_of(model: VtaModel, images: Tensor) -> dict[str, dict[str, Tensor]]:
    with torch.no_grad():
        features = model.backbone(images, task_ids=torch.full((len(images),), 1)).last_hidden_state
    logits = logits_of(model, images) | {"affinity": model.affinity}
    return {way: logits if way.startswith(("auto", "from")) else {"features": features} for way in WAYS}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], dict]]:
    """Folders that one fresh process has loaded and saved again, and what the saved models gave."""
    root, expected = tmp_path_factory.mktemp("saved"), {}
    for family, option in CASES:
        torch.manual_seed(0)
        folder, images = case_folder(root, family, option), make_images(FAMILIES[family].size)
        make_backbone(family).save_pretrained(folder / "base")
        model = VtaModel.from_backbone(
            folder / "base",
            tasks=list(ALL_TASKS),
            num_labels=NUM_LABELS,
            decoder_dim=16,
            adapter=VtaAdapterConfig(**OPTIONS[option]),
        )
        randomize(model).eval()
        model.save_pretrained(folder / "full")
        model.save_adapter(folder / "adapter")
        save_file({"images": images}, folder / "images.safetensors")
        expected[family, option] = expected_of(model, images)
    folders = [str(case_folder(root, *case)) for case in CASES]
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, *folders], check=True, timeout=300)
    return root, expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("family", "option"), CASES)
def test_a_fresh_process_gives_the_same_outputs(saved, family, option, way, request):
    if (family, option, way) == ("dinov3_vit", "all_others", "transformers"):
        # Its rule for old DINOv3 checkpoints, "(?<!model\.)layer.", also matches the "layer_" of layer_scale1.
        reason = "transformers 5.23 renames a trained copy's layer scales on loading and so leaves them out"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    root, expected = saved
    found = load_file(case_folder(root, family, option) / f"{way}.safetensors")
    names = [*expected[family, option][way]]
    assert_same({name: found[name] for name in names}, expected[family, option][way])
    assert len(found) == len(names)


@pytest.mark.parametrize(("family", "option"), CASES)
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_what_was_loaded_is_saved_again_byte_for_byte(saved, family, option, kind):
    folder = case_folder(saved[0], family, option)
    first = {file.name: file.read_bytes() for file in (folder / kind).iterdir()}
    again = {file.name: file.read_bytes() for file in (folder / f"{kind}_again").iterdir()}
    assert sorted(first) == sorted(again)
    assert [name for name in first if first[name] != again[name]] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_files_are_safetensors_and_hold_no_backbone(saved, family):
    folder = case_folder(saved[0], family, "default")
    tasks = [f"task_{name}.safetensors" for name in ALL_TASKS]
    files = ["adapter_config.json", "adapter_model.safetensors", "decoder.safetensors", "vta_config.json", *tasks]
    assert sorted(file.name for file in (folder / "adapter").iterdir()) == sorted(files)
    keys = list(load_file(folder / "adapter" / "adapter_model.safetensors"))
    assert all(".vta_" in key and ".default." not in key for key in keys)
    for name in ALL_TASKS:
        keys = list(load_file(folder / "adapter" / f"task_{name}.safetensors"))
        assert all(key.startswith((f"decoder.tasks.{name}.", f"heads.{name}.")) for key in keys)
        assert f"heads.{name}.weight" in keys
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "VTA"
    assert settings["tasks"] == list(ALL_TASKS)
    assert settings["base_model_name_or_path"] == str(folder / "base")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_peft_model_saves_its_affinity_with_its_weights(family, tmp_path):
    images = make_images(FAMILIES[family].size)
    make_backbone(family).save_pretrained(tmp_path / "base")

    def base() -> AutoModel:
        return AutoModel.from_pretrained(tmp_path / "base")

    model = randomize(get_peft_model(base(), VtaAdapterConfig(tasks=["depth", "edges"]), adapter_name="mine")).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter" / "mine").eval()
    ids = torch.tensor([1, 0])
    with torch.no_grad():
        expected = model(images, task_ids=ids).last_hidden_state
        assert torch.equal(loaded(images, task_ids=ids).last_hidden_state, expected)
        assert differ(base()(images).last_hidden_state, expected)
    assert torch.equal(
        find_context(loaded).conditioning["default"].affinity, find_context(model).conditioning["mine"].affinity
    )
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trainable = PeftModel.from_pretrained(base(), tmp_path / "adapter" / "mine", is_trainable=True)
    assert {name for name, p in trainable.named_parameters() if p.requires_grad} == {
        name for name, _ in trainable.named_parameters() if ".vta_" in name
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_fits_a_backbone_of_the_same_shape_with_another_grid(saved, family):
    folder = case_folder(saved[0], family, "default")
    other = make_backbone(family, **FAMILIES[family].other_grid)
    smallest = get_family(family).min_image_size(other.config)
    height, width = FAMILIES[family].size
    images = make_images((max(height, smallest), max(width, smallest)))
    model = VtaModel.from_adapter(folder / "adapter", backbone=other)
    logits = logits_of(model, images)
    assert all(value.isfinite().all() for value in logits.values())
    assert differ(logits["depth"], logits["edges"])


@pytest.mark.pretrained
def test_pretrained_weights_stay_exact_under_an_adapter_and_load_in_every_way(shared_folder, tmp_path):
    base = shared_folder / "models/dinov2-small"
    images = make_images((224, 224), 1)
    model = VtaModel.from_backbone(base, tasks=["depth", "normals"], decoder_dim=16).eval()
    plain = AutoModel.from_pretrained(base, dtype=torch.float32).eval()
    ids = torch.tensor([1])
    with torch.no_grad():
        before = plain(images).last_hidden_state
        assert torch.equal(model.backbone(images, task_ids=ids).last_hidden_state, before)
        randomize(model, std=0.02)
        expected, features = model(images).logits, model.backbone(images, task_ids=ids).last_hidden_state
        assert differ(features, before)
        model.save_adapter(tmp_path / "adapter")
        model.save_pretrained(tmp_path / "full")
        assert_same(logits_of(AutoModel.from_pretrained(tmp_path / "full"), images), expected)
        assert_same(logits_of(VtaModel.from_adapter(tmp_path / "adapter"), images), expected)
        peft_model = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        assert torch.equal(peft_model(images, task_ids=ids).last_hidden_state, features)
        plain = AutoModel.from_pretrained(base, dtype=torch.float32)
        plain.load_adapter(tmp_path / "adapter")
        # transformers leaves weights where they lie in the file, which on some processors changes the last bits.
        align(plain)
        assert torch.equal(plain(images, task_ids=ids).last_hidden_state, features)
