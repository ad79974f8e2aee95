"""Puts a trained adapter on another backbone and trains it from there, next to the same training from scratch.

The demo's adapter on a pretrained DINOv2, trained on the rooms sample:

    python examples/attach_to_backbone.py outputs/demo/adapter --backbone facebook/dinov2-small --max_steps 200

Affinities, task embeddings and every tensor that has a place of its shape carry over; the report that is logged first
names the others. The settings of train_multitask.py are options here too, or come from a `--recipe`; tasks, adapter
and decoder are those of the adapter. `--no_scratch` leaves out the training from scratch.

Writes to output_dir: adapter/, attached.json (the report, the losses of every step and the results of both trainings),
and checkpoints/ of the trainings.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import GeneralTracker
from accelerate.utils import set_seed
from peft import PeftConfig
from transformers import AutoConfig, HfArgumentParser

from mt_adapters import VtaImageProcessorPil, VtaModel
from mt_adapters.data import open_sources
from mt_adapters.hub.card import metrics_table
from mt_adapters.training.arguments import SECTIONS, parse_arguments
from mt_adapters.training.evaluation import input_blind_results
from mt_adapters.training.loop import train

DEMO = Path(__file__).parent / "recipes" / "rooms_demo.yaml"
WINDOW = 20  # steps over which losses are averaged


class LossHistory(GeneralTracker):
    """Keeps the sum of the tasks' weighted losses of every step."""

    name = "loss_history"
    requires_logging_directory = False

    def __init__(self, weights: dict[str, float]) -> None:
        super().__init__()
        self.weights, self.losses = weights, []

    @property
    def tracker(self) -> list[float]:
        return self.losses

    def store_init_configuration(self, values: dict) -> None:
        pass

    def log(self, values: dict, step: int | None = None, **kwargs: object) -> None:
        if all(f"train/{name}" in values for name in self.weights):
            self.losses.append(sum(weight * values[f"train/{name}"] for name, weight in self.weights.items()))


def smoothed(losses: list[float]) -> list[float]:
    """The mean of each step's loss and of those before it, over a window."""
    windows = [losses[max(0, step + 1 - WINDOW) : step + 1] for step in range(len(losses))]
    return [sum(window) / len(window) for window in windows]


def steps_to_reach(loss: float, losses: list[float]) -> int | None:
    """Number of steps after which the smoothed loss is as low as `loss`; None if it never is."""
    return next((step for step, value in enumerate(smoothed(losses), start=1) if value <= loss), None)


def steps_table(losses: dict[str, list[float]]) -> str:
    """Markdown: the loss from scratch at four steps, and after how many steps the attached adapter is there."""
    rows = [
        f"| steps from scratch | loss (mean of {WINDOW} steps) | steps of the attached adapter to the same loss |",
        "|---|---|---|",
    ]
    scratch = smoothed(losses["from scratch"])
    for quarter in range(1, 5):
        step = max(1, len(scratch) * quarter // 4)
        reached = steps_to_reach(scratch[step - 1], losses["attached"])
        rows.append(f"| {step} | {scratch[step - 1]:.3f} | {reached or 'not reached'} |")
    return "\n".join(rows)


def main() -> None:
    parser = HfArgumentParser(SECTIONS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained_adapter", help="folder or Hub id of the trained adapter")
    parser.add_argument("--no_scratch", action="store_true", help="do not train from scratch for comparison")
    model_arguments, data, training, multitask = parse_arguments(DEMO, parser=parser)
    ours = parser.parse_known_args()[0]
    backbone = model_arguments.backbone or AutoConfig.for_model(**(model_arguments.backbone_config or {}))
    output = Path(training.output_dir)

    set_seed(training.seed)
    attached, report = VtaModel.from_adapter(ours.trained_adapter, backbone=backbone, output_loading_info=True)
    config = attached.config
    models = {"attached": attached}
    if not ours.no_scratch:
        set_seed(training.seed)
        models["from scratch"] = VtaModel.from_backbone(
            backbone,
            tasks=config.tasks,
            adapter=PeftConfig.from_peft_type(**config.adapter),
            decoder=config.decoder,
            decoder_dim=config.decoder_dim,
            share_decoder=config.share_decoder,
        )

    train_set, validation_set, _ = open_sources(data.all_sources(), config.tasks)
    side = data.eval_image_size or data.image_size
    baseline = input_blind_results(train_set, validation_set, attached.tasks, side, data.num_workers)
    record = {"report": asdict(report), "argv": sys.argv[1:], "losses": {}, "results": {}}
    for name, model in models.items():
        # Both see the same images in the same order.
        set_seed(training.seed)
        history = LossHistory({task.name: task.weight for task in model.tasks})
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision=training.mixed_precision,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            dataloader_config=DataLoaderConfiguration(even_batches=False),
            log_with=[history],
        )
        accelerator.init_trackers("mt_adapters")
        folder = output / name.replace(" ", "_")
        state = train(
            model,
            train_set,
            validation_set,
            data,
            replace(training, output_dir=str(folder)),
            accelerator,
            baseline,
            multitask,
        )
        record["losses"][name] = history.losses
        record["results"][name] = next(e["results"] for e in state.history if e["step"] == state.best_step)
        accelerator.end_training()

    attached.save_adapter(output / "adapter")
    processor = VtaImageProcessorPil(size={"height": side, "width": side}, tasks=config.tasks)
    processor.save_pretrained(output / "adapter")
    (output / "attached.json").write_text(json.dumps(record, indent=1) + "\n")
    kinds = {task.name: task.kind for task in attached.tasks}
    print(f"\n{metrics_table(record['results'] | {'input-blind': baseline}, kinds)}\n")
    if not ours.no_scratch:
        print(steps_table(record["losses"]))


if __name__ == "__main__":
    main()
