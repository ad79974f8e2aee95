"""The image processor: pictures in, maps in the labels' units out."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor

from mt_adapters import MultitaskOutput, VtaImageProcessorPil
from tiny_models import ALL_TASKS, FAMILIES, logits_of, make_images, make_model

SIZE = FAMILIES["dinov2"].size


@pytest.fixture
def processor() -> VtaImageProcessorPil:
    model = make_model("dinov2")
    return VtaImageProcessorPil(tasks=model.config.tasks, size={"height": SIZE[0], "width": SIZE[1]})


def test_it_loads_through_auto_with_its_tasks_and_size(processor, tmp_path):
    make_model("dinov2").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, VtaImageProcessorPil)
    assert loaded.to_dict() == processor.to_dict()
    assert [task["name"] for task in loaded.tasks] == list(ALL_TASKS)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    pixels = [one(picture, return_tensors="pt")["pixel_values"] for one in (processor, loaded)]
    assert torch.equal(*pixels)
    assert pixels[0].shape == (1, 3, *SIZE)


def test_pixels_are_normalised_with_imagenets_mean_and_deviation(processor):
    color = (255, 0, 128)
    pixels = processor(Image.new("RGB", SIZE, color), return_tensors="pt")["pixel_values"]
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        expected = (color[channel] / 255 - mean) / std
        torch.testing.assert_close(pixels[0, channel], torch.full(SIZE, expected), rtol=1e-4, atol=1e-4)


def test_post_process_gives_maps_in_the_labels_units_at_each_images_size(processor):
    logits = logits_of(make_model("dinov2"), make_images(SIZE))
    sizes = [(40, 60), (99, 31)]
    for outputs in (logits, MultitaskOutput(logits=logits)):
        maps = processor.post_process(outputs, target_sizes=sizes)
        for image, size in zip(maps, sizes, strict=True):
            assert list(image) == list(ALL_TASKS)
            assert image["semseg"].shape == image["depth"].shape == image["edges"].shape == size
            assert image["normals"].shape == (3, *size)
            assert image["semseg"].dtype == torch.int64
            assert image["semseg"].max() < 5
            assert (image["depth"] > 0).all()
            torch.testing.assert_close(image["normals"].norm(dim=0), torch.ones(size))
            assert image["edges"].min() >= 0
            assert image["edges"].max() <= 1
    own_size = processor.post_process(logits)
    for index, image in enumerate(own_size):
        assert torch.equal(image["semseg"], logits["semseg"][index].argmax(dim=0))
        assert torch.equal(image["edges"], logits["edges"][index, 0].sigmoid())


def test_a_task_that_the_processor_does_not_know_is_refused(processor):
    with pytest.raises(ValueError, match=r"does not know the task 'parts'.*'depth'.*VtaImageProcessorPil\(tasks="):
        processor.post_process({"parts": torch.zeros(1, 5, 4, 4)})
    with pytest.raises(ValueError, match="does not know the task 'depth'"):
        VtaImageProcessorPil().post_process({"depth": torch.zeros(1, 1, 4, 4)})


def test_one_size_per_image_is_asked_for(processor):
    with pytest.raises(ValueError, match="2 sizes for 1 images; give one per image"):
        processor.post_process({"depth": torch.zeros(1, 1, 4, 4)}, target_sizes=[(4, 4), (4, 4)])


TWO_OF_A_KIND = [
    {"name": "parts", "type": "semseg", "num_labels": 3},
    {"name": "semseg", "num_labels": 4},
    "depth",
    "normals",
    "edges",
]
CHANNELS = {"parts": 3, "semseg": 4, "depth": 1, "normals": 3, "edges": 1}
# Method, task, and what it gives for logits (1,K,H,W) at the target size.
METHODS = {
    "parts": ("semantic_segmentation", lambda logits: logits.argmax(dim=1)[0]),
    "semseg": ("semantic_segmentation", lambda logits: logits.argmax(dim=1)[0]),
    "depth": ("depth_estimation", lambda logits: {"predicted_depth": logits[0, 0].clamp(min=1e-3)}),
    "normals": ("normal_estimation", lambda logits: {"normals": (logits / logits.norm(dim=1, keepdim=True))[0]}),
    "edges": ("edge_detection", lambda logits: {"edges": 1 / (1 + (-logits[0, 0]).exp())}),
}


def random_logits() -> dict[str, Tensor]:
    return {name: torch.randn(2, channels, 6, 8) for name, channels in CHANNELS.items()}


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_each_kind_has_a_method_with_transformers_name_and_return_type(name: str, as_tensor: bool):
    method, expected = METHODS[name]
    post_process = getattr(VtaImageProcessorPil(tasks=TWO_OF_A_KIND), f"post_process_{method}")
    logits, sizes = random_logits(), [(11, 17), (5, 4)]
    options: dict[str, Any] = {"task_name": name} if name in ("parts", "semseg") else {}
    outputs = MultitaskOutput(logits=logits)
    found = post_process(outputs, torch.tensor(sizes) if as_tensor else sizes, **options)
    assert len(found) == 2
    for index, (result, size) in enumerate(zip(found, sizes, strict=True)):
        resized = F.interpolate(logits[name][index : index + 1], size=size, mode="bilinear")
        torch.testing.assert_close(result, expected(resized))
    for index, result in enumerate(post_process(outputs, **options)):
        torch.testing.assert_close(result, expected(logits[name][index : index + 1]))


def test_the_only_task_of_a_kind_needs_no_name_and_several_are_listed():
    processor, logits = VtaImageProcessorPil(tasks=TWO_OF_A_KIND), random_logits()
    with pytest.raises(ValueError, match=r"task_name is None; .*semseg tasks .*\['parts', 'semseg'\]"):
        processor.post_process_semantic_segmentation(logits)
    with pytest.raises(ValueError, match=r"task_name is 'depth'; .*semseg tasks .*\['parts', 'semseg'\]"):
        processor.post_process_semantic_segmentation(logits, task_name="depth")
    del logits["semseg"], logits["normals"]
    assert torch.equal(processor.post_process_semantic_segmentation(logits)[1], logits["parts"][1].argmax(dim=0))
    with pytest.raises(ValueError, match=r"normals tasks of the outputs, which are \[\]"):
        processor.post_process_normal_estimation(logits)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ({"height": 10**9, "width": 224}, "1000000000"),
        ({"height": 224, "width": 16385}, "16385"),
        ({"height": 0, "width": 224}, "0"),
        ({"height": -3, "width": 224}, "-3"),
        ({"height": 224.5, "width": 224}, "224.5"),
        ({"shortest_edge": 10**9}, "1000000000"),
        (10**9, "1000000000"),
    ],
)
def test_an_absurd_size_is_refused_when_made_loaded_or_set(processor, tmp_path, size: Any, shown: str):
    message = rf"size is .*{shown}.*whole numbers of pixels from 1 to 16384"
    with pytest.raises(ValueError, match=message):
        VtaImageProcessorPil(size=size)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": size}))
    with pytest.raises(ValueError, match=message):
        VtaImageProcessorPil.from_pretrained(tmp_path)
    processor.size = size
    with pytest.raises(ValueError, match=message):
        processor(Image.new("RGB", (8, 8)))


@pytest.mark.parametrize("size", [{"height": 10**9, "width": 224}, {"shortest_edge": 0}, 10**9])
def test_an_absurd_size_is_refused_in_a_call(processor, size: Any):
    with pytest.raises(ValueError, match="size is .*whole numbers of pixels from 1 to 16384"):
        processor(Image.new("RGB", (8, 8)), size=size)


@pytest.mark.parametrize("name", ["crop_size", "pad_size"])
def test_crops_and_paddings_have_the_same_limit(name: str):
    with pytest.raises(ValueError, match=f"{name} is .*1000000000.*from 1 to 16384"):
        VtaImageProcessorPil(**{name: {"height": 10**9, "width": 1}})


def test_sizes_at_the_limits_are_taken():
    assert dict(VtaImageProcessorPil(size={"height": 1, "width": 16384}).size) == {"height": 1, "width": 16384}
