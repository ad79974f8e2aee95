"""Trains one model on several dense tasks and shows what it learned.

The demo, on the rooms sample that the package ships (CPU, minutes):

    python examples/train_multitask.py

A recipe, other settings, several processes, going on after an interruption:

    accelerate launch examples/train_multitask.py --recipe examples/recipes/rooms_dinov2_small.yaml --data_dir rooms
    torchrun --nproc_per_node 2 examples/train_multitask.py --batch_size 4
    python examples/train_multitask.py --resume

(On a machine without a GPU `accelerate launch --num_processes 2` starts one process only; torchrun starts two.)

Baselines with the same backbone, data and loop: `--adapter none`, `--adapter lora`, and the linear probe
`--adapter none --decoder linear`.

Writes to output_dir: the model (config.json, model.safetensors, preprocessor_config.json), adapter/, metrics.json,
predictions.png, affinity.png, affinity_history.json and .png, README.md (the model's card), and checkpoints/ and logs/
of the training. `model.push_to_hub("org/name")` or `mt-adapters push` publish it.
"""

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import ProjectConfiguration, set_seed
from peft import LoraConfig
from transformers import AutoConfig

from mt_adapters import VtaAdapterConfig, VtaImageProcessorPil, VtaModel
from mt_adapters.data import Mixture, open_sources
from mt_adapters.hub.card import metrics_table, parameter_table
from mt_adapters.hub.push import write_card
from mt_adapters.hub.record import describe
from mt_adapters.training.arguments import Arguments, ModelArguments, parse_arguments
from mt_adapters.training.evaluation import Results, input_blind_results
from mt_adapters.training.loop import train
from mt_adapters.training.loop_state import LoopState
from mt_adapters.visualize import plot_affinity, plot_affinity_history, plot_predictions

DEMO = Path(__file__).parent / "recipes" / "rooms_demo.yaml"
NUM_PICTURES = 4


def with_classes(specs: list, classes: dict[str, tuple[str, ...]]) -> list[dict]:
    """The tasks' settings; those with classes have as many logits as their data sets have classes."""
    settings = [{"name": spec} if isinstance(spec, str) else dict(spec) for spec in specs]
    return [
        {"num_labels": len(classes[task["name"]])} | task if task["name"] in classes else task for task in settings
    ]


def build_model(arguments: ModelArguments, classes: dict[str, tuple[str, ...]]) -> VtaModel:
    """`classes`: of each task that has some, from its data sets."""
    if (arguments.backbone is None) == (arguments.backbone_config is None):
        raise ValueError(
            f"backbone is {arguments.backbone!r} and backbone_config {arguments.backbone_config!r}; give one of them: "
            "a Hub id or folder, or (in a recipe) the config of a backbone with random weights"
        )
    adapters = {
        "vta": lambda: VtaAdapterConfig(**arguments.adapter_settings),
        "lora": lambda: LoraConfig(**{"target_modules": ["q_proj", "v_proj"]} | arguments.lora_settings),
        "none": lambda: None,
    }
    return VtaModel.from_backbone(
        arguments.backbone or AutoConfig.for_model(**arguments.backbone_config),
        tasks=with_classes(arguments.tasks, classes),
        adapter=adapters[arguments.adapter](),
        decoder=arguments.decoder,
        decoder_dim=arguments.decoder_dim,
        share_decoder=arguments.share_decoder,
        train_backbone=arguments.train_backbone,
        # The config has room for the names of one task's classes.
        id2label=dict(enumerate(next(iter(classes.values()), ()))),
    )


def without_folders(value: Any) -> Any:
    """The same setting with absolute paths cut to their last part: folders of one machine are not published."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    option, sign, path = value.rpartition("=") if isinstance(value, str) else ("", "", "")
    return f"{option}{sign}{Path(path).name}" if Path(path).is_absolute() else value


def run_record(
    model: VtaModel,
    state: LoopState,
    baseline: Results,
    arguments: Arguments,
    train_set: Mixture,
    validation_set: Mixture,
    accelerator: Accelerator,
) -> dict:
    """What metrics.json holds: the results, and all that is needed to get them again."""
    model_arguments, data, training, multitask = arguments
    best = next(entry for entry in state.history if entry["step"] == state.best_step)
    settings = {
        name: without_folders(value)
        for name, value in (asdict(model_arguments) | asdict(data) | asdict(training) | asdict(multitask)).items()
        if name not in ("output_dir", "resume")
    }
    side = data.eval_image_size or data.image_size
    return describe(model) | {
        "results": best["results"],
        "input_blind": baseline,
        "mean_gain": best["score"],
        "evaluation": f"{len(validation_set)} validation images of {' and '.join(validation_set.names)} "
        f"at {side} x {side} pixels",
        "datasets": dict(zip(train_set.names, train_set.summaries, strict=True)),
        "evaluated_on": validation_set.names,
        "bad_samples": {key: state.bad_samples[key] for key in ("num_drawn", "num_bad")},
        # In how many updates each task took part, and how many it missed for want of a usable gradient.
        "affinity_updates": {
            key: dict(zip(model.task_names, state.affinity_history[-1][key], strict=True))
            for key in ("num_updates", "num_skipped")
        }
        if state.affinity_history
        else None,
        "steps": state.step,
        "best_step": state.best_step,
        "history": state.history,
        "seconds": state.seconds,
        "device": f"{accelerator.num_processes} process(es), {accelerator.device.type}",
        "command": shlex.join(["python", "examples/train_multitask.py", *map(without_folders, sys.argv[1:])]),
        "arguments": settings,
    }


def main() -> None:
    arguments = model_arguments, data, training, multitask = parse_arguments(default_recipe=DEMO)
    output = Path(training.output_dir)
    accelerator = Accelerator(
        # Said aloud, so that several processes on CPUs find each other.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=training.mixed_precision,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(even_batches=False),
        log_with=[name for name in training.trackers if name != "none"],
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "logs")),
    )
    set_seed(training.seed)
    train_set, validation_set, classes = open_sources(data.all_sources(), model_arguments.tasks)
    model = build_model(model_arguments, classes)
    if accelerator.is_main_process:
        print(parameter_table(model.parameter_report()))
    side = data.eval_image_size or data.image_size
    skip_bad = data.on_bad_sample == "skip"
    baseline = input_blind_results(train_set, validation_set, model.tasks, side, data.num_workers, skip_bad)
    accelerator.init_trackers("mt_adapters", config={"max_steps": training.max_steps, "seed": training.seed})

    state = train(model, train_set, validation_set, data, training, accelerator, baseline, multitask)

    if accelerator.is_main_process:
        record = run_record(model, state, baseline, arguments, train_set, validation_set, accelerator)
        model.save_pretrained(output)
        processor = VtaImageProcessorPil(size={"height": side, "width": side}, tasks=model.config.tasks)
        processor.save_pretrained(output)
        indices = [number * len(validation_set) // NUM_PICTURES for number in range(NUM_PICTURES)]
        plot_predictions(model, validation_set, indices, side, output / "predictions.png")
        if record["affinity"] is not None:
            plot_affinity(model.affinity, model.task_names, output / "affinity.png")
        if state.affinity_history:
            plot_affinity_history(state.affinity_history, model.task_names, output / "affinity_history.png")
            (output / "affinity_history.json").write_text(json.dumps(state.affinity_history) + "\n")
        (output / "metrics.json").write_text(json.dumps(record, indent=1) + "\n")
        write_card(output, record)
        if model.config.adapter is not None and not model.config.train_backbone:
            model.save_adapter(output / "adapter")
            processor.save_pretrained(output / "adapter")
            (output / "adapter" / "metrics.json").write_text(json.dumps(record, indent=1) + "\n")
            write_card(output / "adapter", record, run_folder=output, is_adapter=True)
        columns = {"this model": record["results"], "input-blind": record["input_blind"]}
        print(f"\n{record['evaluation']}, after {state.step} steps in {state.seconds / 60:.1f} minutes\n")
        print(metrics_table(columns, record["tasks"]))
        print(f"\nEverything is in {output}: look at {output / 'predictions.png'}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
