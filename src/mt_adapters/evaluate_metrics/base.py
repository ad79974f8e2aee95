"""What the scripts of this folder share: a metric of `mt_adapters.metrics` behind the interface of `evaluate.Metric`.

`evaluate` stores what is added and joins what the processes stored. Maps would fill the disk, so each call reduces
them to the integer sums of the metric, and what is stored is one row of sums per process. Integers add up exactly: the
results are those of the metric itself, digit by digit, for any number of calls and processes.

Shape suffixes: B batch, H height, W width.
"""

import inspect
from typing import Any, ClassVar

import evaluate
import numpy as np
import torch
from datasets import Features, List, Value
from torch import Tensor

from mt_adapters.metrics import METRICS, TaskMetrics
from mt_adapters.tasks import get_task

# `evaluate` would swallow a setting that it does not know.
_EVALUATE_SETTINGS = inspect.signature(evaluate.Metric.__init__).parameters.keys()


class TaskMetric(evaluate.Metric):
    """Base of the metrics. The docstring of a subclass is its description (first paragraph) and its usage (the rest).

    A script imports this module, not this class: `evaluate.load` takes the first metric class that it finds in a
    script.

    Raises:
        ValueError: for a setting that the metric lacks or needs, or a value that it cannot have.
    """

    kind: ClassVar[str]
    source: ClassVar[str] = ""  # BibTeX

    def __init__(self, **kwargs: Any) -> None:
        settings = {name: kwargs.pop(name) for name in kwargs.keys() - _EVALUATE_SETTINGS}
        parameters = inspect.signature(METRICS[self.kind]).parameters.values()
        known = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        unknown = sorted(settings.keys() - known)
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r}; the metric of {self.kind} has {known}")
        self._task = get_task(self.kind, **settings)  # says so if num_labels is missing
        self._metric = METRICS[self.kind](**settings)
        self._settings = {name: getattr(self._metric, name) for name in known}
        self._num_computed = 0
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        description, _, usage = inspect.cleandoc(type(self).__doc__ or "").partition("\n\n")
        return evaluate.MetricInfo(
            description=description,
            citation=self.source,
            inputs_description=usage,
            # These names are what `evaluate` calls the inputs. It keeps the sums under the first, and under the
            # second what must be equal in all processes for the sums to add up.
            features=Features({"predictions": List(Value("int64")), "references": Value("string")}),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None) -> None:
        """Adds the maps of a batch, all of one size: arrays, tensors or lists."""
        self._metric.update(self._batch("predictions", predictions), self._batch("references", references))

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Adds the maps of one image, of any size: arrays, tensors or lists."""
        # `evaluate.combine` uses the names of add_batch here.
        maps = {"predictions": prediction, "references": reference, **kwargs}
        self.add_batch(
            **{name: None if value is None else _to_tensor(name, value)[None] for name, value in maps.items()}
        )

    def compute(self, *, predictions: Any = None, references: Any = None) -> dict[str, float] | None:
        """Adds the maps of a batch, if given, and returns the results of all that was added; then starts anew.

        None in a process other than the first. A process that added nothing must call it, too.
        """
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if self.num_process == 1 and not self._metric.update_called:
            raise ValueError("nothing was added: give predictions=... and references=..., or call add_batch before")
        sums = torch.cat([state.flatten() for state in _states(self._metric)])
        counted = {"compute": self._num_computed} | self._settings
        super().add_batch(predictions=[sums.tolist()], references=[str(counted)])
        self._metric.reset()
        self._num_computed += 1
        return super().compute()

    def _compute(self, *, predictions: list[list[int]], references: list[str]) -> dict[str, float]:
        if len(set(references)) > 1:
            raise ValueError(
                f"the processes are not in step: {sorted(set(references))}; load the metric with the same settings in "
                "each, and after compute wait for the first process (a barrier) before the next compute"
            )
        metric = METRICS[self.kind](**self._settings)
        states = _states(metric)
        sums = torch.tensor(predictions).sum(dim=0).split([state.numel() for state in states])
        for state, sum_ in zip(states, sums, strict=True):
            state += sum_.view_as(state)
        # The method of the class: that of the instance would add up the processes of torch.distributed once more.
        return type(metric).compute(metric)

    def _batch(self, name: str, maps: Any) -> Tensor:
        channels = self._task.label_shape(0, 0, 0)[1:-2]  # (3,) of normals, else ()
        if maps is None:
            raise ValueError(f"{name} are missing: give predictions=... and references=...")
        maps = _to_tensor(name, maps)
        if maps.ndim < 3 or maps.shape[1:-2] != channels:
            image = ",".join([*map(str, channels), "H", "W"])
            raise ValueError(
                f"a batch of {name} has the shape {tuple(maps.shape)}, but that of {self.kind} is (B,{image}): "
                f"give one image ({image}) to add"
            )
        if maps.is_floating_point() and isinstance(self._task.unlabelled, int):
            raise ValueError(f"{name} are {maps.dtype}; {self.kind} needs integer ids: take the argmax of logits")
        return maps


def _states(metric: TaskMetrics) -> list[Tensor]:
    return [getattr(metric, name) for name in metric.metric_state]


def _to_tensor(name: str, maps: Any) -> Tensor:
    """On the CPU; int64 unless floating point, because smaller integers overflow."""
    if not isinstance(maps, Tensor):
        try:
            maps = torch.from_numpy(np.array(maps))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name} are no batch of numbers: {error}; give images of different sizes to add"
            ) from None
    return maps.cpu() if maps.is_floating_point() else maps.cpu().long()
