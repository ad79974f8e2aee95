"""What a hostile or broken repository holds is refused with a clear error, and none of its code runs."""

import json
import pickle
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline

from hub_server import HubServer
from mt_adapters import VtaImageProcessorPil, VtaModel
from tiny_models import FAMILIES, make_backbone, make_images, randomize

MODEL, ADAPTER, BASE = "org/model", "org/adapter", "org/base"
SIZE = FAMILIES["swin"].size
Files = dict[str, bytes]


class RunsWhenLoaded:
    """A pickle that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.trace,)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """The files of a backbone, a full model and an adapter that load."""
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    backbone = make_backbone("swin")
    backbone.save_pretrained(folder / BASE)
    model = randomize(VtaModel.from_backbone(folder / BASE, tasks=["depth", "edges"], decoder_dim=8))
    model.config.backbone_name_or_path = BASE
    processor = VtaImageProcessorPil(tasks=model.config.tasks, size={"height": SIZE[0], "width": SIZE[1]})
    model.save_pretrained(folder / MODEL)
    model.save_adapter(folder / ADAPTER)
    for name in (MODEL, ADAPTER):
        processor.save_pretrained(folder / name)
    return {
        name: {file.name: file.read_bytes() for file in (folder / name).iterdir()} for name in (BASE, MODEL, ADAPTER)
    }


LOADERS: dict[str, tuple[str, Callable[[], object]]] = {
    "AutoModel": (MODEL, lambda: AutoModel.from_pretrained(MODEL)),
    "from_pretrained": (MODEL, lambda: VtaModel.from_pretrained(MODEL)),
    "pipeline": (MODEL, lambda: pipeline("multitask-dense-prediction", model=MODEL)),
    "from_adapter": (ADAPTER, lambda: VtaModel.from_adapter(ADAPTER)),
    "from_backbone": (BASE, lambda: VtaModel.from_backbone(BASE, tasks=["depth"], decoder_dim=8)),
}
CONFIGS = {MODEL: "config.json", ADAPTER: "vta_config.json", BASE: "config.json"}
WEIGHTS = {MODEL: "model.safetensors", ADAPTER: "adapter_model.safetensors", BASE: "model.safetensors"}
loaders = pytest.mark.parametrize("loader", LOADERS)
own_loaders = pytest.mark.parametrize("loader", [name for name in LOADERS if name != "from_backbone"])


@pytest.fixture
def served(hub: HubServer, good: dict[str, Files]) -> Callable[..., Callable[[], object]]:
    """Serves the good files with changes to those of one loader, and gives that loader."""

    def serve(loader: str, change: Callable[[Files], object] = lambda files: None) -> Callable[[], object]:
        repository, load_it = LOADERS[loader]
        for name, files in good.items():
            files = dict(files)
            if name == repository:
                change(files)
            hub.put(name, files)
        return load_it

    return serve


def edit_json(name: str, **changes: object) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        files[name] = json.dumps(json.loads(files[name]) | changes).encode()

    return change


def edit_backbone(repository: str, **changes: object) -> Callable[[Files], None]:
    """Changes the settings of the backbone in a repository's config."""

    def change(files: Files) -> None:
        name = CONFIGS[repository]
        config = json.loads(files[name])
        (config if repository == BASE else config["backbone_config"]).update(changes)
        files[name] = json.dumps(config).encode()

    return change


@loaders
def test_the_good_files_load(served, loader):
    served(loader)()


@loaders
def test_pickled_weights_are_refused_and_not_loaded(served, loader, tmp_path):
    trace = tmp_path / "trace"
    evil = pickle.dumps(RunsWhenLoaded(trace))

    def only_pickles(files: Files) -> None:
        for name in [name for name in files if name.endswith(".safetensors")]:
            del files[name]
        files |= {"pytorch_model.bin": evil, "adapter_model.bin": evil, "task_depth.bin": evil}

    with pytest.raises(ValueError, match="safetensors"):
        served(loader, only_pickles)()
    assert not trace.exists()
    pickle.loads(evil)
    assert trace.exists(), "the pickle must be one that leaves a trace"


@loaders
def test_a_pickle_under_the_name_of_safetensors_is_refused(served, loader, tmp_path):
    repository, _ = LOADERS[loader]
    evil = pickle.dumps(RunsWhenLoaded(tmp_path / "trace"))
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        served(loader, lambda files: files.update({WEIGHTS[repository]: evil}))()
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("loader", ["AutoModel", "from_pretrained", "from_backbone"])
@pytest.mark.parametrize(
    "shard", ["pytorch_model.bin", "../other/model.safetensors", "/model.safetensors", "a/b.safetensors"]
)
def test_an_index_that_names_other_files_is_refused(served, hub, loader, shard, tmp_path):
    def sharded(files: Files) -> None:
        keys = load(files.pop("model.safetensors"))
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, shard)}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
        files["pytorch_model.bin"] = pickle.dumps(RunsWhenLoaded(tmp_path / "trace"))

    with pytest.raises(ValueError, match=r"index.json names the file .*safetensors files beside it only"):
        served(loader, sharded)()
    assert not (tmp_path / "trace").exists()
    assert not hub.count("GET", "pytorch_model.bin")


def code(trace: Path) -> bytes:
    return f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nclass Evil:\n    pass\n".encode()


AUTO_MAP = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoImageProcessor": "evil.Evil"}


@own_loaders
@pytest.mark.parametrize(
    "settings",
    [
        {"auto_map": AUTO_MAP},
        {"custom_pipelines": {"multitask-dense-prediction": {"impl": "evil.Evil", "pt": ["AutoModel"]}}},
        {"transformers_weights": "adapter_model.bin"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"attn_implementation": "org/evil"},
        {"_attn_implementation": "org/evil"},
        {"kernel_config": {"a": "org/evil"}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_config_that_asks_for_code_or_other_weights_is_refused(served, hub, loader, settings, tmp_path):
    repository, _ = LOADERS[loader]

    def change(files: Files) -> None:
        edit_json(CONFIGS[repository], **settings)(files)
        files["evil.py"] = code(tmp_path / "trace")

    with pytest.raises(ValueError, match=next(iter(settings)) + "|remote code|custom"):
        served(loader, change)()
    assert not (tmp_path / "trace").exists()
    assert not hub.count("GET", "evil.py")


@own_loaders
@pytest.mark.parametrize("dtype", ["load", "evil/kernel"])
def test_a_number_type_that_is_none_is_refused(served, loader, dtype):
    repository, _ = LOADERS[loader]
    with pytest.raises(ValueError, match=f"the config has dtype='{dtype}'"):
        served(loader, edit_json(CONFIGS[repository], dtype=dtype))()


@own_loaders
def test_code_named_in_the_backbones_part_of_a_config_is_refused(served, hub, loader):
    repository, _ = LOADERS[loader]
    with pytest.raises(ValueError, match="the config has 'auto_map'"):
        served(loader, edit_backbone(repository, auto_map=AUTO_MAP))()


@pytest.mark.parametrize("model_type", ["swin", "a_new_type"])
def test_a_backbones_code_is_not_run_and_nobody_is_asked(served, hub, tmp_path, monkeypatch, model_type):
    def change(files: Files) -> None:
        edit_json("config.json", auto_map=AUTO_MAP, model_type=model_type)(files)
        files["evil.py"] = code(tmp_path / "trace")

    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("a question to the user"))
    load_it = served("from_backbone", change)
    if model_type == "swin":
        load_it()  # the library's own class
    else:
        with pytest.raises(ValueError, match="trust_remote_code|custom code"):
            load_it()
    assert not (tmp_path / "trace").exists()
    assert not hub.count("GET", "evil.py")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "transformers_weights"])
def test_a_backbones_config_names_no_code_or_weights_of_other_places(served, hub, key):
    with pytest.raises(ValueError, match="asks for 'org/evil'; attention is this machine's own"):
        served("from_backbone", edit_json("config.json", **{key: "org/evil"}))()
    assert not [path for _, path in hub.requests if "evil" in path]


def test_an_image_processors_code_is_refused(served, hub, tmp_path):
    def change(files: Files) -> None:
        edit_json("preprocessor_config.json", auto_map=AUTO_MAP)(files)
        files["evil.py"] = code(tmp_path / "trace")

    served("AutoModel", change)
    with pytest.raises(ValueError, match="the image processor's config has 'auto_map'"):
        AutoImageProcessor.from_pretrained(MODEL)
    assert not (tmp_path / "trace").exists()
    assert not hub.count("GET", "evil.py")


@loaders
def test_file_names_that_lead_out_of_the_repository_are_not_fetched(served, hub, loader, tmp_path):
    names = [
        "../../evil.safetensors",
        "task_/../../../evil.safetensors",
        "/etc/evil",
        "adapter_model.safetensors/../x",
    ]
    served(loader, lambda files: files.update(dict.fromkeys(names, b"evil")))()
    assert not [path for _, path in hub.requests if "evil" in path or path.endswith("/x")]
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("name", ["../../evil", "a/b", "depth.", "", "DEPTH", "x" * 3 + "\n"])
@pytest.mark.parametrize("loader", ["AutoModel", "from_adapter"])
def test_a_task_with_the_name_of_a_path_is_refused(served, loader, name):
    repository, _ = LOADERS[loader]
    tasks = [{"name": name, "type": "depth"}, {"name": "edges", "type": "edges"}]
    with pytest.raises(ValueError, match="cannot be the name of a task"):
        served(loader, edit_json(CONFIGS[repository], tasks=tasks))()


@loaders
@pytest.mark.parametrize("num_bytes", [4, 100, -16])
def test_a_truncated_weight_file_is_named(served, loader, num_bytes):
    repository, _ = LOADERS[loader]

    def cut(files: Files) -> None:
        files[WEIGHTS[repository]] = files[WEIGHTS[repository]][:num_bytes]

    with pytest.raises(ValueError, match=rf"'{repository}'.*truncated.*get it again"):
        served(loader, cut)()


def test_a_header_that_declares_more_than_the_file_holds_is_refused(served):
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode()
    file = struct.pack("<Q", len(header)) + header
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        served("AutoModel", lambda files: files.update({"model.safetensors": file}))()


@own_loaders
def test_an_unknown_task_is_refused(served, loader):
    repository, _ = LOADERS[loader]
    change = edit_json(CONFIGS[repository], tasks=[{"name": "odour", "type": "odour"}])
    with pytest.raises(ValueError, match=r"unknown task 'odour'; known are \['semseg'"):
        served(loader, change)()


HUGE = [
    {"embed_dim": 24 * 10**8},
    {"depths": [2, 2, 10**9, 2]},
    {"depths": [2, 2, -1, 2]},
    {"window_size": 10**7},
    {"embed_dim": 10**18},
    {"mlp_ratio": 1e12},
]


# An adapter's files hold nothing of the backbone's MLPs, and nothing is built after its config's word for them.
@pytest.mark.parametrize(
    ("loader", "changes"),
    [
        (loader, changes)
        for loader in LOADERS
        for changes in HUGE
        if loader != "from_adapter" or "mlp_ratio" not in changes
    ],
    ids=str,
)
def test_a_backbone_of_a_huge_declared_shape_gets_no_memory(served, loader, changes):
    repository, _ = LOADERS[loader]
    load_it = served(loader, edit_backbone(repository, **changes))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="do not belong together|no model that can be built|asks for .* blocks"):
        load_it()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize("loader", ["AutoModel", "from_pretrained", "from_adapter"])
@pytest.mark.parametrize("changes", [{"decoder_dim": 10**9}, {"decoder_dim": 10**18}], ids=str)
def test_a_decoder_of_a_huge_declared_shape_gets_no_memory(served, loader, changes):
    repository, _ = LOADERS[loader]
    load_it = served(loader, edit_json(CONFIGS[repository], **changes))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="do not belong together|no model that can be built"):
        load_it()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize("changes", [{"embedding_dim": 10**10}, {"attention_grid": [10**5, 10**5]}], ids=str)
def test_an_adapter_of_a_huge_declared_shape_gets_no_memory(served, changes):
    load_it = served("from_adapter", edit_json("adapter_config.json", **changes))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="do not belong together|no model that can be built"):
        load_it()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize(
    "settings", [{"megatron_config": {"a": 1}, "megatron_core": "evil"}, {"peft_type": "EVIL"}], ids=str
)
def test_an_adapters_settings_import_nothing_and_are_of_a_known_type(served, settings):
    with pytest.raises(ValueError, match="the config has 'megatron_config'|unknown adapter type 'EVIL'"):
        served("from_adapter", edit_json("adapter_config.json", **settings))()


def test_an_adapter_for_another_backbone_is_refused(served, hub, tmp_path):
    served("from_adapter")
    make_backbone("swin", **FAMILIES["swin"].other).save_pretrained(tmp_path / "other")
    hub.put(BASE, {file.name: file.read_bytes() for file in (tmp_path / "other").iterdir()})
    message = r"made for a backbone with .* but this one has .*load the back"
    with pytest.raises(ValueError, match=message):
        VtaModel.from_adapter(ADAPTER)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(AutoModel.from_pretrained(BASE), ADAPTER)


@pytest.mark.parametrize("name", ["vta_config.json", "adapter_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null"])
def test_a_damaged_config_of_an_adapter_is_named(served, name, content):
    with pytest.raises(ValueError, match=rf"{name} of '{ADAPTER}' is damaged"):
        served("from_adapter", lambda files: files.update({name: content}))()


@own_loaders
def test_a_config_without_a_backbone_is_refused(served, loader):
    repository, _ = LOADERS[loader]
    with pytest.raises(ValueError, match="config has no backbone_config"):
        served(loader, edit_json(CONFIGS[repository], backbone_config=None))()


def test_the_wrong_kind_of_repository_is_explained(served):
    served("AutoModel")
    with pytest.raises(ValueError, match=r"'org/model' has no vta_config.json"):
        VtaModel.from_adapter(MODEL)
    with pytest.raises(ValueError, match=r"'org/adapter' holds an adapter.*VtaModel.from_adapter"):
        VtaModel.from_pretrained(ADAPTER)
    with pytest.raises(ValueError, match=r"config of a 'swin' model.*VtaModel.from_backbone"):
        VtaModel.from_pretrained(BASE)


@pytest.mark.parametrize("load_it", [VtaModel.from_pretrained, VtaModel.from_adapter], ids=["model", "adapter"])
def test_a_repository_or_revision_that_is_not_there_is_named(served, load_it):
    served("AutoModel")
    with pytest.raises(ValueError, match="cannot load 'org/nothing'"):
        load_it("org/nothing")
    with pytest.raises(ValueError, match="cannot load 'org/(model|adapter)'"):
        load_it(MODEL if load_it == VtaModel.from_pretrained else ADAPTER, revision="nothing")


def test_a_config_alone_loads_without_weights(served):
    served("AutoModel")
    assert AutoConfig.from_pretrained(MODEL).tasks[0]["name"] == "depth"
    assert VtaModel.from_adapter(ADAPTER)(make_images(SIZE)).logits["depth"].shape == (2, 1, *SIZE)
