"""What peft and transformers save of VTA adapters, and every way that they load it again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import (
    AutoPeftModel,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

from mt_adapters import VtaAdapterConfig, VtaModel
from mt_adapters.backbones import get_family
from mt_adapters.tuners.vta import find_context
from tiny_models import ALL_TASKS, FAMILIES, differ, make_backbone, make_images, randomize

TASKS = list(ALL_TASKS)
TASK_IDS = torch.tensor([2, 0])
FILES = ["adapter_config.json", "adapter_model.safetensors"]
SOME_FAMILIES = ["swin", "dinov2", "segformer"]
some_families = pytest.mark.parametrize("family", SOME_FAMILIES)


class Saved(NamedTuple):
    """Two adapters on different blocks of one backbone: "default" at the top of the folder, "second" below it."""

    folder: Path
    images: Tensor
    features: dict[str, Tensor]
    model: PeftModel

    def base(self, **kwargs: Any) -> Any:
        return AutoModel.from_pretrained(self.folder / "base", **kwargs)

    def file(self, name: str = "default") -> Path:
        return self.folder / "adapter" / ("" if name == "default" else name)


@torch.no_grad()
def features_of(model: nn.Module, images: Tensor) -> Tensor:
    return model.eval()(images, task_ids=TASK_IDS).last_hidden_state


def vta_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".vta_" in name}


@pytest.fixture(scope="module")
def saved_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    made: dict[str, Saved] = {}

    def make(family: str) -> Saved:
        if family not in made:
            folder, images = tmp_path_factory.mktemp(family), make_images(FAMILIES[family].size)
            make_backbone(family).save_pretrained(folder / "base")
            base = AutoModel.from_pretrained(folder / "base")
            earlier = get_family(family).blocks(base.config)[-len(FAMILIES[family].targets) - 1]
            model = get_peft_model(base, VtaAdapterConfig(tasks=TASKS))
            targets = [earlier, FAMILIES[family].targets[0]]
            model.add_adapter("second", VtaAdapterConfig(tasks=TASKS, target_modules=targets, embedding_dim=8))
            randomize(model)
            features = {}
            for name in ("second", "default"):
                model.set_adapter(name)
                features[name] = features_of(model, images)
            assert differ(features["default"], features["second"])
            model.save_pretrained(folder / "adapter")
            made[family] = Saved(folder, images, features, model)
        return made[family]

    return make


@pytest.fixture
def saved(saved_of, family: str) -> Saved:
    return saved_of(family)


def injected(saved: Saved, low_cpu_mem_usage: bool) -> nn.Module:
    config = PeftConfig.from_pretrained(saved.file())
    base = inject_adapter_in_model(config, saved.base(), "other", low_cpu_mem_usage=low_cpu_mem_usage)
    weights = load_file(saved.file() / FILES[1])
    result = set_peft_model_state_dict(base, weights, "other", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.unexpected_keys
    return base


def loaded_by_transformers(saved: Saved, **kwargs: Any) -> nn.Module:
    base = saved.base()
    base.load_adapter(saved.file(), **kwargs)
    return base


def created_empty(saved: Saved) -> nn.Module:
    model = get_peft_model(saved.base(), VtaAdapterConfig(tasks=TASKS), low_cpu_mem_usage=True)
    assert any(tensor.is_meta for tensor in vta_tensors(model).values())
    model.load_adapter(saved.file(), "default", low_cpu_mem_usage=True)
    return model


# The same in a fresh process, without low_cpu_mem_usage: test_contract_files.py.
WAYS: dict[str, Callable[[Saved], nn.Module]] = {
    "peft_low_cpu": lambda s: PeftModel.from_pretrained(s.base(), s.file(), low_cpu_mem_usage=True),
    "peft_low_cpu_other_name": lambda s: PeftModel.from_pretrained(
        s.base(), s.file(), adapter_name="other", low_cpu_mem_usage=True
    ),
    "peft_empty": created_empty,
    "auto_peft": lambda s: AutoPeftModel.from_pretrained(s.file()),
    "inject": lambda s: injected(s, low_cpu_mem_usage=False),
    "inject_low_cpu": lambda s: injected(s, low_cpu_mem_usage=True),
    "transformers_low_cpu": lambda s: loaded_by_transformers(s, low_cpu_mem_usage=True),
    "transformers_other_name": lambda s: loaded_by_transformers(s, adapter_name="other"),
    "auto": lambda s: AutoModel.from_pretrained(s.file()),
}
FOR_ALL_FAMILIES = ("peft_low_cpu_other_name", "auto")


@pytest.mark.parametrize(
    ("family", "way"),
    [(family, way) for family in FAMILIES for way in WAYS if family in SOME_FAMILIES or way in FOR_ALL_FAMILIES],
)
def test_every_way_of_loading_gives_the_same_features_to_the_last_bit(saved, family, way):
    model = WAYS[way](saved)
    assert torch.equal(features_of(model, saved.images), saved.features["default"])
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    ((_, found),) = find_context(model).conditioning.items()
    expected = find_context(saved.model).conditioning["default"]
    for name in ("affinity", "mixing_weights"):
        assert getattr(found, name).dtype == torch.float32
        assert torch.equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_files_hold_the_adapters_tensors_under_keys_without_its_name(saved, family):
    found = sorted(str(path.relative_to(saved.file())) for path in saved.file().rglob("*") if path.is_file())
    assert found == sorted(["README.md", *FILES, *(f"second/{file}" for file in FILES)])
    for name in ("default", "second"):
        expected = {}
        for key, tensor in saved.model.state_dict().items():
            parts = key.split(".")
            position = next((i for i, part in enumerate(parts) if part.startswith("vta_")), len(parts))
            if parts[position + 1 :][:1] == [name]:
                expected[".".join(parts[: position + 1] + parts[position + 2 :])] = tensor
        weights = load_file(saved.file(name) / FILES[1])
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], tensor) for key, tensor in expected.items())


@some_families
def test_transformers_gives_and_saves_the_same_tensors_as_peft(saved, family, tmp_path):
    base = loaded_by_transformers(saved, adapter_name="other")
    weights = load_file(saved.file() / FILES[1])
    state = {f"base_model.model.{key}": tensor for key, tensor in base.get_adapter_state_dict("other").items()}
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in weights.items())
    base.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert (tmp_path / FILES[1]).read_bytes() == (saved.file() / FILES[1]).read_bytes()
    assert torch.equal(features_of(AutoModel.from_pretrained(tmp_path), saved.images), saved.features["default"])


@pytest.mark.parametrize("deleted", ["default", "second"])
@pytest.mark.parametrize("how", ["peft", "transformers"])
@some_families
def test_deleting_the_active_adapter_switches_to_the_other_and_it_loads_again(saved, family, how, deleted):
    other = {"default": "second", "second": "default"}[deleted]
    model: Any = saved.base() if how == "transformers" else None
    for name in ("default", "second"):
        if model is None:
            model = PeftModel.from_pretrained(saved.base(), saved.file(), adapter_name=name)
        else:
            model.load_adapter(saved.file(name), adapter_name=name)

    def active() -> list[str]:
        return model.active_adapters() if how == "transformers" else model.active_adapters

    model.set_adapter(deleted)
    assert torch.equal(features_of(model, saved.images), saved.features[deleted])
    with pytest.warns(UserWarning, match=f"{deleted} was active which is now deleted.*{other}"):
        model.delete_adapter(deleted)
    assert active() == [other]
    assert torch.equal(features_of(model, saved.images), saved.features[other])
    assert list(find_context(model).conditioning) == [other]
    model.load_adapter(saved.file(deleted), adapter_name=deleted)
    for name in (other, deleted):
        model.set_adapter(name)
        assert active() == [name]
        assert torch.equal(features_of(model, saved.images), saved.features[name])


@some_families
def test_the_only_adapter_can_be_deleted_and_loaded_again(saved, family):
    with torch.no_grad():
        expected = saved.base().eval()(saved.images).last_hidden_state
    base = loaded_by_transformers(saved)
    base.delete_adapter("default")
    assert torch.equal(features_of(base, saved.images), expected)
    base.load_adapter(saved.file())
    assert torch.equal(features_of(base, saved.images), saved.features["default"])
    model = PeftModel.from_pretrained(saved.base(), saved.file())
    model.delete_adapter("default")
    model.load_adapter(saved.file(), "default")
    model.set_adapter("default")
    assert torch.equal(features_of(model, saved.images), saved.features["default"])


@some_families
def test_a_bfloat16_base_rounds_no_weight_of_the_adapter_whichever_way_it_loads(saved, family):
    def base() -> Any:
        return saved.base(dtype=torch.bfloat16)

    plain = base()
    plain.load_adapter(saved.file())
    models = {"transformers": plain, "auto": AutoModel.from_pretrained(saved.file(), dtype=torch.bfloat16)}
    for low in (False, True):
        for cast in (False, True):
            models[f"peft {low} {cast}"] = PeftModel.from_pretrained(
                base(), saved.file(), low_cpu_mem_usage=low, autocast_adapter_dtype=cast
            )
    expected = {key: tensor for key, tensor in vta_tensors(saved.model).items() if ".second." not in key}
    features = {}
    for way, model in models.items():
        prefix = "base_model.model." if way.startswith("peft") else ""
        for key, tensor in vta_tensors(model).items():
            assert torch.equal(tensor, expected[key if prefix else f"base_model.model.{key}"]), (way, key)
            assert tensor.dtype == torch.float32
        features[way] = features_of(model, saved.images.bfloat16())
        assert torch.equal(features[way], features["transformers"])
    difference = (features["transformers"].float() - saved.features["default"]).norm()
    assert difference / saved.features["default"].norm() < 0.1


@pytest.mark.parametrize(("family", "residual"), [("swin", "stream"), ("dinov2", "stream"), ("dinov2", "figure")])
def test_trained_copies_of_blocks_have_the_bases_type(saved, family, residual, tmp_path):
    settings = {"tasks": TASKS, "train_adapted_blocks": True, "residual": residual}
    model = randomize(get_peft_model(saved.base(), VtaAdapterConfig(**settings)), std=0.1)
    model.save_pretrained(tmp_path)
    images, results = saved.images.bfloat16(), []
    for low in (False, True):
        for cast in (False, True):
            loaded = PeftModel.from_pretrained(
                saved.base(dtype=torch.bfloat16), tmp_path, low_cpu_mem_usage=low, autocast_adapter_dtype=cast
            )
            tensors = vta_tensors(loaded)
            for key, tensor in vta_tensors(model).items():
                dtype = torch.bfloat16 if ".vta_block." in key else torch.float32
                assert tensors[key].dtype == dtype, key
                assert torch.equal(tensors[key], tensor.to(dtype)), key
            results.append(features_of(loaded, images))
    base = saved.base(dtype=torch.bfloat16)
    inject_adapter_in_model(PeftConfig.from_pretrained(tmp_path), base, low_cpu_mem_usage=True)
    set_peft_model_state_dict(base, load_file(tmp_path / FILES[1]), low_cpu_mem_usage=True)
    assert all(torch.equal(result, features_of(base, images)) for result in results)
    fresh = get_peft_model(saved.base(dtype=torch.bfloat16), VtaAdapterConfig(**settings))
    fresh(images, task_ids=TASK_IDS).last_hidden_state.float().square().mean().backward()
    assert any(parameter.grad is not None for name, parameter in fresh.named_parameters() if ".vta_block." in name)


def test_a_loaded_adapter_is_trainable_only_if_asked_for(saved_of):
    saved = saved_of("dinov2")
    model = PeftModel.from_pretrained(saved.base(), saved.file(), is_trainable=True)
    model.load_adapter(saved.file("second"), "second")
    model.load_adapter(saved.file("second"), "third", is_trainable=True)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {
        name for name, _ in model.named_parameters() if ".vta_" in name and (".default." in name or ".third." in name)
    }
    for frozen in (loaded_by_transformers(saved), WAYS["auto"](saved), WAYS["peft_low_cpu"](saved)):
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
    plain = loaded_by_transformers(saved, is_trainable=True)
    assert {name for name, p in plain.named_parameters() if p.requires_grad} == {
        name for name, _ in plain.named_parameters() if ".vta_" in name
    }


def test_only_selected_adapters_are_saved(saved_of, tmp_path):
    saved = saved_of("dinov2")
    saved.model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["README.md", *FILES, "second"]
    assert (tmp_path / "second" / FILES[1]).read_bytes() == (saved.file("second") / FILES[1]).read_bytes()
    loaded = PeftModel.from_pretrained(saved.base(), tmp_path, subfolder="second")
    assert torch.equal(features_of(loaded, saved.images), saved.features["second"])
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        saved.model.save_pretrained(tmp_path, selected_adapters=["third"])


def test_the_config_file_holds_the_adapters_settings(saved_of):
    saved = saved_of("dinov2")
    for name in ("default", "second"):
        config = saved.model.peft_config[name]
        settings = json.loads((saved.file(name) / FILES[0]).read_text())
        automatic = {"base_model_class": "Dinov2Model", "parent_library": "transformers.models.dinov2.modeling_dinov2"}
        expected = config.to_dict() | {"peft_type": "VTA", "inference_mode": True, "auto_mapping": automatic}
        assert settings == expected
        assert settings["base_model_name_or_path"] == str(saved.folder / "base")
        loaded = PeftConfig.from_pretrained(saved.file(name))
        assert type(loaded) is VtaAdapterConfig
        loaded.inference_mode, loaded.auto_mapping = config.inference_mode, config.auto_mapping
        assert loaded == config
        assert VtaAdapterConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    "name", ["my-adapter_1", "vta_", "vta_adapter", "my_vta_x", "encoder", "bottleneck", "film", "0", "default2"]
)
def test_an_adapter_may_have_an_odd_name(saved_of, name, tmp_path):
    saved = saved_of("dinov2")
    model = PeftModel.from_pretrained(saved.base(), saved.file(), adapter_name=name)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / name / FILES[1]).keys() == load_file(saved.file() / FILES[1]).keys()
    for loaded in (
        PeftModel.from_pretrained(saved.base(), tmp_path / name, adapter_name=name, low_cpu_mem_usage=True),
        loaded_by_transformers(saved, adapter_name=name),
    ):
        assert torch.equal(features_of(loaded, saved.images), saved.features["default"])


@pytest.mark.parametrize("key", ["bottleneck.up.weight", "task_embeddings.0", "affinity"])
def test_a_tensor_that_a_file_lacks_is_reported(saved_of, key, tmp_path):
    saved = saved_of("dinov2")
    shutil.copytree(saved.file(), tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / FILES[1])
    lost = next(name for name in weights if name.endswith(key))
    del weights[lost]
    save_file(weights, tmp_path / FILES[1], metadata={"format": "pt"})
    head, attribute, tail = lost.partition(".vta_adapter." if ".vta_adapter." in lost else ".vta_shared.")
    for low in (False, True):
        with pytest.warns(UserWarning, match=f"missing adapter keys.*{head}{attribute}default.{tail}"):
            model = PeftModel.from_pretrained(saved.base(), tmp_path, low_cpu_mem_usage=low)
        assert model.load_adapter(tmp_path, "two").missing_keys == [f"{head}{attribute}two.{tail}"]
    report = saved.base().load_adapter(tmp_path)
    assert report.missing_keys == {f"{head}{attribute}default.{tail}".removeprefix("base_model.model.")}


@pytest.mark.pretrained
def test_dinov2_gives_the_same_features_through_every_way_of_loading(shared_folder, tmp_path):
    base, images = shared_folder / "models/dinov2-small", make_images((112, 112))
    vta = VtaModel.from_backbone(base, tasks=TASKS, num_labels=5, decoder_dim=16)
    expected = features_of(randomize(vta, std=0.02).eval().backbone, images)
    model = get_peft_model(AutoModel.from_pretrained(base), VtaAdapterConfig(tasks=TASKS))
    assert differ(features_of(model, images), expected)
    vta.save_adapter(tmp_path / "adapter")
    model.load_adapter(tmp_path / "adapter", "default")
    assert torch.equal(features_of(model, images), expected)
    (tmp_path / "base").symlink_to(base)
    saved = Saved(tmp_path, images, {}, model)
    ways = WAYS | {
        "peft": lambda s: PeftModel.from_pretrained(s.base(), s.file()),
        "peft_other_name": lambda s: PeftModel.from_pretrained(s.base(), s.file(), adapter_name="other"),
        "transformers": loaded_by_transformers,
    }
    # The file that save_adapter writes names no class of the backbone.
    del ways["auto_peft"]
    for way, load in ways.items():
        assert torch.equal(features_of(load(saved), images), expected), way
