from typing import Any

import pytest
import torch

from mt_adapters.data import MultitaskCollator
from mt_adapters.tasks import get_task

TASKS = [get_task(name, num_labels=5) for name in ("semseg", "depth", "normals", "edges")]


def transformed(*names: str, height: int = 4, width: int = 6) -> dict[str, Any]:
    labels = {
        "semseg": torch.full((height, width), 3),
        "depth": torch.full((height, width), 2.0),
        "normals": torch.tensor([0.0, 0.0, 1.0])[:, None, None].repeat(1, height, width),
        "edges": torch.ones(height, width),
    }
    return {"pixel_values": torch.rand(3, height, width), "labels": {name: labels[name] for name in names}}


def test_samples_are_stacked_in_their_order() -> None:
    samples = [transformed(*(task.name for task in TASKS)) for _ in range(3)]
    samples[1]["labels"]["depth"] = torch.full((4, 6), 7.0)
    batch = MultitaskCollator(TASKS)(samples)
    assert torch.equal(batch["pixel_values"][2], samples[2]["pixel_values"])
    assert batch["labels"]["depth"][:, 0, 0].tolist() == [2.0, 7.0, 2.0]
    assert batch["labels"]["normals"].shape == (3, 3, 4, 6)


def test_every_task_is_present_and_what_a_sample_lacks_has_no_label() -> None:
    batch = MultitaskCollator(TASKS)([transformed("depth"), transformed("semseg", "normals")])
    labels = batch["labels"]
    assert list(labels) == ["semseg", "depth", "normals", "edges"]
    assert labels["semseg"].dtype == torch.int64
    assert labels["semseg"].unique(dim=0).shape[0] == 2
    assert (labels["semseg"][0] == 255).all()
    assert (labels["semseg"][1] == 3).all()
    assert (labels["depth"][0] == 2).all()
    assert (labels["depth"][1] == 0).all()
    assert (labels["normals"][0] == 0).all()
    assert labels["edges"].isnan().all()
    for task in TASKS:
        task.check_label(labels[task.name], 2, 4, 6)


def test_labels_of_other_tasks_are_left_out() -> None:
    batch = MultitaskCollator([get_task("edges")])([transformed("edges", "depth")])
    assert list(batch["labels"]) == ["edges"]


@pytest.mark.parametrize("name", [task.name for task in TASKS])
def test_a_label_of_another_size_than_its_image_is_refused(name: str) -> None:
    sample = transformed(name)
    sample["labels"][name] = transformed(name, height=6, width=4)["labels"][name]
    with pytest.raises(ValueError, match=rf"'{name}'.*6, 4\), but its image is 4 x 6"):
        MultitaskCollator(TASKS)([transformed(name), sample])


def test_images_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4, 6\), \(3, 8, 6\)"):
        MultitaskCollator(TASKS)([transformed("depth"), transformed("depth", height=8)])
