"""The benchmark runs, and its file of results holds what it prints."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).parents[1] / "benchmarks" / "bench.py"
PARAMETERS = ["adapters", "backbone", "decoders_and_heads", "total", "parameters_with_gradient"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """What the quick benchmark prints, and its file of results."""
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    command = [sys.executable, str(PROGRAM), "--quick", "--json", str(file)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout, json.loads(file.read_text())


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
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    table = {name: [None if cell == "-" else float(cell) for cell in cells] for name, *cells in lines[2:]}
    assert table == {row["model"]: [row[column] for column in results["columns"]] for row in results["rows"]}
    assert [results["summary"], *results["checks"]] == [
        line for line in printed.splitlines() if line and not line.startswith("|")
    ]


def test_fan_out_gives_the_same_bits_as_one_pass_per_task(run: tuple[str, dict]) -> None:
    assert any(line.startswith("PASS: equal to the last bit") for line in run[1]["checks"])
