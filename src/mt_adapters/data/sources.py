"""One or several data sets seen as one, with the labels that a model's tasks read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from typing import Any

from torch.utils.data import Dataset

from mt_adapters.data.pictures import BadSampleError
from mt_adapters.data.table import get_dataset


@dataclass(frozen=True)
class Source:
    """One data set of a training, as a recipe names it.

    Args:
        dataset: name of the data set.
        data_dir: its folder.
        weight: its share among the frames that are drawn; default for all: their numbers of frames.
        labels: {task: name of the label it reads here, or None for none}; default: the label of the task's name.
        options: further arguments of the data set's class.
        evaluate: whether its validation frames are evaluated.

    Raises:
        ValueError: for an unknown data set.
    """

    dataset: str
    data_dir: str | None = None
    weight: float | None = None
    labels: Mapping[str, str | None] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    evaluate: bool = True

    def __post_init__(self) -> None:
        get_dataset(self.dataset)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Source:
        """
        Raises:
            ValueError: for an unknown key, or without "dataset".
        """
        known = [field.name for field in fields(cls)]
        unknown = [key for key in settings if key not in known]
        if unknown or "dataset" not in settings:
            raise ValueError(f"the source {dict(settings)} needs the key 'dataset', and may have {known[1:]}")
        return cls(**settings)

    def open(self, split: str) -> Any:
        """
        Raises:
            ValueError: if the data set's files are not there, or an option is unknown.
        """
        try:
            return get_dataset(self.dataset)(split, self.data_dir, **self.options)
        except TypeError as error:
            raise ValueError(f"data set {self.dataset!r} does not take the options {dict(self.options)}") from error


def task_kinds(specs: Sequence[str | Mapping[str, Any]]) -> dict[str, str]:
    """{name: kind} of tasks as a recipe names them."""
    pairs = [
        (spec, spec) if isinstance(spec, str) else (spec["name"], spec.get("type", spec["name"])) for spec in specs
    ]
    return dict(pairs)


def choose_labels(
    kinds: Mapping[str, str], datasets: Sequence[Any], choices: Sequence[Mapping[str, str | None]]
) -> list[dict[str, str]]:
    """Per data set {task: label}: what the choices say, else the label of the task's own name.

    A task that no choice names, and of whose own name no data set has a label, reads the label of its kind
    ("depth_far" reads "depth"). A task for which a data set has no label is absent.

    Raises:
        ValueError: if a choice names what is not there.
    """
    for dataset, choice in zip(datasets, choices, strict=True):
        wrong = [pair for pair in choice.items() if pair[0] not in kinds or pair[1] not in (None, *dataset.labels)]
        if wrong:
            raise ValueError(
                f"labels: {dict(choice)} does not fit: tasks are {list(kinds)}, labels of this source "
                f"{list(dataset.labels)}"
            )
    chosen: list[dict[str, str]] = []
    for dataset, choice in zip(datasets, choices, strict=True):
        found = {}
        for task, kind in kinds.items():
            is_named_somewhere = any(task in other.labels for other in datasets)
            is_named_somewhere |= any(other.get(task) is not None for other in choices)
            label = choice.get(task, task if is_named_somewhere else kind)
            if label is not None and label in dataset.labels:
                found[task] = label
        chosen.append(found)
    return chosen


def task_classes(chosen: Sequence[Mapping[str, str]], datasets: Sequence[Any]) -> dict[str, tuple[str, ...]]:
    """{task: names of its classes} for all tasks that have classes.

    Raises:
        ValueError: if two sources have other classes for one task.
    """
    classes: dict[str, tuple[str, ...]] = {}
    for found, dataset in zip(chosen, datasets, strict=True):
        for task, label in found.items():
            names = dataset.labels[label]
            if names is None:
                continue
            if classes.setdefault(task, names) != names:
                raise ValueError(
                    f"the sources have other classes for the task {task!r} ({len(classes[task])} and {len(names)}): "
                    "give each its own task, {name: ..., type: semseg}, and say in each source's `labels` which task "
                    f"reads its {label!r}, e.g. labels: {{{task}: null, other_task: {label}}}"
                )
    return classes


class Mixture(Dataset[dict[str, Any]]):
    """Data sets one after another; `mixture[i]` is a sample whose labels bear the names of the tasks.

    Labels that no task reads are not decoded. A task that a frame, or a whole data set, has no label for is absent.

    Args:
        datasets: with `labels` and `read(index, names)`; a plain list of samples gives its labels as they are named.
        chosen: per data set {task: label}, from `choose_labels`.
        weights: of the data sets in training, or None for their sizes.
    """

    def __init__(
        self, datasets: Sequence[Any], chosen: Sequence[Mapping[str, str]], weights: Sequence[float] | None = None
    ) -> None:
        self.datasets, self.chosen, self.weights = list(datasets), [dict(found) for found in chosen], weights
        self._starts = [0, *accumulate(len(dataset) for dataset in datasets)]

    @classmethod
    def of(cls, dataset: Any, kinds: Mapping[str, str]) -> Mixture:
        """A single data set, or samples of one's own."""
        if isinstance(dataset, Mixture):
            return dataset
        return cls([dataset], choose_labels(kinds, [dataset], [{}]) if hasattr(dataset, "labels") else [{}])

    @property
    def names(self) -> list[str]:
        """What the data sets are called."""
        return [getattr(dataset, "set_name", type(dataset).__name__) for dataset in self.datasets]

    @property
    def summaries(self) -> list[str]:
        """What the data sets are, and their licences."""
        return [getattr(dataset, "summary", "") for dataset in self.datasets]

    @property
    def shard_lengths(self) -> list[list[int]]:
        return [getattr(dataset, "shard_lengths", [len(dataset)]) for dataset in self.datasets]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = bisect_right(self._starts, index) - 1
        dataset, found = self.datasets[number], self.chosen[number]
        place = index - self._starts[number]
        if not hasattr(dataset, "read"):
            return dataset[place]
        try:
            sample = dataset.read(place, set(found.values()))
        except BadSampleError as error:
            raise BadSampleError(f"{dataset.set_name}, frame {place}: {error}") from error
        labels = {task: sample["labels"][label] for task, label in found.items() if label in sample["labels"]}
        return {"image": sample["image"], "labels": labels}


def open_sources(
    sources: Sequence[Source], specs: Sequence[str | Mapping[str, Any]]
) -> tuple[Mixture, Mixture, dict[str, tuple[str, ...]]]:
    """Training frames, validation frames, and the classes of the tasks that have some.

    Raises:
        ValueError: if a data set cannot be opened, a task has no labels, weights are given for some sources only, or
            classes do not agree.
    """
    kinds = task_kinds(specs)
    weights = [source.weight for source in sources]
    if any(weight is None for weight in weights) and any(weight is not None for weight in weights):
        raise ValueError(f"the weights of the sources are {weights}: give each source one, or none")
    datasets = [source.open("train") for source in sources]
    chosen = choose_labels(kinds, datasets, [source.labels for source in sources])
    missing = [task for task in kinds if not any(task in found for found in chosen)]
    if missing:
        known = sorted({label for dataset in datasets for label in dataset.labels})
        raise ValueError(
            f"no data set has labels for the tasks {missing}, only {known}: leave these tasks out, or say which label "
            "they read, in a source's `labels: {task: label}`"
        )
    train = Mixture(datasets, chosen, None if None in weights else weights)  # type: ignore[arg-type]
    evaluated = [number for number, source in enumerate(sources) if source.evaluate]
    validation = Mixture([sources[number].open("validation") for number in evaluated], [chosen[i] for i in evaluated])
    return train, validation, task_classes(chosen, datasets)
