"""Several data sets as one: which task reads which label, and what is refused."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mt_adapters.data import BadSampleError, FrameDataset, Mixture, RoomsDataset, Source, open_sources
from mt_adapters.data.rooms import ROOMS_CLASSES
from mt_adapters.data.sources import choose_labels, task_classes, task_kinds

SEMSEG = {"street": "semseg", "depth": "depth"}


class Frames(FrameDataset):
    """Frames whose labels hold the frame's number; odd frames lack depth, frame 3 is bad."""

    set_name = "frames"
    summary = "made for a test"

    def __init__(self, length: int = 4, **labels: tuple[str, ...] | None) -> None:
        self.length, self.labels = length, labels
        self.decoded: list[str] = []

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"frame_{index}"

    def _frame(self, index: int) -> int:
        return index

    def _image(self, frame: int) -> Image.Image:
        return Image.fromarray(np.full((4, 4, 3), frame, dtype=np.uint8))

    def _label(self, frame: int, label: str) -> Tensor | None:
        if frame == 3:
            raise BadSampleError("it is damaged")
        self.decoded.append(label)
        return None if label == "depth" and frame % 2 else torch.full((4, 4), float(frame + 1))


def kinds(*specs: Any) -> dict[str, str]:
    return task_kinds(specs)


def test_a_task_reads_the_label_of_its_own_name_and_else_that_of_its_kind() -> None:
    specs = ["depth", {"name": "far", "type": "depth"}, {"name": "x", "type": "depth"}]
    chosen = choose_labels(kinds(*specs), [Frames(depth=None, far=None)], [{}])
    assert chosen == [{"depth": "depth", "far": "far", "x": "depth"}]


def test_a_task_whose_name_another_set_has_is_absent_where_it_is_missing() -> None:
    parts = {"name": "parts", "type": "semseg", "num_labels": 7}
    sets = [Frames(semseg=("a", "b")), Frames(parts=("p", "q"))]
    assert choose_labels(kinds("semseg", parts), sets, [{}, {}]) == [{"semseg": "semseg"}, {"parts": "parts"}]
    # Alone, the first set gives the task of this kind what it has.
    assert choose_labels(kinds(parts), sets[:1], [{}]) == [{"parts": "semseg"}]


def test_a_source_says_which_label_a_task_reads_or_that_it_reads_none() -> None:
    sets = [Frames(semseg=("a",), depth=None), Frames(semseg=("b", "c"), depth=None)]
    tasks = kinds("semseg", {"name": "street", "type": "semseg"}, "depth")
    choices = [{"street": None}, {"street": "semseg", "semseg": None, "depth": None}]
    chosen = choose_labels(tasks, sets, choices)
    assert chosen == [{"semseg": "semseg", "depth": "depth"}, {"street": "semseg"}]
    assert task_classes(chosen, sets) == {"semseg": ("a",), "street": ("b", "c")}


def test_a_task_that_one_source_names_a_label_for_is_read_from_no_other() -> None:
    """As README shows it: two sets of other classes, each with a task of its own."""
    sets = [Frames(semseg=("a", "b"), depth=None), Frames(semseg=("c",), depth=None)]
    specs = ["depth", *({"name": name, "type": "semseg"} for name in ("indoor", "street"))]
    chosen = choose_labels(kinds(*specs), sets, [{"indoor": "semseg"}, {"street": "semseg"}])
    assert chosen == [{"depth": "depth", "indoor": "semseg"}, {"depth": "depth", "street": "semseg"}]
    assert task_classes(chosen, sets) == {"indoor": ("a", "b"), "street": ("c",)}


@pytest.mark.parametrize("choice", [{"walls": "semseg"}, {"depth": "semseg_40"}])
def test_a_choice_of_what_is_not_there_is_refused(choice: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"does not fit: tasks are \['depth'\], labels of this source \['depth'\]"):
        choose_labels(kinds("depth"), [Frames(depth=None)], [choice])


def test_two_sets_of_other_classes_for_one_task_are_refused_with_the_mend() -> None:
    sets = [Frames(semseg=("a",)), Frames(semseg=("b", "c"))]
    chosen = choose_labels(kinds("semseg"), sets, [{}, {}])
    with pytest.raises(ValueError, match=r"other classes for the task 'semseg' \(1 and 2\).*labels: \{semseg: null"):
        task_classes(chosen, sets)


def test_a_mixture_gives_samples_of_all_sets_with_the_tasks_names_and_decodes_nothing_else() -> None:
    sets = [Frames(3, depth=None, semseg=("a",)), Frames(2, semseg=("b", "c"))]
    mixture = Mixture(sets, [{"depth": "depth"}, {"street": "semseg"}], weights=[1, 1])
    assert (len(mixture), mixture.shard_lengths, mixture.names) == (5, [[3], [2]], ["frames", "frames"])
    samples = [mixture[index] for index in range(5)]
    assert [sample["image"].getpixel((0, 0))[0] for sample in samples] == [0, 1, 2, 0, 1]
    assert [list(sample["labels"]) for sample in samples] == [["depth"], [], ["depth"], ["street"], ["street"]]
    assert samples[2]["labels"]["depth"][0, 0] == 3
    assert (set(sets[0].decoded), set(sets[1].decoded)) == ({"depth"}, {"semseg"})
    assert len(pickle.loads(pickle.dumps(mixture))) == 5


def test_a_bad_frame_of_a_mixture_is_named_with_its_set() -> None:
    mixture = Mixture([Frames(2, depth=None), Frames(4, depth=None)], [{"depth": "depth"}] * 2)
    with pytest.raises(BadSampleError, match="frames, frame 3: it is damaged"):
        mixture[5]


def test_samples_of_ones_own_are_given_as_they_are() -> None:
    samples = [{"image": torch.zeros(3, 2, 2, dtype=torch.uint8), "labels": {"depth": torch.ones(2, 2)}}]
    mixture = Mixture.of(samples, kinds("depth"))
    assert (len(mixture), mixture.shard_lengths, mixture.weights) == (1, [[1]], None)
    assert mixture[0] is samples[0]
    assert Mixture.of(mixture, kinds("depth")) is mixture


def test_rooms_and_a_second_source_open_with_their_classes() -> None:
    tasks = ["depth", {"name": "rooms", "type": "semseg"}, {"name": "far", "type": "depth"}]
    sources = [Source("rooms", weight=2), Source("rooms", weight=1, labels={"rooms": None}, evaluate=False)]
    train, validation, classes = open_sources(sources, tasks)
    size = len(RoomsDataset("train"))
    assert (len(train), len(validation)) == (2 * size, len(RoomsDataset("validation")))
    assert (train.weights, train.names, validation.names) == ([2, 1], ["rooms", "rooms"], ["rooms"])
    assert classes == {"rooms": ROOMS_CLASSES}
    assert train[0]["labels"].keys() == {"depth", "rooms", "far"}
    assert train[size]["labels"].keys() == {"depth", "far"}
    assert validation[0]["labels"].keys() == {"depth", "rooms", "far"}


@pytest.mark.parametrize(
    ("sources", "tasks", "problem"),
    [
        ([Source("rooms", weight=1), Source("rooms")], ["depth"], "give each source one, or none"),
        (
            [Source("rooms")],
            ["depth", {"name": "sky", "type": "sky"}],
            r"no data set has .*\['sky'\].*'normals'",
        ),
        ([Source("rooms", options={"num_classes": 3})], ["depth"], r"'rooms' does not take.*num_classes"),
    ],
)
def test_sources_that_do_not_fit_are_refused(sources: list[Source], tasks: list[Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        open_sources(sources, tasks)


def test_a_source_with_an_unknown_key_or_set_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the key 'dataset', and may have .*'weight'"):
        Source.from_dict({"dataset": "rooms", "wieght": 2})
    with pytest.raises(ValueError, match="needs the key 'dataset'"):
        Source.from_dict({"data_dir": str(Path("somewhere"))})
    with pytest.raises(ValueError, match="Unknown data set 'room'; known are: .*rooms"):
        Source.from_dict({"dataset": "room"})
