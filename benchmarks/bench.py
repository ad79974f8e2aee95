"""Parameters, speed and memory of a multitask model side by side with its baselines, measured in one run.

    make bench
    python benchmarks/bench.py --repeats 9 --json bench.json
    python benchmarks/bench.py --check     # exit status 1 if something costs too much or the outputs differ
    python benchmarks/bench.py --quick     # tiny models, to see that the program works; its figures mean nothing

Swin-T with random weights, four tasks, the same decoder and heads in every row, fp32 on CPU threads.

- parameters: trainable ones, in millions. "with gradient": those tensors whose gradient is not all zero after two
  optimiser steps from the start (zero-initialised layers let some gradients through only at the third step).
- CPU s: user + system seconds of all threads; wall s depends on what else runs. Each repeat measures every row once,
  and the minimum over the repeats counts. x: CPU seconds over those of full fine-tuning.
- forward: eval mode, no_grad. training step: forward with labels, loss and backward, no optimiser. "one full pass per
  task" runs the whole network from the image for each task alone and sums the losses before one backward.
- step memory: peak resident memory of a training step, gradients included, over that before it, after a warm-up step;
  in a fresh process per row that gives back what it frees (Linux only). An allocator that keeps it needs more.
- the second table, of VTA with and without learning task affinities: see affinity_cost.py.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

# Threads that wait without spinning: otherwise waiting counts as CPU seconds. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from peft import LoraConfig
from torch.nn import functional as F
from transformers import SwinConfig

from affinity_cost import (
    AFFINITY_COLUMNS,
    INTERVALS,
    affinity_figures,
    affinity_step,
    check_affinity_cost,
    check_step_memory,
    interval_shares,
)
from mt_adapters import VtaModel
from mt_adapters.models.vta.parameters import adapter_parameter_names
from mt_adapters.troa import average_weights
from mt_adapters.tuners.vta import find_context

TASKS: list[str | dict[str, Any]] = [
    {"name": "semseg", "type": "semseg", "num_labels": 21},
    "depth",
    "normals",
    "edges",
]
SWIN_T = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
TINY = {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 2}
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
NUM_THREADS = 2
MAX_FORWARD_RATIO = 0.65
VTA, PER_TASK, BATCHED = "VTA", "VTA, one full pass per task", "VTA, fan_out=batched"
FULL = "full fine-tuning"

# Key in the results -> heading and format of the table's column.
COLUMNS = {
    "adapters": ("adapters M", ".2f"),
    "backbone": ("backbone M", ".2f"),
    "decoders_and_heads": ("decoders + heads M", ".2f"),
    "total": ("total M", ".2f"),
    "trainable_tensors": ("trainable tensors", "d"),
    "tensors_with_gradient": ("with gradient", "d"),
    "parameters_with_gradient": ("with gradient M", ".2f"),
    "forward_cpu": ("forward CPU s", ".3f"),
    "forward_ratio": ("x", ".2f"),
    "forward_wall": ("wall s", ".3f"),
    "step_cpu": ("training step CPU s", ".3f"),
    "step_ratio": ("x", ".2f"),
    "step_wall": ("wall s", ".3f"),
    "step_memory": ("step memory MB", ".0f"),
}


class Row(NamedTuple):
    name: str
    settings: dict[str, Any]  # of VtaModel.from_backbone


class Setup(NamedTuple):
    backbone: dict[str, Any]
    image_size: int
    batch_size: int


def build(row: Row, setup: Setup) -> VtaModel:
    """The row's model; rows with the same adapter get the same weights."""
    torch.set_num_threads(NUM_THREADS)
    torch.manual_seed(0)
    config = SwinConfig(image_size=setup.image_size, **setup.backbone)
    return VtaModel.from_backbone(config, TASKS, **row.settings)


def make_rows(setup: Setup) -> tuple[list[Row], int]:
    """All rows, and the rank that gives LoRA about as many parameters as the VTA adapters have."""

    def num_adapter_parameters(settings: dict[str, Any]) -> int:
        return build(Row("", settings), setup).parameter_report()["adapters"]["total"]

    lora = num_adapter_parameters({"adapter": LoraConfig(r=1, target_modules=LORA_TARGETS)})
    rank = max(1, round(num_adapter_parameters({}) / lora))
    return [
        Row(FULL, {"adapter": None, "train_backbone": True}),
        Row("frozen backbone", {"adapter": None}),
        Row(f"LoRA r{rank}, shared by all tasks", {"adapter": LoraConfig(r=rank, target_modules=LORA_TARGETS)}),
        Row(VTA, {}),
        Row(BATCHED, {"fan_out": "batched"}),
        Row(PER_TASK, {}),
    ], rank


@torch.no_grad()
def randomize_adapters(model: VtaModel) -> None:
    """Takes adapters off their start, where they do nothing and all tasks get the same features."""
    torch.manual_seed(1)
    for name in adapter_parameter_names(model):
        model.get_parameter(name).normal_(std=0.1)
    context = find_context(model.backbone)
    for conditioning in context.conditioning.values() if context else ():
        affinity_TT = torch.empty_like(conditioning.affinity).uniform_(0.1, 1.0)
        conditioning.set_affinity(affinity_TT, average_weights(affinity_TT))


def make_batch(setup: Setup) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    size = (setup.batch_size, setup.image_size, setup.image_size)
    images = torch.randn(size[0], 3, *size[1:])
    labels = {
        "semseg": torch.randint(0, 21, size),
        "depth": torch.rand(size) * 5 + 0.5,
        "normals": F.normalize(torch.randn_like(images), dim=1),
        "edges": (torch.rand(size) > 0.9).float(),
    }
    return images, labels


def passes(row: Row, model: VtaModel) -> list[list[str] | None]:
    """The tasks of each pass through the whole network; None for all."""
    return [[name] for name in model.task_names] if row.name == PER_TASK else [None]


@torch.no_grad()
def forward(row: Row, model: VtaModel, images: torch.Tensor) -> dict[str, torch.Tensor]:
    outputs = [model(images, tasks=tasks).logits for tasks in passes(row, model)]
    return {name: logits for output in outputs for name, logits in output.items()}


def training_step(row: Row, model: VtaModel, images: torch.Tensor, labels: dict[str, torch.Tensor]) -> None:
    model.zero_grad(set_to_none=True)
    sum(model(images, labels=labels, tasks=tasks).loss for tasks in passes(row, model)).backward()


def timed(function: Callable, *arguments: Any) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    function(*arguments)
    return time.process_time() - cpu, time.perf_counter() - wall


def measure_times(rows: list[Row], setup: Setup, num_repeats: int) -> tuple[dict[str, dict], dict[str, dict]]:
    """Seconds {row: {column: minimum}}, and logits {row: {task: logits}} with random adapters of equal weights."""
    models = [build(row, setup) for row in rows]
    for model in models:
        randomize_adapters(model)
    images, labels = make_batch(setup)
    times: dict[str, dict] = {row.name: {} for row in rows}
    for _ in range(num_repeats):
        for row, model in zip(rows, models, strict=True):
            seconds_of_forward = timed(forward, row, model.eval(), images)
            seconds_of_step = timed(training_step, row, model.train(), images, labels)
            model.zero_grad(set_to_none=True)
            columns = ("forward_cpu", "forward_wall", "step_cpu", "step_wall")
            for column, seconds in zip(columns, seconds_of_forward + seconds_of_step, strict=True):
                times[row.name][column] = min(seconds, times[row.name].get(column, math.inf))
    return times, {row.name: forward(row, model.eval(), images) for row, model in zip(rows, models, strict=True)}


def resident_memory(field: str) -> float:
    """This process's resident memory in MB: "VmRSS" now, "VmHWM" at its peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{field}:\s+(\d+) kB", status)[0]) * 1024 / 1e6


def peak_memory(function: Callable, *arguments: Any) -> float | None:
    """Peak resident memory in MB while the function runs, over that before; None if this is not Linux."""
    if sys.platform != "linux":
        return None
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
    before = resident_memory("VmRSS")
    function(*arguments)
    return resident_memory("VmHWM") - before


def measure_memory_and_gradients(row: Row, setup: Setup) -> dict[str, Any]:
    model = build(row, setup).train()
    batch = make_batch(setup)
    training_step(row, model, *batch)
    model.zero_grad(set_to_none=True)
    memory = peak_memory(training_step, row, model, *batch)

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    for _ in range(2):
        training_step(row, model, *batch)
        optimizer.step()
    training_step(row, model, *batch)
    reached = [parameter for parameter in trainable if parameter.grad is not None and parameter.grad.any()]
    counts = {group: count["trainable"] / 1e6 for group, count in model.parameter_report().items()}
    return {
        "adapters": counts["adapters"],
        "backbone": counts["backbone"],
        "decoders_and_heads": counts["decoders"] + counts["heads"],
        "total": counts["total"],
        "trainable_tensors": len(trainable),
        "tensors_with_gradient": len(reached),
        "parameters_with_gradient": sum(parameter.numel() for parameter in reached) / 1e6,
        "step_memory": memory,
    }


def measure_affinity_times(setup: Setup, num_repeats: int) -> dict[tuple[str, int], tuple[float, float]]:
    """Minimum of CPU and wall seconds {(row, step number): (CPU, wall)}, with random adapters."""
    model = build(Row(VTA, {}), setup).train()
    randomize_adapters(model)
    batch = make_batch(setup)
    steps = {name: affinity_step(name, model, *batch) for name in INTERVALS}
    minima = {(name, number): (math.inf, math.inf) for name in steps for number in interval_shares(INTERVALS[name])}
    for _ in range(num_repeats):
        for (name, number), (cpu, wall) in minima.items():
            cpu_now, wall_now = timed(steps[name], number)
            minima[name, number] = min(cpu, cpu_now), min(wall, wall_now)
    return minima


def measure_affinity_memory(name: str, setup: Setup) -> float | None:
    step = affinity_step(name, build(Row(VTA, {}), setup).train(), *make_batch(setup))

    def run_interval() -> None:
        for number in interval_shares(INTERVALS[name]):
            step(number)

    run_interval()
    return peak_memory(run_interval)


def in_fresh_processes(function: Callable, rows: Iterable[Row | str], setup: Setup) -> list[Any]:
    # glibc then gives every large block back on free, so that resident memory is what is in use.
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mt_adapters.models.vta.modeling_vta"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        return pool.starmap(function, [(row, setup) for row in rows], chunksize=1)


def table(heading: str, rows: dict[str, dict], columns: dict[str, tuple[str, str]]) -> str:
    lines = [f"| {heading} | " + " | ".join(title for title, _ in columns.values()) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for name, row in rows.items():
        cells = ["-" if row[key] is None else format(row[key], digits) for key, (_, digits) in columns.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_printed(heading: str, rows: dict[str, dict], columns: dict[str, tuple[str, str]]) -> dict[str, list]:
    """The table for the file of results, its figures rounded as they are printed."""
    records = []
    for name, row in rows.items():
        measured = {key: digits for key, (_, digits) in columns.items() if row[key] is not None}
        rounded = {key: json.loads(format(row[key], digits)) for key, digits in measured.items()}
        records.append({heading: name} | dict.fromkeys(columns) | rounded)
    return {"columns": list(columns), "rows": records}


def check_cost(times: dict[str, dict]) -> str:
    ratio = times[VTA]["forward_cpu"] / times[PER_TASK]["forward_cpu"]
    verdict = "PASS" if ratio <= MAX_FORWARD_RATIO else "FAIL"
    return (
        f"{verdict}: CPU seconds of a forward, VTA over one full pass per task: {ratio:.2f} (<= {MAX_FORWARD_RATIO})"
    )


def check_outputs(logits: dict[str, dict[str, torch.Tensor]]) -> str:
    def difference(name: str) -> float:
        return max(float((logits[VTA][task] - logits[name][task]).abs().max()) for task in logits[VTA])

    is_equal = all(torch.equal(logits[VTA][task], logits[PER_TASK][task]) for task in logits[VTA])
    verdict = "PASS: equal to the last bit" if is_equal else f"FAIL: different by {difference(PER_TASK):.1e}"
    return f"{verdict}: logits of VTA and of one full pass per task (batched: within {difference(BATCHED):.1e})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--image_size", type=int, help="height and width of the images (default 224)")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the printed figures to this file")
    parser.add_argument("--quick", action="store_true", help="tiny models and images, one repeat")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a line says FAIL")
    arguments = parser.parse_args()
    if arguments.batch_size < 2:
        parser.error("--batch_size must be at least 2: affinities compare two halves of a batch")
    num_repeats = 1 if arguments.quick else arguments.repeats
    size = arguments.image_size or (64 if arguments.quick else 224)
    setup = Setup(TINY if arguments.quick else SWIN_T, size, arguments.batch_size)

    rows, rank = make_rows(setup)
    costs = in_fresh_processes(measure_memory_and_gradients, rows, setup)
    times, logits = measure_times(rows, setup, num_repeats)
    results: dict[str, dict] = {}
    for row, cost in zip(rows, costs, strict=True):
        results[row.name] = cost | times[row.name]
        for kind in ("forward", "step"):
            results[row.name][f"{kind}_ratio"] = times[row.name][f"{kind}_cpu"] / times[FULL][f"{kind}_cpu"]
    memory = dict(zip(INTERVALS, in_fresh_processes(measure_affinity_memory, INTERVALS, setup), strict=True))
    affinities = affinity_figures(measure_affinity_times(setup, num_repeats), memory)
    summary = (
        f"{'tiny Swin' if arguments.quick else 'Swin-T'}, {len(TASKS)} tasks, batch {setup.batch_size}, "
        f"{size} x {size}, fp32, {NUM_THREADS} CPU threads, minimum of {num_repeats} repeats; LoRA rank {rank}; "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
    checks = [
        check_cost(times),
        check_outputs(logits),
        check_affinity_cost(affinities),
        check_step_memory(affinities),
    ]
    tables = [
        table("model", results, COLUMNS),
        table("training step with task affinities", affinities, AFFINITY_COLUMNS),
    ]
    print("\n\n".join([summary, *tables, "\n".join(checks)]))
    if arguments.json:
        record = {"summary": summary, "lora_rank": rank, **as_printed("model", results, COLUMNS), "checks": checks}
        record["affinities"] = as_printed("step", affinities, AFFINITY_COLUMNS)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    return 1 if arguments.check and any(line.startswith("FAIL") for line in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
