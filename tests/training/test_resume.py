import json
import pickle
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from mt_adapters.training import loop_state
from mt_adapters.training.loop_state import LoopState, load_checkpoint, register_checkpoint_files, save_checkpoint
from programs import BACKBONE_CONFIG, RECIPE, run_program, start_program, write_recipe

NUM_STEPS = 12
OPTIONS = ("--max_steps", NUM_STEPS, "--checkpoint_steps", 2, "--eval_steps", 4)


def saved_step(output: Path) -> int:
    try:
        return json.loads((output / "checkpoints/last/loop_state.json").read_text())["loop"]["step"]
    except FileNotFoundError:
        return 0


def kill_run(arguments: tuple[object, ...], output: Path, moment: str, rng: random.Random) -> None:
    """Starts or resumes a run and kills it with signal 9 at a moment of this run."""
    began_at = saved_step(output)
    moments: dict[str, Callable[[], bool]] = {
        "before the first checkpoint": lambda: (output / "checkpoints").is_dir(),
        "after a checkpoint": lambda: saved_step(output) > began_at,
        "while a checkpoint is written": lambda: (output / "checkpoints/.last.partial").is_dir(),
    }
    process = start_program("train_multitask.py", *arguments, "--resume", log=output / "log.txt")
    while not moments[moment]() and process.is_alive():
        pass
    if moment == "after a checkpoint":
        time.sleep(rng.uniform(0, 0.25))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (output / "log.txt").read_text()


def outcome(output: Path) -> dict[str, Any]:
    """All that a run leaves, except what tells one run from another."""
    # The adapter's record and card are those of the run, with its seconds and command.
    own = [path for path in output.glob("adapter/*") if path.name not in ("metrics.json", "README.md")]
    files = {path.name: path.read_bytes() for path in own}
    metrics = json.loads((output / "metrics.json").read_text())
    for name in ("seconds", "command"):
        del metrics[name]
    return files | {"model": (output / "model.safetensors").read_bytes(), "metrics": metrics}


@pytest.fixture(scope="session")
def random_recipe(tmp_path_factory: pytest.TempPathFactory, rooms_folder: Path) -> Path:
    """A backbone that is trained with drop-path: the random numbers of the model itself count."""
    settings = {
        "backbone_config": BACKBONE_CONFIG | {"drop_path_rate": 0.5},
        "train_backbone": True,
        "tasks": ["semseg", "depth"],
        "gradient_accumulation_steps": 2,
        "batch_size": 1,
        "balancing": "uncertainty",
        "num_workers": 1,
        "data_dir": str(rooms_folder),
    }
    return write_recipe(tmp_path_factory.mktemp("random_recipe"), **RECIPE | settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe_name", "moments"),
    [
        (
            "recipe",
            (
                "before the first checkpoint",
                "after a checkpoint",
                "while a checkpoint is written",
                "after a checkpoint",
            ),
        ),
        ("random_recipe", ("while a checkpoint is written", "after a checkpoint")),
    ],
    ids=["frozen backbone", "workers, accumulation, drop-path"],
)
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(
    request: pytest.FixtureRequest, tmp_path: Path, recipe_name: str, moments: tuple[str, ...]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed.mkdir()
    recipe = request.getfixturevalue(recipe_name)
    run_program("train_multitask.py", "--recipe", recipe, "--output_dir", whole, *OPTIONS)
    rng = random.Random(0)
    arguments = ("--recipe", recipe, "--output_dir", killed, *OPTIONS)
    for moment in moments:
        kill_run(arguments, killed, moment, rng)
        assert not (killed / "metrics.json").exists()
    printed = run_program("train_multitask.py", *arguments, "--resume")
    assert "resuming after step" in printed

    expected, found = outcome(whole), outcome(killed)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert [entry["step"] for entry in found["metrics"]["history"]] == [4, 8, 12]


def test_a_finished_run_that_is_resumed_writes_its_model_again(tmp_path: Path, trained: Path, recipe: Path) -> None:
    output = tmp_path / "copy"
    shutil.copytree(trained, output)
    (output / "model.safetensors").unlink()
    steps = ("--max_steps", 4, "--eval_steps", 2, "--checkpoint_steps", 2)
    run_program("train_multitask.py", "--recipe", recipe, "--output_dir", output, *steps, "--resume")
    assert (output / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert json.loads((output / "metrics.json").read_text())["steps"] == 4


def test_the_frozen_backbone_is_not_in_a_checkpoint(trained: Path) -> None:
    keys = set(load_file(trained / "checkpoints/last/trained.safetensors"))
    everything = load_file(trained / "model.safetensors")
    adapters = {key for key in everything if ".vta_" in key}
    outside = {key for key in everything if not key.startswith("backbone.")}
    assert adapters
    assert outside
    assert adapters | outside <= keys
    assert not {key for key in keys - adapters - outside if key.endswith(("weight", "bias", "table"))}
    assert not list((trained / "checkpoints").rglob("model*.safetensors"))


class Killed(BaseException):
    """What a simulated kill raises: nothing in the program catches it."""


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(3, 1)
        self.register_buffer("affinity", torch.eye(2))


class Run:
    """The state of a training of `Network`, as the loop has it."""

    def __init__(self) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self.accelerator = Accelerator(cpu=True)
        self.model = Network()
        optimizer = AdamW(self.model.head.parameters(), lr=1.0)
        self.scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        self.state = LoopState()
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        register_checkpoint_files(self.accelerator, self.state, self.scheduler, torch.nn.ModuleDict())

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.accelerator.backward(self.wrapped.head(torch.ones(1, 3)).sum())
        self.optimizer.step()
        self.scheduler.step()
        self.state.step += 1
        # What belongs to the step, to be found again with it.
        torch.nn.init.constant_(self.model.head.bias, self.state.step)

    def save(self, folder: Path) -> None:
        save_checkpoint(self.accelerator, folder)


@pytest.fixture(autouse=True)
def _reset_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def loaded(folder: Path) -> Run:
    run = Run()
    assert load_checkpoint(run.accelerator, folder)
    return run


def killed_save(run: Run, folder: Path, number: int) -> bool:
    """Saves, killed at the given deletion, write or rename; False where the save has fewer of them."""
    count = 0

    def killing(action: Callable[..., None], damage: Callable[..., None]) -> Callable[..., None]:
        def act(*args: Any, **kwargs: Any) -> None:
            nonlocal count
            count += 1
            if count == number:
                damage(*args)
                raise Killed
            action(*args, **kwargs)

        return act

    def delete_some(path: Path) -> None:
        for file in sorted(path.glob("*"))[:2]:
            file.unlink()

    def write_some(path: str, *_: Any) -> None:
        Path(path).mkdir()
        (Path(path) / "trained.safetensors").write_bytes(b"half")

    def nothing(*_: Any) -> None:
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_state.shutil, "rmtree", killing(shutil.rmtree, delete_some))
        patch.setattr(run.accelerator, "save_state", killing(run.accelerator.save_state, write_some))
        patch.setattr(loop_state.os, "rename", killing(loop_state.os.rename, nothing))
        try:
            run.save(folder)
        except Killed:
            return True
    return False


def test_a_checkpoint_brings_back_weights_optimizer_schedule_and_loop_state(tmp_path: Path) -> None:
    run = Run()
    run.step()
    run.step()
    run.state.history.append({"step": 2, "score": 0.1 + 0.2, "results": {"depth": {"rmse": 1 / 3}}})
    run.state.best_step, run.state.best_score, run.state.seconds = 2, 0.1 + 0.2, 1.5
    run.save(tmp_path)
    again = loaded(tmp_path)
    assert again.state == run.state
    assert torch.equal(again.model.head.weight, run.model.head.weight)
    assert again.optimizer.state_dict()["param_groups"] == run.optimizer.state_dict()["param_groups"]
    run.step()
    again.step()
    assert torch.equal(again.model.head.weight, run.model.head.weight)
    assert again.scheduler.get_last_lr() == run.scheduler.get_last_lr() == [1 / 4]


@pytest.mark.parametrize("first", range(8))
def test_a_save_that_is_killed_twice_at_any_moment_leaves_a_complete_checkpoint(tmp_path: Path, first: int) -> None:
    # 0: the first save is not killed; 6 and more: it has ended before.
    num_killed = 0
    for second in range(1, 8):
        folder = tmp_path / str(second)
        folder.mkdir()
        run = Run()
        run.step()
        run.save(folder)
        run.step()
        first_killed = killed_save(run, folder, first)
        run = loaded(folder)
        assert run.state.step in (1, 2)
        assert run.model.head.bias.item() == run.state.step
        before = run.state.step
        run.step()
        second_killed = killed_save(run, folder, second)
        run = loaded(folder)
        assert run.state.step in (before, before + 1)
        assert run.model.head.bias.item() == run.state.step
        num_killed += second_killed
        assert first_killed == (0 < first <= 6), "a save has six deletions, writes and renames"
    assert num_killed >= 4


def test_without_a_checkpoint_nothing_is_loaded(tmp_path: Path) -> None:
    run = Run()
    (tmp_path / ".last.partial").mkdir()
    assert not load_checkpoint(run.accelerator, tmp_path)
    assert run.state == LoopState()


def test_the_previous_checkpoint_is_taken_where_the_last_one_is_missing(tmp_path: Path) -> None:
    run = Run()
    run.step()
    run.save(tmp_path)
    (tmp_path / "last").rename(tmp_path / ".last.old")
    assert loaded(tmp_path).state.step == 1


def test_loading_a_checkpoint_runs_no_code_that_a_file_holds(tmp_path: Path) -> None:
    run = Run()
    run.step()
    run.save(tmp_path)
    marker = tmp_path / "marker"

    class Trap:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
            return Path.touch, (marker,)

    pickled = [path for path in (tmp_path / "last").iterdir() if path.suffix not in (".json", ".safetensors")]
    assert pickled
    for path in [*pickled, tmp_path / "last/custom_checkpoint_0.pkl"]:
        copy = tmp_path / f"copy_{path.stem}"
        shutil.copytree(tmp_path / "last", copy / "last")
        (copy / "last" / path.name).write_bytes(pickle.dumps(Trap()))
        try:
            load_checkpoint(Run().accelerator, copy)
        except (pickle.UnpicklingError, RuntimeError):
            pass
        assert not marker.exists()
    pickle.loads(pickle.dumps(Trap()))
    assert marker.exists()


@pytest.mark.parametrize("change", ["shape", "name"])
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, change: str) -> None:
    run = Run()
    run.save(tmp_path)
    other = Run()
    if change == "shape":
        other.model.head = nn.Linear(3, 2)
    else:
        other.model.depth = nn.Linear(3, 1)
    with pytest.raises(ValueError, match=r"another model: '(head\.bias|depth\.bias)'.*another output_dir"):
        load_checkpoint(other.accelerator, tmp_path)
