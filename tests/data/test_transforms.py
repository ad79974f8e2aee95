from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mt_adapters.data import EvalTransform, TrainTransform
from mt_adapters.tasks import get_task

TASKS = [get_task(name, num_labels=250) for name in ("semseg", "depth", "normals", "edges")]
HEIGHT, WIDTH = 120, 160
NO_JITTER = (0.0, 0.0, 0.0, 0.0)
# With these, pixel values are the image's own numbers from 0 to 255.
RAW = {"image_mean": (0.0, 0.0, 0.0), "image_std": (1 / 255, 1 / 255, 1 / 255)}


def ramp_sample() -> dict[str, Any]:
    """Red and the depth are the column of the source pixel, green and the class are its row."""
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    normals = torch.nn.functional.normalize(torch.stack([columns + 1.0, rows + 1.0, columns * 0.5 + rows]), dim=0)
    return {
        "image": torch.stack([columns, rows, torch.zeros_like(rows)]).to(torch.uint8),
        "labels": {
            "semseg": rows,
            "depth": columns.to(torch.float32),
            "normals": normals,
            "edges": ((columns + rows) % 2).to(torch.float32),
        },
    }


def noise_sample(height: int = 24, width: int = 24) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    sample = ramp_sample()
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    labels = {name: label[..., :height, :width] for name, label in sample["labels"].items()}
    return {"image": image, "labels": labels | {"semseg": image[0].long()}}


@pytest.mark.parametrize("size", [(48, 48), (60, 33), (200, 310)])
def test_image_and_labels_stay_aligned_under_random_crops(size: tuple[int, int]) -> None:
    transform = TrainTransform(TASKS, size, flip=False, color_jitter=NO_JITTER, **RAW)
    for seed in range(20):
        result = transform(ramp_sample(), np.random.default_rng(seed))
        # A ramp is its own blur: away from the image's border the resized image tells where each pixel comes from.
        # The nearest pixel is at most half a pixel from there, and the image is rounded to whole numbers.
        inner = (slice(4, -4), slice(4, -4))
        red, green = result["pixel_values"][0][inner], result["pixel_values"][1][inner]
        assert (red - result["labels"]["depth"][inner]).abs().max() <= 1.01
        assert (green - result["labels"]["semseg"][inner]).abs().max() <= 1.01
        assert (red - result["labels"]["depth"][inner]).mean().abs() < 0.1


def test_all_labels_show_the_same_source_pixels() -> None:
    source = ramp_sample()["labels"]
    for seed in range(20):
        transform = TrainTransform(TASKS, (50, 70), flip=False)
        labels = transform(ramp_sample(), np.random.default_rng(seed))["labels"]
        rows, columns = labels["semseg"], labels["depth"].long()
        assert torch.equal(labels["normals"], source["normals"][:, rows, columns])
        assert torch.equal(labels["edges"], source["edges"][rows, columns])


def test_a_planted_checker_is_the_same_in_image_and_labels() -> None:
    cells = torch.arange(6 * 8).reshape(6, 8).repeat_interleave(20, 0).repeat_interleave(20, 1)
    sample = {"image": (cells * 5).to(torch.uint8).repeat(3, 1, 1), "labels": {"semseg": cells}}
    transform = TrainTransform(TASKS, (96, 96), color_jitter=NO_JITTER, **RAW)
    for seed in range(20):
        result = transform(sample, np.random.default_rng(seed))
        seen = (result["pixel_values"][0] / 5).round().long()
        assert (seen == result["labels"]["semseg"]).float().mean() > 0.8


def test_crops_keep_the_share_and_the_stretch_they_are_given() -> None:
    sample = ramp_sample()
    transform = TrainTransform(TASKS[:2], (240, 320), scale=(0.3, 0.6), flip=False, color_jitter=NO_JITTER)
    shares, stretches = [], []
    for seed in range(200):
        labels = transform(sample, np.random.default_rng(seed))["labels"]
        height = labels["semseg"].max() - labels["semseg"].min() + 1
        width = labels["depth"].max() - labels["depth"].min() + 1
        shares.append((height * width / (HEIGHT * WIDTH)).item())
        stretches.append((width / height * 3 / 4).item())
    # A crop that begins within a pixel shows all of it, hence the margins.
    assert 0.29 < min(shares) < 0.35
    assert 0.55 < max(shares) < 0.63
    assert 0.73 < min(stretches) < 0.8
    assert 1.25 < max(stretches) < 1.37


def test_a_crop_of_the_whole_image_is_the_image() -> None:
    transform = TrainTransform(TASKS, (HEIGHT, WIDTH), scale=(1.0, 1.0), flip=False, color_jitter=NO_JITTER, **RAW)
    result = transform(ramp_sample(), np.random.default_rng(0))
    torch.testing.assert_close(result["pixel_values"], ramp_sample()["image"].float())
    assert torch.equal(result["labels"]["depth"], ramp_sample()["labels"]["depth"])


def test_a_flip_mirrors_the_image_and_every_label_and_the_sign_of_x() -> None:
    num_flipped = 0
    for seed in range(40):
        plain, maybe = (
            TrainTransform(TASKS, (32, 32), flip=flip, color_jitter=NO_JITTER)(
                noise_sample(), np.random.default_rng(seed)
            )
            for flip in (False, True)
        )
        if torch.equal(plain["pixel_values"], maybe["pixel_values"]):
            assert all(torch.equal(plain["labels"][name], maybe["labels"][name]) for name in plain["labels"])
            continue
        num_flipped += 1
        assert torch.equal(maybe["pixel_values"], plain["pixel_values"].flip(-1))
        for name in ("semseg", "depth", "edges"):
            assert torch.equal(maybe["labels"][name], plain["labels"][name].flip(-1))
        assert torch.equal(maybe["labels"]["normals"][0], -plain["labels"]["normals"][0].flip(-1))
        assert torch.equal(maybe["labels"]["normals"][1:], plain["labels"]["normals"][1:].flip(-1))
    assert 10 <= num_flipped <= 30


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_flipping_twice_is_the_identity(task: Any) -> None:
    label = torch.rand(task.label_shape(1, 5, 8)[1:])
    flipped = task.mirror_values(label.flip(-1))
    assert not torch.equal(flipped, label)
    assert torch.equal(task.mirror_values(flipped.flip(-1)), label)


def test_the_same_generator_gives_the_same_sample_and_another_seed_another() -> None:
    transform = TrainTransform(TASKS, (32, 32))
    first, again, other = (transform(noise_sample(), np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert all(torch.equal(first["labels"][name], again["labels"][name]) for name in first["labels"])
    assert not torch.equal(first["pixel_values"], other["pixel_values"])


@pytest.mark.parametrize("part", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_colour_jitter_changes_the_image_and_no_label(part: int) -> None:
    strengths = tuple(0.4 if i == part else 0.0 for i in range(4))
    sample = noise_sample()
    plain, jittered = (
        TrainTransform(TASKS, (24, 24), color_jitter=jitter)(sample, np.random.default_rng(1))
        for jitter in (NO_JITTER, strengths)
    )
    assert (plain["pixel_values"] - jittered["pixel_values"]).abs().mean() > 0.02
    assert all(torch.equal(plain["labels"][name], jittered["labels"][name]) for name in plain["labels"])


@pytest.mark.parametrize("strengths", [(0.0, 0.0, 0.9, 0.0), (0.0, 0.0, 0.0, 0.5)], ids=["saturation", "hue"])
def test_a_grey_image_has_no_saturation_and_no_hue_to_change(strengths: tuple[float, ...]) -> None:
    sample = {"image": torch.arange(24 * 24).reshape(1, 24, 24).repeat(3, 1, 1).to(torch.uint8) // 2, "labels": {}}
    plain, jittered = (
        TrainTransform([], (24, 24), color_jitter=jitter, **RAW)(sample, np.random.default_rng(1))
        for jitter in (NO_JITTER, strengths)
    )
    assert (plain["pixel_values"] - jittered["pixel_values"]).abs().max() <= 1


def test_half_a_turn_of_hue_makes_red_a_cyan_of_the_same_luma() -> None:
    class Largest:
        def uniform(self, low: float, high: float, size: int | None = None) -> Any:
            return high if size is None else np.full(size, high)

    red = torch.zeros(3, 4, 4, dtype=torch.uint8)
    red[0] = 255
    transform = TrainTransform([], (4, 4), flip=False, color_jitter=(0.0, 0.0, 0.0, 0.5), **RAW)
    result = transform({"image": red, "labels": {}}, Largest())["pixel_values"]
    # Mirrored at the grey of red's luma, 0.299, and clipped.
    torch.testing.assert_close(result[:, 0, 0], 255 * torch.tensor([0.0, 0.598, 0.598]), atol=0.1, rtol=0)


def test_evaluation_at_the_images_size_only_normalises() -> None:
    sample = noise_sample(20, 30)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    result = EvalTransform(TASKS, (20, 30))(sample)
    expected = (sample["image"] / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(result["pixel_values"], expected)
    assert result["labels"].keys() == sample["labels"].keys()
    assert all(torch.equal(result["labels"][name], sample["labels"][name]) for name in result["labels"])


def test_evaluation_takes_the_pixel_under_the_centre() -> None:
    labels = EvalTransform(TASKS, (HEIGHT // 4, WIDTH // 2))(ramp_sample())["labels"]
    assert torch.equal(labels["semseg"][:, 0], torch.arange(2, HEIGHT, 4))
    assert torch.equal(labels["depth"][0], torch.arange(1.0, WIDTH, 2))


@pytest.mark.parametrize("transform", [TrainTransform, EvalTransform])
def test_labels_that_a_sample_lacks_are_absent(transform: Callable[..., Any]) -> None:
    sample = noise_sample()
    del sample["labels"]["depth"]
    for seed in range(4):
        labels = transform(TASKS, (16, 16))(sample, np.random.default_rng(seed))["labels"]
        assert labels.keys() == {"semseg", "normals", "edges"}


def test_a_label_of_another_size_is_refused() -> None:
    sample = noise_sample()
    sample["labels"]["depth"] = torch.ones(24, 25)
    with pytest.raises(ValueError, match=r"'depth' is \(24, 25\), but the image is 24 x 24"):
        EvalTransform(TASKS, (16, 16))(sample)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"size": (0, 8)}, "positive"),
        ({"scale": (0.0, 1.0)}, "within"),
        ({"scale": (0.9, 0.5)}, "within"),
        ({"color_jitter": (0.2, 0.2, 0.2, 0.6)}, "hue"),
        ({"color_jitter": (0.2, -0.1, 0.2, 0.1)}, "from 0 to 1"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        TrainTransform(TASKS, **{"size": (8, 8), **settings})


def test_training_without_a_generator_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a random generator"):
        TrainTransform(TASKS, (8, 8))(noise_sample())
