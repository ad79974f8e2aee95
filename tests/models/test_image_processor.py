"""The image processor: pictures in, maps in the labels' units out."""

import numpy as np
import pytest
import torch
from PIL import Image
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
