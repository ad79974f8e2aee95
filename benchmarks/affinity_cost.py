"""The second table of bench.py: a training step task by task, with and without learning task affinities (TROA).

- one task only: the model of four tasks with labels of one, so that only the graph differs: the memory of one task.
- affinities at the default interval: the mean over all steps of an interval. Each repeat measures one plain step and
  one that learns; the minimum of each kind counts as often as the interval has such steps. Memory: the higher peak.
- step memory: what learning keeps from step to step (running means) is there before the step and does not count.
"""

from collections.abc import Callable, Mapping

from accelerate import Accelerator
from torch import Tensor

from mt_adapters import VtaModel
from mt_adapters.training.arguments import MultitaskArguments
from mt_adapters.training.step import MultitaskStep

MAX_AFFINITY_RATIO = 1.05
MAX_MEMORY_RATIO = 1.4
JOINT, ONE_TASK, OFF = "joint backward", "one task only", "affinities off"
EVERY_STEP, DEFAULT = "affinities at every step", "affinities at the default interval"

# Row -> affinity_interval; None for one backward pass of all tasks together.
INTERVALS = {JOINT: None, ONE_TASK: 0, OFF: 0, EVERY_STEP: 1, DEFAULT: MultitaskArguments().affinity_interval}

# Key in the results -> heading and format of the table's column.
AFFINITY_COLUMNS = {
    "cpu": ("CPU s", ".3f"),
    "ratio": ("x of off", ".2f"),
    "wall": ("wall s", ".3f"),
    "memory": ("step memory MB", ".0f"),
    "memory_ratio": ("x of one task", ".2f"),
}


def affinity_step(name: str, model: VtaModel, images: Tensor, labels: dict[str, Tensor]) -> Callable[[int], None]:
    """The row's training step, without optimiser: a function of the step's number, counted from 0."""
    interval = INTERVALS[name]
    if name == ONE_TASK:
        labels = {"semseg": labels["semseg"]}
    if interval is not None:
        step = MultitaskStep(model, model, Accelerator(cpu=True), MultitaskArguments(affinity_interval=interval))

    def run(number: int) -> None:
        if interval is None:
            model(images, labels=labels).loss.backward()
        else:
            step.begin(number, [labels])
            step.backward(images, labels)
            step.finish()
            step.observe()
        model.zero_grad(set_to_none=True)

    return run


def interval_shares(interval: int | None) -> dict[int, float]:
    """{step number: share of an interval}: the first step stands for all plain ones, the last one learns."""
    if interval in (None, 0, 1):
        return {0: 1.0}
    return {0: 1 - 1 / interval, interval - 1: 1 / interval}


def affinity_figures(
    seconds: Mapping[tuple[str, int], tuple[float, float]], memory: Mapping[str, float | None]
) -> dict[str, dict]:
    """Figures {row: {column: value}}.

    Args:
        seconds: {(row, step number): (CPU, wall)}.
        memory: {row: MB}; None where it cannot be measured.
    """
    rows: dict[str, dict] = {}
    for name, interval in INTERVALS.items():
        steps = [(share, *seconds[name, number]) for number, share in interval_shares(interval).items()]
        rows[name] = {"cpu": sum(share * cpu for share, cpu, _ in steps)}
        rows[name] |= {"wall": sum(share * wall for share, _, wall in steps), "memory": memory[name]}
    for row in rows.values():
        row["ratio"] = row["cpu"] / rows[OFF]["cpu"]
        row["memory_ratio"] = None if row["memory"] is None else row["memory"] / rows[ONE_TASK]["memory"]
    return rows


def check_affinity_cost(rows: dict[str, dict]) -> str:
    ratio = rows[DEFAULT]["ratio"]
    verdict = "PASS" if ratio <= MAX_AFFINITY_RATIO else "FAIL"
    return f"{verdict}: CPU seconds of a step, {DEFAULT} over off: {ratio:.3f} (<= {MAX_AFFINITY_RATIO})"


def check_step_memory(rows: dict[str, dict]) -> str:
    ratio = rows[OFF]["memory_ratio"]
    if ratio is None:
        return "not checked: memory of a step, which is measured on Linux only"
    verdict = "PASS" if ratio <= MAX_MEMORY_RATIO else "FAIL"
    return f"{verdict}: memory of a step, four tasks one by one over one task: {ratio:.3f} (<= {MAX_MEMORY_RATIO})"
