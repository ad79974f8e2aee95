"""A user's mistake raises a ValueError that names what came, what is allowed and how to mend it."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, ResNetConfig, ResNetModel

from mt_adapters import VtaAdapterConfig, VtaConfig, VtaModel
from tiny_models import FAMILIES, make_backbone, make_config, make_images, make_labels, make_model

SIZE = FAMILIES["dinov2"].size
families = pytest.mark.parametrize("family", FAMILIES)


class Folders:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.base, self.full, self.adapter = root / "base", root / "full", root / "adapter"

    def copy_to(self, root: Path) -> "Folders":
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        return Folders(root)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    torch.manual_seed(0)
    folders = Folders(tmp_path_factory.mktemp("good"))
    make_backbone("dinov2").save_pretrained(folders.base)
    model = VtaModel.from_backbone(folders.base, tasks=["depth", "edges"], decoder_dim=8)
    model.save_pretrained(folders.full)
    model.save_adapter(folders.adapter)
    return folders


@pytest.fixture
def folders(saved: Folders, tmp_path: Path) -> Folders:
    return saved.copy_to(tmp_path)


class WritesAFile:
    """A pickle that leaves a trace when anything loads it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.trace,)


LOADERS: dict[str, Callable[[Folders], object]] = {
    "from_backbone": lambda f: VtaModel.from_backbone(f.base, tasks=["depth"], decoder_dim=8),
    "from_pretrained": lambda f: VtaModel.from_pretrained(f.full),
    "auto": lambda f: AutoModel.from_pretrained(f.full),
    "from_adapter": lambda f: VtaModel.from_adapter(f.adapter, backbone=f.base),
}
# Whose weights, their file, and the loaders that read it.
FILES = [
    ("base/model.safetensors", "from_backbone"),
    ("base/model.safetensors", "from_adapter"),
    ("full/model.safetensors", "from_pretrained"),
    ("full/model.safetensors", "auto"),
    ("adapter/adapter_model.safetensors", "from_adapter"),
    ("adapter/decoder.safetensors", "from_adapter"),
    ("adapter/task_edges.safetensors", "from_adapter"),
]
PICKLES = {"model.safetensors": "pytorch_model.bin", "adapter_model.safetensors": "adapter_model.bin"}


@pytest.mark.parametrize("loader", LOADERS)
def test_the_good_folders_load(saved, loader):
    LOADERS[loader](saved)


@pytest.mark.parametrize(("file", "loader"), FILES)
@pytest.mark.parametrize("num_bytes", [4, -16])
def test_a_truncated_weight_file_is_named(folders, file, loader, num_bytes):
    path = folders.root / file
    if not path.exists():
        pytest.fail(f"save_adapter wrote no {file}")
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ValueError, match=rf"{file.split('/')[0]}.*truncated.*get it again"):
        LOADERS[loader](folders)


@pytest.mark.parametrize(("file", "loader"), FILES)
def test_a_weight_file_of_another_model_is_refused(folders, file, loader):
    save_file({"other.weight": torch.zeros(3)}, folders.root / file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"(?s)(lack \d+ tensors|does not fit).*(get both again|do not belong together)"
    ):
        LOADERS[loader](folders)


@pytest.mark.parametrize(("file", "loader"), FILES)
def test_a_tensor_of_another_shape_is_refused_with_both_shapes(folders, file, loader):
    tensors = load_file(folders.root / file)
    key = next(key for key in tensors if key.endswith("weight"))
    save_file(tensors | {key: torch.zeros(7)}, folders.root / file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"(?s){key}.*\(7,\).*\({tensors[key].shape[0]}.*(again|together)"):
        LOADERS[loader](folders)


@pytest.mark.parametrize(("file", "loader"), FILES)
def test_pickled_weights_are_refused_and_never_loaded(folders, file, loader):
    path, trace = folders.root / file, folders.root / "trace"
    path.unlink()
    for name in {PICKLES.get(path.name, "x.bin"), "pytorch_model.bin", "adapter_model.bin"}:
        (path.parent / name).write_bytes(pickle.dumps(WritesAFile(trace)))
    with pytest.raises(ValueError, match="safetensors"):
        LOADERS[loader](folders)
    assert not trace.exists()
    pickle.loads((path.parent / "pytorch_model.bin").read_bytes())
    assert trace.exists(), "the pickle must be one that leaves a trace"


@pytest.mark.parametrize("how", ["peft", "transformers"])
def test_other_loaders_do_not_run_a_pickled_adapter(folders, how):
    trace = folders.root / "trace"
    (folders.adapter / "adapter_model.safetensors").unlink()
    (folders.adapter / "adapter_model.bin").write_bytes(pickle.dumps(WritesAFile(trace)))
    base = AutoModel.from_pretrained(folders.base)
    with pytest.raises((pickle.UnpicklingError, OSError, ValueError)):
        PeftModel.from_pretrained(base, folders.adapter) if how == "peft" else base.load_adapter(folders.adapter)
    assert not trace.exists()


@pytest.mark.parametrize("loader", ["from_backbone", "from_pretrained", "from_adapter"])
def test_a_missing_folder_is_named(tmp_path, loader):
    with pytest.raises(ValueError, match=rf"(?s)cannot load '{tmp_path}.*Give a Hub id or a folder"):
        LOADERS[loader](Folders(tmp_path / "nowhere"))


def test_a_folder_without_our_files_is_no_adapter(folders):
    with pytest.raises(ValueError, match=r"base' has no vta_config.json: .*save_adapter"):
        VtaModel.from_adapter(folders.base)


def test_an_adapter_without_a_named_backbone_asks_for_one(tmp_path):
    model = make_model("dinov2", tasks=["depth"])
    model.save_adapter(tmp_path)
    with pytest.raises(ValueError, match=r"backbone without a name.*from_adapter\(\.\.\., backbone="):
        VtaModel.from_adapter(tmp_path)


@families
@pytest.mark.parametrize("other", ["same_family", "other_family"])
@pytest.mark.parametrize("how", ["peft", "transformers"])
def test_an_adapter_of_another_backbone_is_refused_with_both_shapes(tmp_path, family, other, how):
    make_model(family, tasks=["depth"]).save_adapter(tmp_path)
    changes = FAMILIES[family].other if other == "same_family" else {}
    wrong = make_backbone(family if changes else next(name for name in FAMILIES if name != family), **changes)
    loaders = {
        "peft": lambda: PeftModel.from_pretrained(wrong, tmp_path),
        "transformers": lambda: wrong.load_adapter(tmp_path),
    }
    with pytest.raises(ValueError, match=rf"made for a backbone with .*'{family}'.* but this one has .*load the back"):
        loaders[how]()


def test_tasks_in_another_order_than_the_adapters_are_refused(folders):
    message = r"the adapter has the tasks \['edges', 'depth'\], the model \['depth', 'edges'\].*order included"
    with pytest.raises(ValueError, match=message):
        make_model("dinov2", tasks=["depth", "edges"], adapter=VtaAdapterConfig(tasks=["edges", "depth"]))
    file = folders.adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tasks": ["edges", "depth"]}))
    with pytest.raises(ValueError, match=message):
        VtaModel.from_adapter(folders.adapter)


def test_an_unknown_backbone_type_is_refused_wherever_it_comes_in():
    message = r"unknown backbone type 'resnet'; known are \['beit', 'clip_vision_model', .*'vit'\]: use one"
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    for call in (
        lambda: VtaModel.from_backbone(config, tasks=["depth"]),
        lambda: VtaModel(VtaConfig(tasks=["depth"], backbone_config=config)),
        lambda: get_peft_model(ResNetModel(config), VtaAdapterConfig(tasks=["depth"])),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["deepth"]}, r"unknown task 'deepth'; known are \['semseg'"),
        ({"tasks": ["semseg"]}, "num_labels=0"),
        ({"tasks": [{"name": "depth", "loss": "l1"}]}, r"unknown setting 'loss'; a depth task has"),
        ({"tasks": []}, "at least one task"),
        ({"decoder": "unet"}, "unknown decoder 'unet'; known: fpn, swin_unet, linear"),
        ({"fan_out": "parallel"}, r"fan_out='parallel'; allowed are \['sequential', 'batched'\]"),
    ],
)
def test_a_wrong_setting_of_the_model_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VtaModel.from_backbone(make_config("dinov2"), **{"tasks": ["depth"]} | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"residual": "skip"}, r"residual='skip'; allowed are \['stream', 'figure'\]"),
        ({"norm_mode": "paper"}, r"norm_mode='paper'; allowed are \['slide', 'code'\]"),
        ({"embedding_dim": 0}, "embedding_dim=0; it must be at least 1"),
        ({"attention_grid": [7]}, r"attention_grid=\[7\]; give \[rows, columns\]"),
    ],
)
def test_a_wrong_setting_of_the_adapter_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VtaAdapterConfig(**settings)


@pytest.mark.parametrize("tasks", [None, [], ["depth", "depth"]])
def test_an_adapter_needs_tasks_with_different_names(tasks):
    with pytest.raises(ValueError, match=r"tasks=.*name at least one task, each once"):
        get_peft_model(make_backbone("dinov2"), VtaAdapterConfig(tasks=tasks))


def test_targets_that_are_no_blocks_are_refused():
    with pytest.raises(ValueError, match=r"'encoder.layer.0.mlp', which is no transformer block.*'encoder.layer.4'"):
        get_peft_model(make_backbone("dinov2"), VtaAdapterConfig(tasks=["depth"], target_modules=["layer.0.mlp"]))


@families
def test_an_image_below_the_window_or_patch_is_refused(family):
    height, width = FAMILIES[family].too_small
    images, model = make_images((height, width)), make_model(family)
    message = rf"the image is {height} x {width} pixels, .* needs at least \d+ x \d+: enlarge"
    with pytest.raises(ValueError, match=message):
        model(images)
    plain = get_peft_model(make_backbone(family), VtaAdapterConfig(tasks=["depth"]))
    with pytest.raises(ValueError, match=message):
        plain(images)


@pytest.mark.parametrize("shape", [(3, 56, 56), (1, 1, 56, 56)])
def test_pixel_values_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"pixel_values has the shape .*; it must be \(B, 3, H, W\)"):
        make_model("dinov2")(torch.zeros(shape))


def test_unknown_tasks_of_a_call_are_refused():
    model, labels = make_model("dinov2"), make_labels(SIZE)
    with pytest.raises(ValueError, match=r"unknown task 'parts'; give a list out of \['semseg', 'depth'"):
        model(make_images(SIZE), tasks=["depth", "parts"])
    with pytest.raises(ValueError, match=r"the text 'depth'; give a list out of .* e\.g\. \['depth'\]"):
        model(make_images(SIZE), tasks="depth")
    with pytest.raises(ValueError, match="labels for the unknown task 'parts'; this model has"):
        model(make_images(SIZE), labels={"parts": labels["semseg"]})


@pytest.mark.parametrize("kind", ["semseg", "depth", "normals", "edges"])
def test_a_label_of_another_size_is_refused(kind):
    with pytest.raises(ValueError, match=rf"labels\['{kind}'\] has the shape .* must have .*: resize labels"):
        make_model("dinov2")(make_images(SIZE), labels={kind: make_labels((28, 28))[kind]})


@families
@pytest.mark.parametrize(
    ("task_ids", "message"),
    [
        (None, r"serves 2 tasks: pass task_ids, a tensor \(B,\)"),
        (torch.tensor([0, 1]), r"shape \(2,\) .* give one integer per image: \(3,\)"),
        (torch.tensor([[0, 1, 1]]), r"shape \(1, 3\)"),
        (torch.tensor([0.0, 1.0, 0.0]), "type torch.float32; give one integer"),
        (torch.tensor([0, 2, 1]), r"\[0, 2, 1\] are out of range; the adapter has the tasks 0 .. 1"),
        (torch.tensor([0, -1, 1]), "out of range"),
    ],
)
def test_wrong_task_ids_are_refused(family, task_ids, message):
    model = get_peft_model(make_backbone(family), VtaAdapterConfig(tasks=["depth", "edges"]))
    images = make_images(FAMILIES[family].size, 3)
    with pytest.raises(ValueError, match=message):
        model(images, task_ids=task_ids)
    model(images, task_ids=torch.tensor([0, 1, 0]))
