"""Models and adapters go to a Hub and come back, through the real client and a server on this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline

from hub_server import HubServer, use_hub
from mt_adapters import VtaConfig, VtaImageProcessorPil, VtaModel
from mt_adapters.hub.card import COLUMNS, PICTURES, metrics_table
from mt_adapters.hub.record import describe
from tiny_models import FAMILIES, assert_same, logits_of, make_backbone, make_images, make_model, randomize

SIZE = FAMILIES["swin"].size
KINDS = {"semseg": "semseg", "depth": "depth", "normals": "normals", "edges": "edges"}
MODEL, ADAPTER, BASE = "org/vta-swin", "org/vta-swin-adapter", "org/swin"
ADAPTER_WEIGHTS = {
    "adapter_model.safetensors",
    "decoder.safetensors",
    *(f"task_{name}.safetensors" for name in KINDS),
}


def results(shift: float) -> dict:
    """Made up values of every metric that a card shows; of depth one that is not a number."""
    values = {
        task: {metric: shift + number / 7 for number, (metric, *_) in enumerate(COLUMNS[kind])}
        for task, kind in KINDS.items()
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
    return randomize(VtaModel.from_backbone(base, tasks=list(KINDS), num_labels=5, decoder_dim=16)).eval()


@pytest.fixture
def run_folder(model: VtaModel, tmp_path: Path) -> Path:
    """What a training leaves, with made up results."""
    folder = tmp_path / "run"
    model.save_pretrained(folder)
    height, width = SIZE
    processor = VtaImageProcessorPil(size={"height": height, "width": width}, tasks=model.config.tasks)
    processor.save_pretrained(folder)
    record = describe(model) | {
        "results": results(0.25),
        "input_blind": results(0.5),
        "mean_gain": 12.5,
        "evaluation": "5 validation images of rooms at 64 x 64 pixels",
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


def commits(hub: HubServer, repo_id: str) -> int:
    return len(HfApi().list_repo_commits(repo_id))


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


def test_a_second_push_changes_only_what_changed(hub, run_folder):
    model = VtaModel.from_pretrained(run_folder)
    model.push_to_hub(MODEL)
    before, num_uploads = hub.files(MODEL), hub.count("PUT")
    model.push_to_hub(MODEL)
    assert hub.files(MODEL) == before
    assert hub.count("PUT") == num_uploads
    assert hub.count("POST", f"{MODEL}/commit/") == 1, "nothing changed, so there is nothing to commit"

    with torch.no_grad():
        model.heads["depth"].bias.add_(1)
    model.name_or_path = ""
    model.push_to_hub(MODEL)
    after = hub.files(MODEL)
    # The results were those of other weights: they are gone, and so are the pictures.
    assert {name for name in before if before[name] != after.get(name)} == {
        "model.safetensors",
        "README.md",
        "metrics.json",
        *PICTURES,
    }
    assert after.keys() == before.keys() - {"metrics.json", *PICTURES}
    assert "Not evaluated" in after["README.md"].decode()


@pytest.mark.parametrize("what", ["PUT", r"/commit/"])
def test_an_interrupted_upload_leaves_the_repository_as_it_was(hub, run_folder, what):
    model = VtaModel.from_pretrained(run_folder)
    model.push_to_hub(MODEL)
    before = hub.files(MODEL)
    with torch.no_grad():
        model.heads["depth"].bias.add_(1)
    model.name_or_path = ""
    hub.fail = lambda method, path: 500 if what == method or what in path else False
    with pytest.raises((HfHubHTTPError, RuntimeError), match="500|while uploading"):
        model.push_to_hub(MODEL)
    assert hub.files(MODEL) == before
    hub.fail = lambda method, path: False
    assert_same(
        logits_of(AutoModel.from_pretrained(MODEL).eval(), make_images(SIZE)),
        logits_of(VtaModel.from_pretrained(run_folder).eval(), make_images(SIZE)),
    )
    model.push_to_hub(MODEL)
    assert_same(
        logits_of(AutoModel.from_pretrained(MODEL).eval(), make_images(SIZE)), logits_of(model, make_images(SIZE))
    )


def test_a_revision_stays_what_it_was(hub, run_folder):
    model = VtaModel.from_pretrained(run_folder).eval()
    first = logits_of(model, make_images(SIZE))
    model.push_to_hub(MODEL)
    commit = HfApi().model_info(MODEL).sha
    HfApi().create_tag(MODEL, tag="v1")
    with torch.no_grad():
        model.heads["depth"].bias.add_(1)
    model.name_or_path = ""
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
    model.push_adapter_to_hub(ADAPTER)
    files = hub.files(ADAPTER)
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


@pytest.mark.parametrize("tasks", [["parts"], [], ["depth", "depth"]])
def test_tasks_that_the_adapter_has_not_are_refused(base, model, tmp_path, tasks):
    model.save_adapter(tmp_path / "all")
    with pytest.raises(ValueError, match=r"the adapter has \['semseg', 'depth', 'normals', 'edges'\]: give a list"):
        VtaModel.from_adapter(tmp_path / "all", tasks=tasks)


@pytest.mark.parametrize("is_adapter", [False, True])
def test_the_card_is_valid_and_every_figure_is_the_records(hub, run_folder, is_adapter):
    model = VtaModel.from_pretrained(run_folder)
    repo_id = ADAPTER if is_adapter else MODEL
    model.push_adapter_to_hub(repo_id) if is_adapter else model.push_to_hub(repo_id)
    card = ModelCard.load(repo_id)
    card.validate()
    record = json.loads(hub.files(repo_id)["metrics.json"])
    assert card.data.library_name == ("peft" if is_adapter else "mt-adapters")
    assert card.data.base_model == BASE
    assert card.data.license == "apache-2.0"
    assert {"mt-adapters", *KINDS} <= set(card.data.tags)
    found = {(one.dataset_config, one.metric_name): one.metric_value for one in card.data.eval_results}
    expected = {
        (task, heading): record["results"][task][metric]
        for task, kind in KINDS.items()
        for metric, heading, *_ in COLUMNS[kind]
        if metric != "abs_rel"  # not a number
    }
    assert found == expected
    assert (
        metrics_table({"this model": record["results"], "input-blind": record["input_blind"]}, KINDS) in card.content
    )
    for text in ("import mt_adapters", record["command"], repo_id, "## Citation", "CC-BY 4.0", "seed (3)"):
        assert text in card.content or is_adapter and text == "import mt_adapters"
    for name in PICTURES:
        assert f"]({name})" in card.content
        assert hub.files(repo_id)[name] == (run_folder / name).read_bytes()


def test_results_of_other_weights_are_not_published(hub, run_folder):
    model = VtaModel.from_pretrained(run_folder)
    with torch.no_grad():
        model.heads["depth"].bias.add_(1)
    with pytest.raises(ValueError, match="measured with other weights"):
        model.push_to_hub(MODEL)
    assert MODEL not in hub.repositories
    with pytest.raises(ValueError, match=r"no readable metrics.json.*train_multitask.py"):
        model.push_to_hub(MODEL, run_folder=run_folder / "nowhere")


def test_a_model_and_an_adapter_do_not_share_a_repository(hub, run_folder):
    model = VtaModel.from_pretrained(run_folder)
    model.push_to_hub(MODEL)
    before = hub.files(MODEL)
    with pytest.raises(ValueError, match="holds a full model.*push an adapter to another repository"):
        model.push_adapter_to_hub(MODEL)
    model.push_adapter_to_hub(ADAPTER)
    with pytest.raises(ValueError, match="holds an adapter.*push a full model to another repository"):
        model.push_to_hub(ADAPTER)
    assert hub.files(MODEL) == before


def test_files_of_other_people_stay(hub, run_folder):
    HfApi().create_repo(MODEL)
    HfApi().upload_file(path_or_fileobj=b"notes", path_in_repo="notes.txt", repo_id=MODEL)
    VtaModel.from_pretrained(run_folder).push_to_hub(MODEL)
    assert hub.files(MODEL)["notes.txt"] == b"notes"


def test_a_backbone_from_a_folder_is_published_under_its_public_name_only(hub, base, tmp_path):
    model = VtaModel.from_backbone(tmp_path / "base", tasks=["depth"], decoder_dim=16)
    with pytest.raises(ValueError, match="folder .* of this machine.*base_model="):
        model.push_adapter_to_hub(ADAPTER)
    model.push_adapter_to_hub(ADAPTER, base_model=BASE)
    model.push_to_hub(MODEL)
    assert_same(
        logits_of(VtaModel.from_adapter(ADAPTER), make_images(SIZE)), logits_of(model.eval(), make_images(SIZE))
    )
    assert ModelCard.load(ADAPTER).data.base_model == BASE
    for repo_id in (ADAPTER, MODEL):
        for name, content in hub.files(repo_id).items():
            assert str(tmp_path).encode() not in content, name


def test_a_model_without_a_record_gets_a_card_of_what_is_known(hub):
    make_model("dinov2").push_to_hub(MODEL, license="cc-by-nc-4.0", private=True)
    card = ModelCard.load(MODEL)
    card.validate()
    assert card.data.license == "cc-by-nc-4.0"
    assert card.data.eval_results is None
    assert "Not evaluated" in card.content
    assert "The backbone started from random weights" in card.content
    files = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", ".gitattributes"}
    assert hub.files(MODEL).keys() == files


LOAD_IN_A_NEW_PROCESS = """
import sys
import torch
import mt_adapters
from PIL import Image
from mt_adapters import VtaModel
from transformers import AutoImageProcessor, AutoModel, pipeline

model_id, adapter_id, images = sys.argv[1:]
pixel_values = torch.load(images, weights_only=True)
with torch.no_grad():
    logits = {
        "model": AutoModel.from_pretrained(model_id).eval()(pixel_values).logits,
        "adapter": VtaModel.from_adapter(adapter_id)(pixel_values).logits,
        "task": VtaModel.from_adapter(adapter_id, tasks=["depth"])(pixel_values).logits,
    }
AutoImageProcessor.from_pretrained(adapter_id)
maps = pipeline("multitask-dense-prediction", model=model_id)(Image.new("RGB", (50, 40), "green"))
torch.save({"logits": logits, "tasks": list(maps), "size": maps["depth"]["picture"].size}, images)
"""
PUSH_IN_A_NEW_PROCESS = """
import sys
import mt_adapters
from transformers import AutoModel

model = AutoModel.from_pretrained(sys.argv[1])
model.push_to_hub(sys.argv[2])
model.push_adapter_to_hub(sys.argv[3])
"""


def run(program: str, *arguments: object, environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_one_process_pushes_and_a_new_one_with_an_empty_cache_loads(hub, run_folder, tmp_path):
    expected = logits_of(VtaModel.from_pretrained(run_folder).eval(), make_images(SIZE))
    run(PUSH_IN_A_NEW_PROCESS, run_folder, MODEL, ADAPTER, environment=hub.environment(tmp_path / "one"))
    images = tmp_path / "images.pt"
    torch.save(make_images(SIZE), images)
    run(LOAD_IN_A_NEW_PROCESS, MODEL, ADAPTER, images, environment=hub.environment(tmp_path / "two"))
    found = torch.load(images, weights_only=True)
    assert_same(found["logits"]["model"], expected)
    assert_same(found["logits"]["adapter"], expected)
    assert_same(found["logits"]["task"], {"depth": expected["depth"]})
    assert (found["tasks"], found["size"]) == (list(KINDS), (50, 40))
