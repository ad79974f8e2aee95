"""Program of `test_exactly_once.py`: trains on a prepared data set and notes which frames each step was given.

    torchrun --nproc_per_node 2 tests/training/frames_in_processes.py DATA OUTPUT STEPS [--resume]

The depth of a frame is its number in metres. Each process appends a line "STEP NUMBER NUMBER ..." to OUTPUT/RANK.txt.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration

sys.path.insert(0, str(Path(__file__).parents[1]))

from mt_adapters.data import PreparedDataset
from mt_adapters.training.arguments import DataArguments, MultitaskArguments, TrainingArguments
from mt_adapters.training.loop import train
from mt_adapters.training.step import MultitaskStep
from tiny_models import make_model


def main(data: Path, output: Path, steps: int, resume: bool) -> None:
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))
    notes = output / f"{accelerator.process_index}.txt"
    original = MultitaskStep.backward

    def noting(step: MultitaskStep, pixel_values: torch.Tensor, labels: dict[str, torch.Tensor]) -> Any:
        numbers = labels["depth"][:, 0, 0].round().long().tolist()
        with open(notes, "a") as file:
            print(step.step, *numbers, file=file)
        return original(step, pixel_values, labels)

    MultitaskStep.backward = noting  # type: ignore[method-assign]
    torch.manual_seed(0)
    train(
        make_model("swin", tasks=["depth"]),
        PreparedDataset("train", data),
        PreparedDataset("validation", data),
        DataArguments(image_size=64, num_workers=2),
        TrainingArguments(
            output_dir=str(output), max_steps=steps, batch_size=4, checkpoint_steps=2, resume=resume, trackers=["none"]
        ),
        accelerator,
        {"depth": {"rmse": 1.0}},
        MultitaskArguments(affinity_interval=0),
    )
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), "--resume" in sys.argv)
