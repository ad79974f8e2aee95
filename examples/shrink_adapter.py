"""Halves the files of a trained adapter, and measures what that costs.

    python examples/shrink_adapter.py outputs/demo --output_dir outputs/demo_float16
    python examples/shrink_adapter.py outputs/rooms --output_dir outputs/rooms_float16 --data_dir rooms

Reads the folder that `examples/train_multitask.py` wrote and stores its adapter, decoders and heads in float16 or
bfloat16. The new files are then loaded as a user loads them, in float32, and evaluated on the validation frames of the
training; results, card and predictions.png are those of the rounded weights. `mt-adapters push` publishes the folder.
"""

import argparse
import json
import shutil
from dataclasses import fields
from pathlib import Path

import torch
from accelerate import Accelerator

from mt_adapters import VtaImageProcessorPil, VtaModel
from mt_adapters.data import open_sources
from mt_adapters.hub.card import metrics_table
from mt_adapters.hub.push import write_card
from mt_adapters.hub.record import RECORD_FILE, describe, read_record
from mt_adapters.metrics import delta_m
from mt_adapters.training.arguments import DataArguments
from mt_adapters.training.evaluation import eval_loader, evaluate
from mt_adapters.visualize import plot_predictions

NUM_PICTURES = 4


def size_in_mb(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that a training wrote")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the smaller adapter")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--data_dir", help="folder of the data set; default: as in the training")
    parser.add_argument("--repo_id", help="its name on the Hub, for the card")
    parser.add_argument("--backbone", help="where the backbone is, if not where its config says")
    arguments = parser.parse_args()

    trained, output = read_record(arguments.run), arguments.output_dir
    model = VtaModel.from_adapter(arguments.run / "adapter", backbone=arguments.backbone)
    model.save_adapter(output, getattr(torch, arguments.dtype))
    model = VtaModel.from_adapter(output, backbone=arguments.backbone)
    processor = VtaImageProcessorPil.from_pretrained(arguments.run)
    processor.save_pretrained(output)

    settings = {field.name: trained["arguments"][field.name] for field in fields(DataArguments)}
    data = DataArguments(**settings | ({"data_dir": arguments.data_dir} if arguments.data_dir else {}))
    _, validation_set, _ = open_sources(data.all_sources(), [task.to_dict() for task in model.tasks])
    side = processor.size["height"]
    accelerator = Accelerator()
    loader = eval_loader(validation_set, model.tasks, side, batch_size=8, num_workers=data.num_workers)
    results = evaluate(model.to(accelerator.device), accelerator.prepare(loader), accelerator)

    gain = delta_m(results, trained["input_blind"], trained["tasks"])
    record = trained | describe(model) | {"stored_as": arguments.dtype, "results": results, "mean_gain": gain}
    (output / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n")
    indices = [number * len(validation_set) // NUM_PICTURES for number in range(NUM_PICTURES)]
    plot_predictions(model, validation_set, indices, side, output / "predictions.png")
    for file in arguments.run.glob("affinity*.png"):
        shutil.copyfile(file, output / file.name)
    write_card(output, record, repo_id=arguments.repo_id, is_adapter=True)
    print(metrics_table({"float32": trained["results"], arguments.dtype: results}, trained["tasks"]))
    print(f"\n{size_in_mb(arguments.run / 'adapter'):.2f} MB became {size_in_mb(output):.2f} MB in {output}")


if __name__ == "__main__":
    main()
