"""Runs the example programs on tiny data: in processes that are forked from one that has imported everything."""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
import yaml
from transformers import AutoModel, SwinConfig

from mt_adapters.data.rooms import SAMPLE_DIR

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "examples"
COMMAND_LINE = "mt-adapters"
NUM_TRAIN, NUM_VALIDATION = 9, 5
SIZE = 64
BACKBONE_CONFIG = {
    "model_type": "swin",
    "image_size": SIZE,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 2,
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.0,
}
RECIPE: dict[str, Any] = {
    "adapter_settings": {"embedding_dim": 8},
    "decoder_dim": 8,
    "image_size": SIZE,
    "batch_size": 2,
    "num_workers": 0,
    "trackers": ["none"],
    "affinity_interval": 2,
}

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["mt_adapters", "datasets", "mt_adapters.training.loop", "mt_adapters.hub.card", "mt_adapters.visualize"]
)


def start_program(name: str, *arguments: object, log: Path, **environment: str) -> BaseProcess:
    """Starts examples/NAME, or the command line `mt-adapters`, as if from a shell; what it prints goes to `log`."""
    argv = [name if name == COMMAND_LINE else str(EXAMPLES / name), *map(str, arguments)]
    process = _CONTEXT.Process(target=_run, args=(argv, str(log), environment))
    process.start()
    return process


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def start_two(folder: Path, name: str | Path, *arguments: object) -> list[BaseProcess]:
    """Starts a program in two processes that are told of each other as torchrun tells them.

    What each prints goes to process_0.txt and process_1.txt.
    """
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        start_program(
            str(name), *arguments, log=folder / f"process_{rank}.txt", RANK=str(rank), LOCAL_RANK=str(rank), **shared
        )
        for rank in range(2)
    ]


def run_program(name: str, *arguments: object, exit_status: int = 0) -> str:
    """Runs examples/NAME, or the command line, to its end and returns what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = start_program(name, *arguments, log=log)
        process.join()
        printed = log.read_text()
    assert process.exitcode == exit_status, printed
    return printed


def _run(argv: list[str], log: str, environment: dict[str, str]) -> None:
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = argv
    if argv[0] == COMMAND_LINE:
        # As the script that pip installs: JSON on the standard output, everything else beside it.
        from mt_adapters_cli import main

        main()
    else:
        runpy.run_path(argv[0], run_name="__main__")


def write_recipe(folder: Path, **settings: Any) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(scope="session")
def rooms_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first frames of the shipped sample; an odd number for validation."""
    folder = tmp_path_factory.mktemp("rooms")
    for split, count in (("train", NUM_TRAIN), ("validation", NUM_VALIDATION)):
        table = pyarrow.parquet.read_table(SAMPLE_DIR / f"{split}.parquet").slice(0, count)
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A "pretrained" backbone."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    AutoModel.from_config(SwinConfig(**BACKBONE_CONFIG)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, rooms_folder: Path, backbone_folder: Path) -> Path:
    """Tiny settings for a frozen backbone; tests add their own on the command line."""
    return write_recipe(
        tmp_path_factory.mktemp("recipe"), **RECIPE, backbone=str(backbone_folder), data_dir=str(rooms_folder)
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """What examples/train_multitask.py wrote in a short training."""
    output = tmp_path_factory.mktemp("trained")
    printed = run_program(
        "train_multitask.py",
        *("--recipe", recipe, "--output_dir", output, "--max_steps", 4, "--eval_steps", 2, "--checkpoint_steps", 2),
        *("--trackers", "tensorboard"),
    )
    (output / "printed.txt").write_text(printed)
    return output
