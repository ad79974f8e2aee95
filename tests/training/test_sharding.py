"""A model whose parameters are sharded over two processes trains like one that is whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training.sharded_in_processes import CASES, LEARNING_RATE, half_of_the_batch, make_training_model

PROGRAM = Path(__file__).parent / "sharded_in_processes.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(PROGRAM), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return folder


@pytest.mark.parametrize(("way", "family"), CASES)
def test_losses_gradients_and_the_step_are_those_of_one_process(folder, way, family):
    found = load_file(folder / f"{way}-{family}.safetensors")
    model = make_training_model(family)
    losses = [model(images, labels=labels).loss for images, labels in (half_of_the_batch(family, r) for r in (0, 1))]
    (sum(losses) / 2).backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found.keys() == {"losses"} | {f"{kind} {name}" for name in trained for kind in ("gradient of", "stepped")}
    torch.testing.assert_close(found["losses"], torch.stack(losses).to(found["losses"].dtype))
    assert losses[0] != losses[1]
    for name, parameter in trained.items():
        torch.testing.assert_close(found[f"gradient of {name}"], parameter.grad, rtol=1e-7, atol=1e-9)
        stepped = parameter.detach() - LEARNING_RATE * parameter.grad
        torch.testing.assert_close(found[f"stepped {name}"], stepped, rtol=1e-7, atol=1e-9)
