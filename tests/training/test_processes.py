"""Two processes on this machine's CPU: the programs train and evaluate as one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mt_adapters import VtaModel
from programs import (
    BACKBONE_CONFIG,
    COMMAND_LINE,
    EXAMPLES,
    NUM_VALIDATION,
    RECIPE,
    free_port,
    run_program,
    start_two,
    write_recipe,
)


def run_two(folder: Path, name: str | Path, *arguments: object) -> list[str]:
    """Runs a program in two processes to their end; what each printed."""
    processes = start_two(folder, name, *arguments)
    for process in processes:
        process.join()
    printed = [(folder / f"process_{rank}.txt").read_text() for rank in range(2)]
    assert [process.exitcode for process in processes] == [0, 0], printed
    return printed


@pytest.mark.slow
def test_torchrun_trains_a_whole_model_in_two_processes_and_writes_everything_once(
    tmp_path: Path, rooms_folder: Path
) -> None:
    settings = {"backbone_config": BACKBONE_CONFIG, "train_backbone": True, "data_dir": str(rooms_folder)}
    recipe = write_recipe(tmp_path, **RECIPE | settings | {"trackers": ["tensorboard"]})
    output = tmp_path / "output"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    program = [str(EXAMPLES / "train_multitask.py"), "--recipe", str(recipe), "--output_dir", str(output)]
    done = subprocess.run(
        [*launch, *program, "--max_steps", "3", "--checkpoint_steps", "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("Everything is in") == 1
    assert done.stdout.count("| part | parameters | trained |") == 1
    metrics = json.loads((output / "metrics.json").read_text())
    assert (metrics["device"], metrics["steps"]) == ("2 process(es), cpu", 3)
    assert len(metrics["history"]) == 1
    assert len(list(output.glob("logs/mt_adapters/events*"))) == 1
    VtaModel.from_pretrained(output)


@pytest.mark.slow
def test_two_processes_with_batches_of_one_train_like_one_with_batches_of_two(tmp_path: Path, recipe: Path) -> None:
    # Normals are labelled at every pixel, so that the mean of the processes' losses is that of the whole batch.
    options = ("--recipe", recipe, "--tasks", "normals", "--max_steps", 3, "--warmup_ratio", 0)
    options = (*options, "--affinity_similarity", "cosine")
    run_program("train_multitask.py", *options, "--output_dir", tmp_path / "one", "--batch_size", 2)
    run_two(tmp_path, "train_multitask.py", *options, "--output_dir", tmp_path / "two", "--batch_size", 1)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    difference = torch.cat([(one[name] - two[name]).flatten() for name in one])
    assert (difference.abs() > 1e-4).float().mean() < 0.01
    results = [
        json.loads((tmp_path / name / "metrics.json").read_text())["results"]["normals"]["mean_angle"]
        for name in ("one", "two")
    ]
    assert results[0] == pytest.approx(results[1], abs=0.01)


def test_two_processes_with_uneven_shares_evaluate_to_the_same_digits_as_one(
    tmp_path: Path, trained: Path, rooms_folder: Path
) -> None:
    assert NUM_VALIDATION % 2 == 1
    results = []
    for name in ("one", "two"):
        output = tmp_path / f"{name}.json"
        options = ("evaluate", trained, "--data-dir", rooms_folder, "--batch-size", 1, "--num-workers", 0)
        options += ("--output", output)
        if name == "one":
            run_program(COMMAND_LINE, *options)
        else:
            printed = run_two(tmp_path, COMMAND_LINE, *options)
            assert ["validation images" in text for text in printed] == [True, False]
        results.append(json.loads(output.read_text()))
    assert results[0] == results[1]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict, dict]:
    """What `steps_in_processes.py` writes: alone, and as the two processes of a pair."""
    program = Path(__file__).with_name("steps_in_processes.py")
    alone, pair = (tmp_path_factory.mktemp(name) for name in ("alone", "pair"))
    run_program(program, alone)
    run_two(pair, program, pair)
    return tuple(load_file(file) for file in (alone / "0.safetensors", pair / "0.safetensors", pair / "1.safetensors"))


@pytest.mark.parametrize("way", ["cosine", "spatial", "some labels"])
def test_two_processes_learn_the_affinities_of_one_with_the_whole_batch(steps: tuple[dict, dict, dict], way: str):
    alone, first, second = (found[f"{way}/affinity"] for found in steps)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-5)
    off_diagonal = alone[~torch.eye(4, dtype=torch.bool)]
    assert (off_diagonal > 0.01).sum() >= 2, "these affinities would not tell right from wrong"


@pytest.mark.parametrize("way", ["cosine", "spatial", "without affinities", "balanced", "uncertainty", "some labels"])
def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(steps: tuple[dict, dict, dict], way: str):
    alone, first, second = (
        {name: tensor for name, tensor in found.items() if name.startswith((f"{way}/gradient", f"{way}/log_var"))}
        for found in steps
    )
    assert alone.keys() <= first.keys() == second.keys()
    assert len(alone) > 20
    # What no label reaches has no gradient in one process, and zeros in two.
    alone |= {name: torch.zeros_like(gradient) for name, gradient in first.items() if name not in alone}
    # MGDA's factors come from products of gradients and carry their rounding on.
    tolerance = 1e-4 if way == "balanced" else 1e-5
    scale = max(gradient.norm().item() for gradient in alone.values())
    for name, gradient in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], gradient, rtol=tolerance, atol=tolerance * 0.1 * scale)
