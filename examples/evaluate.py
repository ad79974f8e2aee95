"""Evaluates a model folder, a Hub id or an adapter on a validation set and prints its metrics.

    python examples/evaluate.py outputs/demo
    python examples/evaluate.py outputs/rooms_dinov2_small/adapter --adapter --data_dir ROOMS_FOLDER
    torchrun --nproc_per_node 2 examples/evaluate.py outputs/demo --output results.json

The metrics are the same, to the last digit, for any number of processes.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from transformers import AutoImageProcessor

from mt_adapters import VtaModel
from mt_adapters.data import get_dataset
from mt_adapters.hub.card import metrics_table
from mt_adapters.training.evaluation import eval_loader, evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--adapter", action="store_true", help="it is an adapter, to be put on its backbone")
    parser.add_argument("--backbone", help="folder or Hub id of the adapter's backbone, if it has moved")
    parser.add_argument("--dataset", default="rooms")
    parser.add_argument("--data_dir", help="the data set's folder; default: the sample that is shipped")
    parser.add_argument("--image_size", type=int, help="side in pixels; default: the image processor's")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()

    accelerator = Accelerator(
        # Said aloud, so that several processes on CPUs find each other.
        cpu=not torch.accelerator.is_available(),
        dataloader_config=DataLoaderConfiguration(even_batches=False),
    )
    if arguments.adapter:
        model = VtaModel.from_adapter(arguments.model, backbone=arguments.backbone)
    else:
        model = VtaModel.from_pretrained(arguments.model)
    side = arguments.image_size or AutoImageProcessor.from_pretrained(arguments.model).size["height"]
    dataset = get_dataset(arguments.dataset)("validation", arguments.data_dir)
    loader = eval_loader(dataset, model.tasks, side, arguments.batch_size, arguments.num_workers)
    results = evaluate(model.to(accelerator.device), accelerator.prepare(loader), accelerator)

    if accelerator.is_main_process:
        kinds = {task.name: task.kind for task in model.tasks}
        print(f"{len(dataset)} validation images of {arguments.dataset} at {side} x {side} pixels\n")
        print(metrics_table({arguments.model: results}, kinds))
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    accelerator.end_training()


if __name__ == "__main__":
    main()
