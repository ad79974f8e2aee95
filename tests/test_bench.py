"""The benchmark runs, and its file of results holds what it prints."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from benchmarks.affinity_cost import (
    INTERVALS,
    affinity_figures,
    affinity_step,
    check_affinity_cost,
    check_step_memory,
    interval_shares,
)
from tests.tiny_models import ALL_TASKS, FAMILIES, make_images, make_labels, make_model

from mt_adapters.training.arguments import MultitaskArguments
from mt_adapters.training.step import MultitaskStep

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).parents[1] / "benchmarks" / "bench.py"
PARAMETERS = ["adapters", "backbone", "decoders_and_heads", "total", "parameters_with_gradient"]


JOINT, ONE_TASK, OFF = "joint backward", "one task only", "affinities off"
EVERY_STEP, DEFAULT = "affinities at every step", "affinities at the default interval"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess, dict]:
    """The quick benchmark, and its file of results."""
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    command = [sys.executable, str(PROGRAM), "--quick", "--check", "--json", str(file)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert file.exists(), process.stderr
    return process, json.loads(file.read_text())


@pytest.fixture(scope="module")
def run(finished: tuple[subprocess.CompletedProcess, dict]) -> tuple[str, dict]:
    """What the quick benchmark prints, and its file of results."""
    return finished[0].stdout, finished[1]


def test_the_table_has_every_model_with_finite_positive_figures(run: tuple[str, dict]) -> None:
    rows = {row["model"]: row for row in run[1]["rows"]}
    lora = f"LoRA r{run[1]['lora_rank']}, shared by all tasks"
    vta = ["VTA", "VTA, fan_out=batched", "VTA, one full pass per task"]
    assert list(rows) == ["full fine-tuning", "frozen backbone", lora, *vta]
    for model, row in rows.items():
        for column in run[1]["columns"]:
            value = row[column]
            if column in PARAMETERS or (column == "step_memory" and value is None):
                continue  # the next test; not Linux
            assert math.isfinite(value), f"{model}: {column} is {value}"
            assert value > 0, f"{model}: {column} is {value}"


def test_the_table_of_affinities_has_every_row_with_finite_positive_figures(run: tuple[str, dict]) -> None:
    results = run[1]["affinities"]
    rows = {row["step"]: row for row in results["rows"]}
    assert list(rows) == [JOINT, ONE_TASK, OFF, EVERY_STEP, DEFAULT]
    for name, row in rows.items():
        measured = [column for column in results["columns"] if sys.platform == "linux" or "memory" not in column]
        assert all(math.isfinite(row[column]) and row[column] > 0 for column in measured), f"{name}: {row}"
    assert rows[OFF]["ratio"] == 1
    assert sys.platform != "linux" or rows[ONE_TASK]["memory_ratio"] == 1


def test_parameters_add_up_and_the_baselines_train_what_they_say(run: tuple[str, dict]) -> None:
    full, frozen, lora, *vta = run[1]["rows"]
    rows = {"full fine-tuning": full, "frozen backbone": frozen, "LoRA": lora, "VTA": vta[0]}
    trained = {name: [row[column] > 0 for column in PARAMETERS[:3]] for name, row in rows.items()}
    assert trained == {
        "full fine-tuning": [False, True, True],
        "frozen backbone": [False, False, True],
        "LoRA": [True, False, True],
        "VTA": [True, False, True],
    }
    assert rows["LoRA"]["adapters"] == pytest.approx(rows["VTA"]["adapters"], rel=0.1)
    for row in run[1]["rows"]:
        assert row["total"] == pytest.approx(sum(row[column] for column in PARAMETERS[:3]), abs=0.02)
        assert row["tensors_with_gradient"] == row["trainable_tensors"]


def test_the_file_of_results_equals_what_is_printed(run: tuple[str, dict]) -> None:
    printed, results = run
    tables = [
        [line.strip("| ").split(" | ") for line in block.splitlines()]
        for block in printed.split("\n\n")
        if block.startswith("|")
    ]
    for table, expected in zip(tables, (results, results["affinities"]), strict=True):
        figures = [[name, *(None if cell == "-" else float(cell) for cell in cells)] for name, *cells in table[2:]]
        key = next(iter(expected["rows"][0]))
        assert figures == [[row[key], *(row[column] for column in expected["columns"])] for row in expected["rows"]]
    assert [results["summary"], *results["checks"]] == [
        line for line in printed.splitlines() if line and not line.startswith("|")
    ]


def test_fan_out_gives_the_same_bits_as_one_pass_per_task(run: tuple[str, dict]) -> None:
    assert any(line.startswith("PASS: equal to the last bit") for line in run[1]["checks"])


def test_with_check_the_exit_status_says_whether_a_line_failed(
    finished: tuple[subprocess.CompletedProcess, dict],
) -> None:
    process, results = finished
    assert len(results["checks"]) == 4
    assert process.returncode == any(line.startswith("FAIL") for line in results["checks"])


@pytest.mark.parametrize("name", INTERVALS)
def test_a_row_gives_every_labelled_task_the_gradients_of_the_joint_backward_pass(name: str) -> None:
    torch.manual_seed(0)
    size = FAMILIES["swin"].size
    model, images, labels = make_model("swin").train(), make_images(size), make_labels(size)
    labelled = ["semseg"] if name == ONE_TASK else ALL_TASKS
    model(images, labels={task: labels[task] for task in labelled}).loss.backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)

    found = {}
    model.zero_grad = lambda set_to_none: found.update(  # type: ignore[method-assign]
        {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    )
    affinity_step(name, model, images, labels)(0)
    assert {task for task in ALL_TASKS if any(key.startswith(f"heads.{task}.") for key in found)} == set(labelled)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("interval", [interval for interval in INTERVALS.values() if interval])
def test_the_timed_steps_stand_for_a_whole_interval(interval: int) -> None:
    model = make_model("swin").train()
    step = MultitaskStep(model, model, Accelerator(cpu=True), MultitaskArguments(affinity_interval=interval))
    learns = []
    for number in range(interval):
        step.begin(number, [{}])
        learns.append(step.learns_affinity)
    shares = interval_shares(interval)
    assert sum(shares.values()) == pytest.approx(1)
    assert sum(share for number, share in shares.items() if learns[number]) == pytest.approx(sum(learns) / interval)


def made_figures(learning: float = 1.0, four_tasks: float | None = 100.0) -> dict[str, dict]:
    """Figures from steps of 1 s, those that learn of `learning` s; 100 MB, with affinities off `four_tasks` MB."""
    seconds = {(name, number): (1.0, 2.0) for name in INTERVALS for number in interval_shares(INTERVALS[name])}
    for key in ((EVERY_STEP, 0), (DEFAULT, INTERVALS[DEFAULT] - 1)):
        seconds[key] = (learning, 2 * learning)
    return affinity_figures(seconds, dict.fromkeys(INTERVALS, 100.0) | {OFF: four_tasks})


def test_the_default_interval_costs_the_mean_of_its_steps() -> None:
    interval = MultitaskArguments().affinity_interval
    rows = made_figures(learning=3.0)
    mean = sum([*[1.0] * (interval - 1), 3.0]) / interval
    assert rows[DEFAULT]["cpu"] == rows[DEFAULT]["ratio"] == pytest.approx(mean)
    assert rows[DEFAULT]["wall"] == pytest.approx(2 * mean)
    assert rows[EVERY_STEP]["ratio"] == pytest.approx(3)


def test_affinities_may_cost_a_twentieth_of_a_step_and_four_tasks_two_fifths_more_memory_than_one() -> None:
    interval = MultitaskArguments().affinity_interval
    for ratio, verdict in ((1.049, "PASS"), (1.051, "FAIL")):
        line = check_affinity_cost(made_figures(learning=1 + interval * (ratio - 1)))
        assert line.startswith(verdict), line
        assert f"{ratio} (<= 1.05)" in line
    for ratio, verdict in ((1.399, "PASS"), (1.401, "FAIL")):
        line = check_step_memory(made_figures(four_tasks=100 * ratio))
        assert line.startswith(verdict), line
        assert f"{ratio} (<= 1.4)" in line
    assert check_step_memory(made_figures(four_tasks=None)).startswith("not checked")
