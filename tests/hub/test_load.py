"""Models and adapters come from a Hub, a revision of it or the cache, through the real client."""

import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline

from hub_server import use_hub
from mt_adapters import VtaAdapterConfig, VtaConfig, VtaModel
from mt_adapters.hub.card import PICTURES
from tiny_models import FAMILIES, assert_same, logits_of, make_backbone, make_images, randomize

SIZE = FAMILIES["swin"].size
KINDS = {"semseg": "semseg", "depth": "depth", "normals": "normals", "edges": "edges"}
MODEL, ADAPTER, BASE = "org/vta-swin", "org/vta-swin-adapter", "org/swin"
ADAPTER_WEIGHTS = {
    "adapter_model.safetensors",
    "decoder.safetensors",
    *(f"task_{name}.safetensors" for name in KINDS),
}


def test_a_full_model_comes_back_from_one_commit(hub, run_folder, tmp_path):
    model = VtaModel.from_pretrained(run_folder)
    expected = logits_of(model, make_images(SIZE))
    url = model.push_to_hub(MODEL)
    assert MODEL in url
    assert hub.count("POST", f"{MODEL}/commit/") == 1
    files = hub.files(MODEL)
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", *PICTURES} <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".py"))]

    loaded = AutoModel.from_pretrained(MODEL).eval()
    assert isinstance(loaded, VtaModel)
    assert_same(logits_of(loaded, make_images(SIZE)), expected)
    assert isinstance(AutoConfig.from_pretrained(MODEL), VtaConfig)
    assert AutoImageProcessor.from_pretrained(MODEL).to_dict()["size"] == {"height": SIZE[0], "width": SIZE[1]}


def test_a_revision_stays_what_it_was(hub, run_folder):
    model = VtaModel.from_pretrained(run_folder).eval()
    first = logits_of(model, make_images(SIZE))
    model.push_to_hub(MODEL)
    commit = HfApi().model_info(MODEL).sha
    HfApi().create_tag(MODEL, tag="v1")
    with torch.no_grad():
        model.heads["depth"].bias.add_(1)
    second = logits_of(model, make_images(SIZE))
    model.push_to_hub(MODEL, commit_message="another bias")
    model.push_adapter_to_hub(ADAPTER)
    model.push_adapter_to_hub(ADAPTER, revision="next")
    for revision in (commit, "v1"):
        assert_same(logits_of(AutoModel.from_pretrained(MODEL, revision=revision).eval(), make_images(SIZE)), first)
        pinned = pipeline("multitask-dense-prediction", model=MODEL, revision=revision)
        assert torch.equal(pinned.model.heads["depth"].bias, model.heads["depth"].bias - 1)
    assert_same(logits_of(AutoModel.from_pretrained(MODEL).eval(), make_images(SIZE)), second)
    assert_same(logits_of(VtaModel.from_adapter(ADAPTER, revision="next"), make_images(SIZE)), second)


def test_the_cache_serves_model_and_adapter_offline(hub, run_folder, monkeypatch, tmp_path):
    model = VtaModel.from_pretrained(run_folder).eval()
    model.push_to_hub(MODEL)
    model.push_adapter_to_hub(ADAPTER)
    loaders = (
        lambda: AutoModel.from_pretrained(MODEL).eval(),
        lambda: VtaModel.from_adapter(ADAPTER),
        lambda: VtaModel.from_adapter(ADAPTER, tasks=["edges"]),
    )
    expected = [logits_of(load(), make_images(SIZE)) for load in loaders]
    hub.stop()
    use_hub(hub, monkeypatch, tmp_path / "hf_home", offline=True)
    for load, logits in zip(loaders, expected, strict=True):
        assert_same(logits_of(load(), make_images(SIZE)), logits)


def test_shards_other_types_and_device_maps_load(hub, run_folder):
    model = VtaModel.from_pretrained(run_folder).eval()
    expected = logits_of(model, make_images(SIZE))
    model.push_to_hub(MODEL, max_shard_size="50KB")
    shards = [name for name in hub.files(MODEL) if name.startswith("model-")]
    assert len(shards) > 2
    assert_same(logits_of(AutoModel.from_pretrained(MODEL).eval(), make_images(SIZE)), expected)
    for device_map in ("auto", {"": "cpu"}, {"backbone": "cpu", "decoder": "cpu", "heads": "cpu"}):
        loaded = AutoModel.from_pretrained(MODEL, device_map=device_map).eval()
        assert_same(logits_of(loaded, make_images(SIZE)), expected)
    half = AutoModel.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    assert half.heads["depth"].weight.dtype == torch.bfloat16
    assert half.affinity.dtype == torch.float32
    for task, logits in logits_of(half, make_images(SIZE).bfloat16()).items():
        torch.testing.assert_close(logits.float(), expected[task], rtol=0.1, atol=0.1 * expected[task].abs().max())

    model.push_to_hub(MODEL)
    files = hub.files(MODEL)
    assert "model.safetensors" in files
    assert not [name for name in files if name.startswith("model-") or name.endswith("index.json")], "left over shards"


def test_an_adapter_comes_back_with_its_heads_and_as_a_plain_peft_adapter(hub, run_folder):
    model = VtaModel.from_pretrained(run_folder).eval()
    expected = logits_of(model, make_images(SIZE))
    hub.put(ADAPTER, {"README.md": b"---\nlibrary_name: peft\n---\n\n# Model Card for Model ID\n"})
    model.push_adapter_to_hub(ADAPTER)
    files = hub.files(ADAPTER)
    assert b"Model Card for Model ID" not in files["README.md"], "a card that peft left there"
    assert ADAPTER_WEIGHTS == {name for name in files if name.endswith(".safetensors")}
    assert hub.count("POST", f"{ADAPTER}/commit/") == 1
    weights = sum(len(files[name]) for name in ADAPTER_WEIGHTS)
    backbone = sum(p.numel() for n, p in model.backbone.named_parameters() if "vta_" not in n)
    assert weights < sum(p.numel() * 4 for p in model.parameters()) - 0.9 * backbone * 4

    assert_same(logits_of(VtaModel.from_adapter(ADAPTER), make_images(SIZE)), expected)
    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(BASE), ADAPTER)
    auto = AutoModel.from_pretrained(ADAPTER)
    task_ids = torch.tensor([1, 3])
    with torch.no_grad():
        own, *others = (
            one.eval()(make_images(SIZE), task_ids=task_ids).last_hidden_state for one in (model.backbone, plain, auto)
        )
    for found in others:
        assert torch.equal(found, own)


@pytest.mark.parametrize("tasks", [["depth"], ["edges", "semseg"]])
def test_chosen_tasks_predict_the_same_and_the_files_of_others_are_not_fetched(hub, run_folder, tasks):
    model = VtaModel.from_pretrained(run_folder).eval()
    expected = logits_of(model, make_images(SIZE))
    model.push_adapter_to_hub(ADAPTER)
    hub.requests.clear()
    loaded = VtaModel.from_adapter(ADAPTER, tasks=tasks)
    assert loaded.task_names == tasks
    assert [*loaded.heads] == tasks
    assert_same(logits_of(loaded, make_images(SIZE)), {task: expected[task] for task in tasks})
    fetched = {name for name in KINDS if hub.count("GET", f"{ADAPTER}/resolve/.*task_{name}")}
    assert fetched == set(tasks)
    numbers = [model.task_names.index(task) for task in tasks]
    assert torch.equal(loaded.affinity, model.affinity[numbers][:, numbers])


def test_chosen_tasks_save_and_load_as_an_adapter_of_their_own(base, model, tmp_path):
    model.save_adapter(tmp_path / "all")
    some = VtaModel.from_adapter(tmp_path / "all", tasks=["normals", "depth"])
    some.save_adapter(tmp_path / "some")
    again = VtaModel.from_adapter(tmp_path / "some", tasks=["depth"])
    expected = logits_of(model, make_images(SIZE))
    assert_same(logits_of(again, make_images(SIZE)), {"depth": expected["depth"]})


@pytest.mark.parametrize("adapter", [LoraConfig(target_modules=["q_proj", "v_proj"]), VtaAdapterConfig()], ids=type)
def test_chosen_tasks_load_from_any_kind_of_adapter_and_onto_another_backbone(base, tmp_path, adapter):
    model = randomize(VtaModel.from_backbone(base, tasks=list(KINDS), num_labels=5, decoder_dim=16, adapter=adapter))
    expected = logits_of(model.eval(), make_images(SIZE))
    model.save_adapter(tmp_path / "all")
    some = VtaModel.from_adapter(tmp_path / "all", tasks=["normals"])
    assert_same(logits_of(some, make_images(SIZE)), {"normals": expected["normals"]})
    other = make_backbone("swin", **FAMILIES["swin"].other_grid)
    moved, report = VtaModel.from_adapter(
        tmp_path / "all", backbone=other, tasks=["normals"], output_loading_info=True
    )
    assert moved.task_names == ["normals"]
    assert report.is_complete
    assert logits_of(moved, make_images((128, 128))).keys() == {"normals"}


@pytest.mark.parametrize(
    ("repository", "first", "load"),
    [
        (ADAPTER, "vta_config.json", lambda: VtaModel.from_adapter(ADAPTER)),
        (MODEL, "/config.json", lambda: VtaModel.from_pretrained(MODEL)),
        (BASE, "/config.json", lambda: VtaModel.from_adapter(ADAPTER)),
    ],
    ids=["adapter", "model", "backbone"],
)
def test_all_files_of_one_load_are_of_one_commit_also_when_another_comes_in_between(
    hub, run_folder, repository, first, load, monkeypatch, tmp_path
):
    model = VtaModel.from_pretrained(run_folder).eval()
    expected = logits_of(model, make_images(SIZE))
    model.push_adapter_to_hub(ADAPTER)
    model.push_to_hub(MODEL)
    broken = dict.fromkeys(hub.files(repository), b"")

    def another_push(method: str, path: str) -> bool:
        if f"{repository}/resolve/" in path and first in path and hub.files(repository) != broken:
            hub.put(repository, broken)
        return False

    hub.fail = another_push
    use_hub(hub, monkeypatch, tmp_path / "empty")
    assert_same(logits_of(load(), make_images(SIZE)), expected)
    assert hub.files(repository) == broken


@pytest.mark.parametrize("tasks", [["parts"], [], ["depth", "depth"]])
def test_tasks_that_the_adapter_has_not_are_refused(base, model, tmp_path, tasks):
    model.save_adapter(tmp_path / "all")
    with pytest.raises(ValueError, match=r"the adapter has \['semseg', 'depth', 'normals', 'edges'\]: give a list"):
        VtaModel.from_adapter(tmp_path / "all", tasks=tasks)


LOAD_IN_A_NEW_PROCESS = """
import json
import sys
import torch
import mt_adapters
from PIL import Image
from safetensors.torch import load_file, save_file
from mt_adapters import VtaModel
from transformers import AutoImageProcessor, AutoModel, pipeline

model_id, adapter_id, images = sys.argv[1:]
pixel_values = load_file(images)["pixel_values"]
with torch.no_grad():
    logits = {
        "model": AutoModel.from_pretrained(model_id).eval()(pixel_values).logits,
        "adapter": VtaModel.from_adapter(adapter_id)(pixel_values).logits,
        "task": VtaModel.from_adapter(adapter_id, tasks=["depth"])(pixel_values).logits,
    }
AutoImageProcessor.from_pretrained(adapter_id)
maps = pipeline("multitask-dense-prediction", model=model_id)(Image.new("RGB", (50, 40), "green"))
save_file({f"{name}.{task}": map_ for name, maps in logits.items() for task, map_ in maps.items()}, images)
print(json.dumps([list(maps), maps["depth"]["picture"].size]))
"""
PUSH_IN_A_NEW_PROCESS = """
import sys
import mt_adapters
from transformers import AutoModel

model = AutoModel.from_pretrained(sys.argv[1])
model.push_to_hub(sys.argv[2])
model.push_adapter_to_hub(sys.argv[3])
"""


def run(program: str, *arguments: object, environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_one_process_pushes_and_a_new_one_with_an_empty_cache_loads(hub, run_folder, tmp_path):
    expected = logits_of(VtaModel.from_pretrained(run_folder).eval(), make_images(SIZE))
    run(PUSH_IN_A_NEW_PROCESS, run_folder, MODEL, ADAPTER, environment=hub.environment(tmp_path / "one"))
    images = tmp_path / "images.safetensors"
    save_file({"pixel_values": make_images(SIZE)}, images)
    printed = run(LOAD_IN_A_NEW_PROCESS, MODEL, ADAPTER, images, environment=hub.environment(tmp_path / "two"))
    assert json.loads(printed.splitlines()[-1]) == [list(KINDS), [50, 40]]
    found = load_file(images)
    whole = {f"{name}.{task}": logits for name in ("model", "adapter") for task, logits in expected.items()}
    assert found.keys() == {*whole, "task.depth"}
    for name, logits in (whole | {"task.depth": expected["depth"]}).items():
        assert torch.equal(found[name], logits), name
