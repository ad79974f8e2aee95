"""Two processes with two workers each read seven files: every frame once an epoch, also over a kill and a resume."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mt_adapters.data import FrameDataset
from mt_adapters.data.preparation import prepare_split
from programs import start_two

PROGRAM = Path(__file__).with_name("frames_in_processes.py")
NUM_FRAMES, NUM_SHARDS = 56, 7
STEPS_PER_EPOCH = 7
NUM_STEPS = 3 * STEPS_PER_EPOCH


class Numbered(FrameDataset):
    """The depth of frame i is i + 1 metres everywhere."""

    set_name = "numbered"
    summary = "made for a test"
    labels = {"depth": None}

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"frame_{index}"

    def _frame(self, index: int) -> int:
        return index

    def _image(self, frame: int) -> Image.Image:
        return Image.fromarray(np.full((80, 80, 3), frame, dtype=np.uint8))

    def _label(self, frame: int, label: str) -> Tensor:
        return torch.full((80, 80), frame + 1.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("numbered")
    prepare_split(Numbered(NUM_FRAMES), "train", folder, frames_per_shard=NUM_FRAMES // NUM_SHARDS)
    prepare_split(Numbered(2), "validation", folder)
    assert len(list(folder.glob("train-*.parquet"))) == NUM_SHARDS
    return folder


def frames_of_steps(output: Path) -> list[dict[int, list[int]]]:
    """Per process {step: frames}; a step that was done twice must have had the same frames."""
    found: list[dict[int, list[int]]] = []
    for rank in range(2):
        steps: dict[int, list[int]] = {}
        for line in (output / f"{rank}.txt").read_text().splitlines():
            step, *frames = map(int, line.split())
            assert steps.setdefault(step, frames) == frames, f"step {step} got other frames after the resume"
        found.append(steps)
    return found


def saved_step(output: Path) -> int:
    try:
        return json.loads((output / "checkpoints/last/loop_state.json").read_text())["loop"]["step"]
    except FileNotFoundError:
        return 0


@pytest.mark.slow
def test_every_frame_comes_once_an_epoch_in_two_processes_also_if_they_are_killed(tmp_path: Path, data: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    for process in start_two(tmp_path, PROGRAM, data, whole, NUM_STEPS):
        process.join()
        assert process.exitcode == 0, (tmp_path / "process_0.txt").read_text()
    processes = start_two(tmp_path, PROGRAM, data, killed, NUM_STEPS)
    # In the middle of the second epoch.
    while saved_step(killed) < STEPS_PER_EPOCH + 1 and any(process.is_alive() for process in processes):
        time.sleep(0.005)
    for process in processes:
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    stopped_at = max(frames_of_steps(killed)[0])
    assert STEPS_PER_EPOCH <= stopped_at < NUM_STEPS - 1
    for process in start_two(tmp_path, PROGRAM, data, killed, NUM_STEPS, "--resume"):
        process.join()
        assert process.exitcode == 0, (tmp_path / "process_0.txt").read_text()

    expected = frames_of_steps(whole)
    assert frames_of_steps(killed) == expected
    orders = []
    for epoch in range(3):
        steps = range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH)
        frames = [frame for step in steps for process in expected for frame in process[step]]
        assert sorted(frames) == list(range(1, NUM_FRAMES + 1)), f"epoch {epoch} lost or doubled frames"
        orders.append(frames)
    assert orders[0] != orders[1] != orders[2] != orders[0]
