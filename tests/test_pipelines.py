"""The pipeline gives what the model and its image processor give, for every kind of input, also in batches."""

import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import AutoModel, pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.pt_utils import KeyDataset

import mt_adapters.registration
from mt_adapters import VtaImageProcessorPil, VtaModel
from mt_adapters.pipelines import MultitaskDensePredictionPipeline
from tiny_models import ALL_TASKS, FAMILIES, make_backbone, make_model

SIZE = FAMILIES["dinov2"].size
TASK = "multitask-dense-prediction"
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model whose backbone, adapters and heads are all random."""
    torch.manual_seed(0)
    model = make_model("dinov2")
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    processor_of(model).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return pipeline(TASK, model=str(folder))


def processor_of(model: VtaModel, size: tuple[int, int] = SIZE) -> VtaImageProcessorPil:
    return VtaImageProcessorPil(tasks=model.config.tasks, size={"height": size[0], "width": size[1]})


def pixels(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    """Smooth random colours: noise would look alike in every corner, and after every turn."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


PICTURES = [pixels(40, 60), pixels(33, 21, seed=1), pixels(70, 64, seed=2)]


@torch.no_grad()
def expected_maps(pipe: Any, array: np.ndarray) -> dict[str, np.ndarray]:
    """By model and image processor, without the pipeline."""
    picture = Image.fromarray(array).convert("RGB")
    inputs = pipe.image_processor(picture, return_tensors="pt").to(pipe.model.dtype)
    (maps,) = pipe.image_processor.post_process(pipe.model(**inputs), target_sizes=[array.shape[:2]])
    return {name: map_.numpy() for name, map_ in maps.items()}


def assert_maps(found: dict[str, Any], expected: dict[str, np.ndarray], exact: bool = True) -> None:
    assert list(found) == list(expected)
    for name, map_ in expected.items():
        assert found[name]["map"].dtype == map_.dtype
        if exact:
            assert np.array_equal(found[name]["map"], map_), name
        elif map_.dtype == np.int64:
            assert found[name]["map"].shape == map_.shape
            assert (found[name]["map"] == map_).mean() > 0.99
        else:
            torch.testing.assert_close(torch.from_numpy(found[name]["map"]), torch.from_numpy(map_))


def test_maps_and_pictures_are_those_of_model_and_image_processor(pipe):
    assert isinstance(pipe, MultitaskDensePredictionPipeline)
    array = pixels()
    found = pipe(Image.fromarray(array))
    assert_maps(found, expected_maps(pipe, array))
    shapes = {name: (result["map"].shape, result["map"].dtype) for name, result in found.items()}
    assert shapes == {
        "semseg": ((40, 60), np.int64),
        "depth": ((40, 60), np.float32),
        "normals": ((3, 40, 60), np.float32),
        "edges": ((40, 60), np.float32),
    }
    for task in pipe.model.tasks:
        picture = found[task.name]["picture"]
        assert (picture.mode, picture.size) == ("RGB", (60, 40))
        colors = task.colorize(torch.from_numpy(found[task.name]["map"])).numpy()
        assert np.array_equal(np.asarray(picture), colors)
        assert len(np.unique(colors.reshape(-1, 3), axis=0)) > 1


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_pictures_of_different_sizes_go_in_one_batch_and_come_out_at_their_own(pipe, batch_size: int):
    seen = Counter()
    hook = pipe.model.decoder.register_forward_hook(lambda *_: seen.update(["decoder"]))
    found = pipe(PICTURES, batch_size=batch_size)
    hook.remove()
    assert len(found) == len(PICTURES)
    for result, array in zip(found, PICTURES, strict=True):
        assert_maps(result, expected_maps(pipe, array), exact=batch_size == 1)
    assert seen["decoder"] == len(ALL_TASKS) * -(-len(PICTURES) // batch_size)


class Pictures(Dataset):
    def __len__(self) -> int:
        return len(PICTURES)

    def __getitem__(self, index: int) -> np.ndarray:
        if index >= len(PICTURES):
            raise IndexError(index)
        return PICTURES[index]


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("form", ["generator", "dataset", "column of a dataset"])
def test_generators_and_datasets_give_one_result_after_another(pipe, form: str, batch_size: int):
    inputs = {
        "generator": (array for array in PICTURES),
        "dataset": Pictures(),
        "column of a dataset": KeyDataset([{"image": Image.fromarray(array)} for array in PICTURES], "image"),
    }[form]
    results = pipe(inputs, batch_size=batch_size, tasks=["depth", "semseg"])
    assert not isinstance(results, list)
    for result, array in zip(results, PICTURES, strict=True):
        expected = expected_maps(pipe, array)
        assert_maps(result, {name: expected[name] for name in ("depth", "semseg")}, exact=batch_size == 1)


@pytest.fixture(scope="module")
def pictures_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures")
    Image.fromarray(pixels()).save(path / "photo.png")
    (path / "text.jpg").write_text("no picture")
    for name in ("cut.jpg", "cut.png"):
        Image.fromarray(pixels(200, 300)).save(path / name)
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: len(data) // 2])
    return path


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url(pictures_folder: Path) -> Iterator[str]:
    """A web server on this machine, of the folder with pictures."""
    with HTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(pictures_folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("form", ["array", "picture", "path", "text", "url", "list"])
def test_a_picture_may_come_in_any_form(pipe, pictures_folder: Path, url: str, form: str):
    path = pictures_folder / "photo.png"
    inputs = {
        "array": pixels(),
        "picture": Image.open(path),
        "path": path,
        "text": str(path),
        "url": f"{url}/photo.png",
        "list": [path],
    }[form]
    found = pipe(inputs, timeout=10) if form == "url" else pipe(inputs)
    (result,) = found if form == "list" else [found]
    assert_maps(result, expected_maps(pipe, pixels()))


def test_no_pictures_give_no_results(pipe):
    assert pipe([]) == []


def test_a_photo_that_lies_on_its_side_is_turned_upright(pipe, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # turn by 90 degrees clockwise to see it upright
    Image.fromarray(pixels()).save(tmp_path / "turned.png", exif=exif)
    found = pipe(tmp_path / "turned.png")
    assert found["depth"]["map"].shape == (60, 40)
    assert found["depth"]["picture"].size == (40, 60)
    assert_maps(found, expected_maps(pipe, np.ascontiguousarray(np.rot90(pixels(), k=-1))))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pictures_of_other_modes_are_seen_as_rgb(pipe, mode: str):
    picture = Image.fromarray(pixels()).convert(mode)
    expected = expected_maps(pipe, np.asarray(picture.convert("RGB")))
    assert_maps(pipe(picture), expected)
    if mode != "P":
        assert_maps(pipe(np.asarray(picture)), expected)


@pytest.mark.parametrize("at", ["call", "construction"])
def test_only_the_tasks_that_are_asked_for_run(folder: Path, at: str):
    pipe = pipeline(TASK, model=str(folder), **({"tasks": ["edges"]} if at == "construction" else {}))
    seen: Counter[str] = Counter()
    for name, head in pipe.model.heads.items():
        head.register_forward_hook(lambda *_, name=name: seen.update([name]))
    found = pipe(pixels()) if at == "construction" else pipe(pixels(), tasks=["edges"])
    assert seen == {"edges": 1}
    assert_maps(found, {"edges": expected_maps(pipe, pixels())["edges"]})
    seen.clear()
    # A call decides for itself alone.
    assert list(pipe(pixels(), tasks=["normals", "depth"])) == ["normals", "depth"]
    assert seen == {"normals": 1, "depth": 1}
    assert list(pipe(pixels())) == (["edges"] if at == "construction" else list(ALL_TASKS))


@pytest.mark.parametrize("tasks", [["sky"], ["depth", "sky"], "depth", []])
def test_tasks_that_the_model_does_not_have_are_refused_and_its_own_listed(pipe, tasks: Any):
    message = r"give a list out of this model's tasks \['semseg', 'depth', 'normals', 'edges'\]"
    with pytest.raises(ValueError, match=message):
        pipe(pixels(), tasks=tasks)
    with pytest.raises(ValueError, match=message):
        pipeline(TASK, model=pipe.model, image_processor=pipe.image_processor, tasks=tasks)


def test_a_misspelt_parameter_is_an_error(pipe):
    with pytest.raises(TypeError, match="'taks'"):
        pipe(pixels(), taks=["depth"])


@pytest.mark.parametrize("name", ["text.jpg", "cut.jpg", "cut.png", "nowhere.jpg"])
def test_a_file_that_is_no_whole_picture_is_named(pipe, pictures_folder: Path, url: str, name: str):
    with pytest.raises(ValueError, match=rf"cannot read the picture '.*{name}'"):
        pipe(str(pictures_folder / name))
    with pytest.raises(ValueError, match=rf"cannot read the picture 'http://.*{name}'"):
        pipe(f"{url}/{name}")
    if name.startswith("cut"):
        with pytest.raises(ValueError, match=rf"cannot read the picture '.*{name}': .*truncated"):
            pipe(Image.open(pictures_folder / name))


@pytest.mark.parametrize(
    ("array", "came"),
    [
        (pixels().astype(np.float32), r"float32 with the shape \(40, 60, 3\)"),
        (pixels().transpose(2, 0, 1), r"uint8 with the shape \(3, 40, 60\)"),
        (pixels()[..., :2], r"\(40, 60, 2\)"),
        (pixels()[:0], r"\(0, 60, 3\)"),
    ],
)
def test_an_array_that_is_no_picture_is_refused(pipe, array: np.ndarray, came: str):
    with pytest.raises(ValueError, match=rf"{came}; it must be uint8, 0 to 255, with the shape \(H, W\)"):
        pipe(array)


def test_something_else_than_a_picture_is_refused(pipe):
    with pytest.raises(TypeError, match="Incorrect format"):
        pipe(3)


def test_a_model_of_another_kind_is_refused(pipe, tmp_path):
    backbone = make_backbone("dinov2")
    backbone.save_pretrained(tmp_path)
    pipe.image_processor.save_pretrained(tmp_path)
    for model in (backbone, str(tmp_path)):
        with pytest.raises(ValueError, match="the model is a Dinov2Model; this pipeline takes a VtaModel"):
            pipeline(TASK, model=model, image_processor=pipe.image_processor)


def test_a_model_in_memory_runs_where_it_is_and_in_eval_mode():
    model = make_model("dinov2", backbone_changes={"drop_path_rate": 0.9}).train()
    devices = {name: parameter.device for name, parameter in model.named_parameters()}
    pipe = pipeline(TASK, model=model, image_processor=processor_of(model), device="cpu")
    assert pipe.model is model
    assert not any(module.training for module in model.modules())
    assert_maps(pipe(pixels()), expected_maps(pipe, pixels()))
    assert {name: parameter.device for name, parameter in model.named_parameters()} == devices


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_bfloat16_model_gives_maps_of_the_same_types(tmp_path, batch_size: int):
    # Swin, unlike DINOv2, does not cast its input itself.
    model, size = make_model("swin"), FAMILIES["swin"].size
    model.save_pretrained(tmp_path)
    processor_of(model, size).save_pretrained(tmp_path)
    pipe = pipeline(TASK, model=str(tmp_path), dtype=torch.bfloat16)
    assert next(pipe.model.heads.parameters()).dtype == torch.bfloat16
    # Also at the size of the model's input, where nothing is resized.
    arrays = [*PICTURES[:2], pixels(*size)]
    for result, array in zip(pipe(arrays, batch_size=batch_size), arrays, strict=True):
        expected = expected_maps(pipe, array)
        assert {name: one["map"].dtype for name, one in result.items()} == {
            "semseg": np.int64,
            "depth": np.float32,
            "normals": np.float32,
            "edges": np.float32,
        }
        if batch_size == 1:
            assert_maps(result, expected)
        else:
            np.testing.assert_allclose(result["edges"]["map"], expected["edges"], atol=0.05)


def test_a_saved_pipeline_loads_again_without_remote_code(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    loaded = pipeline(TASK, model=str(tmp_path), local_files_only=True, trust_remote_code=False)
    assert_maps(loaded(pixels()), expected_maps(pipe, pixels()))


def test_it_loads_from_the_folder_of_a_full_model_or_of_an_adapter(tmp_path):
    make_backbone("dinov2").save_pretrained(tmp_path / "base")
    model = VtaModel.from_backbone(tmp_path / "base", tasks=["depth", "edges"], decoder_dim=16).eval()
    model.save_pretrained(tmp_path / "model")
    model.save_adapter(tmp_path / "adapter")
    for folder in ("model", "adapter"):
        processor_of(model).save_pretrained(tmp_path / folder)
    load = MultitaskDensePredictionPipeline.from_pretrained
    pipes = {
        "full": load(tmp_path / "model"),
        "adapter": load(str(tmp_path / "adapter")),
        "elsewhere": load(tmp_path / "adapter", backbone=tmp_path / "base"),
        "one task": load(tmp_path / "adapter", tasks=["edges"]),
    }
    assert pipes["one task"].model.task_names == ["edges"]
    expected = expected_maps(pipes["full"], PICTURES[0])
    for name, pipe in pipes.items():
        maps = {"edges": expected["edges"]} if name == "one task" else expected
        assert_maps(pipe(Image.fromarray(PICTURES[0])), maps)
    with pytest.raises(ValueError, match="holds a full model with a backbone of its own: give no other backbone"):
        load(tmp_path / "model", backbone=tmp_path / "base")
    with pytest.raises(ValueError, match="the adapter has"):
        load(tmp_path / "adapter", tasks=["semseg"])


def test_registering_again_changes_nothing(monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("registered twice")

    monkeypatch.setattr(PIPELINE_REGISTRY, "register_pipeline", refuse)
    mt_adapters.registration.register()
    entry = PIPELINE_REGISTRY.supported_tasks[TASK]
    assert (entry["impl"], entry["pt"], entry["type"]) == (MultitaskDensePredictionPipeline, (AutoModel,), "image")
