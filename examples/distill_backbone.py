"""Distils a large pretrained backbone into a small one: no labels, any images.

The student learns to give the teacher's feature maps (`mt_adapters.distillation` says how). Its config may be of any
type that mt_adapters knows; the default is the small Swin that the package ships as "mt-adapters/swin-nano-rooms".
On the sample that the package ships, on your own pictures with your own student, on several processes, after an
interruption:

    python examples/distill_backbone.py --max_steps 500
    python examples/distill_backbone.py --data_dir PICTURES --student_config config.json --save_dtype float16
    torchrun --nproc_per_node 2 examples/distill_backbone.py --data_dir PICTURES --mixed_precision bf16
    python examples/distill_backbone.py --resume

`--data_dir` is a folder of pictures (its folders count too), or one with a train.parquet that has a column "image".
Writes to output_dir the student as transformers does (config.json, model.safetensors), distillation.json (settings,
losses, seconds, versions) and loss.png; checkpoints/, and while it runs views/: the teacher's features of fixed views
of all images, num_views times 200 kB a map for each image with the default teacher.
Then: `python examples/train_multitask.py --backbone outputs/distilled`.
"""

import json
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed, tqdm
from matplotlib.figure import Figure
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModel,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    get_cosine_schedule_with_warmup,
)

from mt_adapters.backbones import get_family, load_backbone
from mt_adapters.data import AugmentedDataset, StepSampler, TrainTransform
from mt_adapters.data.rooms import SAMPLE_DIR
from mt_adapters.distillation import FeatureMatching, Images, TeacherViews, ViewSettings, open_images, teacher_channels
from mt_adapters.distillation.arguments import DistillationArguments
from mt_adapters.hub.record import weights_digest
from mt_adapters.training.loop_state import (
    LoopState,
    finite_or_error,
    load_checkpoint,
    register_checkpoint_files,
    save_checkpoint,
)

# The paper's four stages, the last 8C wide. Windows of 4 tokens fit images from 97 pixels.
STUDENT = {
    "model_type": "swin",
    "image_size": 128,
    "patch_size": 4,
    "embed_dim": 40,
    "depths": [2, 2, 6, 2],
    "num_heads": [2, 4, 8, 16],
    "window_size": 4,
    "drop_path_rate": 0.0,
}
# Settings that do not change what comes out.
NOT_OF_THE_RESULT = ("output_dir", "keep_views", "resume")
# Biases and embeddings that have the shape of a matrix; only matrices are decayed.
NO_DECAY = ("position_embeddings", "relative_position_bias_table", "cls_token")


@dataclass
class DistillationState(LoopState):
    """Where the training stands; `teacher_seconds` is what making the views took."""

    teacher_seconds: float = 0.0


def student_config(arguments: DistillationArguments) -> PreTrainedConfig:
    settings: Any = STUDENT
    if arguments.student_config is not None:
        try:
            settings = json.loads(Path(arguments.student_config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"student_config {arguments.student_config!r} is no readable JSON file: {error}"
            ) from error
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise ValueError(
            f"student_config {arguments.student_config!r} has no model_type: give the config.json of a transformers "
            f"backbone, or settings like {json.dumps(STUDENT)}"
        )
    family = get_family(settings["model_type"])
    config = AutoConfig.for_model(**settings)
    family.check_image_size(config, arguments.image_size, arguments.image_size)
    return config


def make_views(
    images: Mapping[str, Images], teacher: PreTrainedModel, arguments: DistillationArguments, accelerator: Accelerator
) -> dict[str, TeacherViews]:
    """Training views and one view of each held-out image; the main process makes them, the others read them."""
    teacher.to(accelerator.device)  # type: ignore[arg-type]
    digest = f"{weights_digest(teacher)} {accelerator.mixed_precision}"
    views = {}
    with accelerator.main_process_first():
        for name, part in images.items():
            settings = ViewSettings(
                num_views=arguments.num_views if name == "train" else 1,
                image_size=arguments.image_size,
                teacher_image_size=arguments.teacher_image_size,
                teacher_maps=tuple(arguments.teacher_maps),
                crop_scale=tuple(arguments.crop_scale),  # type: ignore[arg-type]
                batch_size=arguments.teacher_batch_size,
                seed=arguments.seed,
            )
            folder = Path(arguments.output_dir) / "views" / name
            views[name] = TeacherViews(
                folder, part, teacher, settings, digest, accelerator.autocast, arguments.num_workers
            )
    return views


def loader(
    views: TeacherViews, arguments: DistillationArguments, num_samples: int, color_jitter: tuple[float, ...]
) -> DataLoader:
    """Batches of student images, coloured anew each time they come, with the teacher's features."""
    side = arguments.image_size
    # The views are cropped and flipped already.
    colors = TrainTransform((), (side, side), scale=(1.0, 1.0), flip=False, color_jitter=color_jitter)  # type: ignore[arg-type]

    def transform(view: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        pixel_values = colors({"image": view["image"], "labels": {}}, rng)["pixel_values"]
        return {"pixel_values": pixel_values, "features": view["features"]}

    return DataLoader(
        AugmentedDataset(views, transform, arguments.seed),
        batch_size=arguments.batch_size,
        sampler=StepSampler([[len(views)]], num_samples, arguments.seed),  # type: ignore[arg-type]
        num_workers=arguments.num_workers,
        generator=torch.Generator().manual_seed(arguments.seed),
    )


@torch.no_grad()
def measure(model: FeatureMatching, batches: DataLoader, accelerator: Accelerator) -> dict[str, float]:
    """Mean of all losses over the held-out images; every process measures all of them."""
    model.eval()
    sums: dict[str, float] = {}
    count = 0
    for batch in batches:
        with accelerator.autocast():
            values = model(
                batch["pixel_values"].to(accelerator.device), [x.to(accelerator.device) for x in batch["features"]]
            )
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(batch["pixel_values"])
        count += len(batch["pixel_values"])
    model.train()
    return {name: value / count for name, value in sums.items()}


def distill(
    model: FeatureMatching, teacher: PreTrainedModel, arguments: DistillationArguments, accelerator: Accelerator
) -> DistillationState:
    """Trains the model in place."""
    steps, output = arguments.max_steps, Path(arguments.output_dir)
    checkpoints = output / "checkpoints"
    if not arguments.resume and accelerator.is_main_process:
        # An earlier run in this folder must not be what a later --resume goes on from.
        shutil.rmtree(checkpoints, ignore_errors=True)
    accelerator.wait_for_everyone()
    checkpoints.mkdir(parents=True, exist_ok=True)
    trained = [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]
    groups = [
        {"params": [x for name, x in trained if decays == (x.ndim > 1 and not name.endswith(NO_DECAY))]}
        | {"weight_decay": arguments.weight_decay if decays else 0.0}
        for decays in (True, False)
    ]
    wrapped = accelerator.prepare_model(model)
    optimizer = AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.98))
    scheduler = get_cosine_schedule_with_warmup(optimizer, round(steps * arguments.warmup_ratio), steps)
    optimizer = accelerator.prepare_optimizer(optimizer)
    state = DistillationState()
    # The scheduler counts optimiser steps, whatever the number of processes; Accelerate's wrapper would not.
    register_checkpoint_files(accelerator, state, scheduler, torch.nn.ModuleDict())
    if arguments.resume and load_checkpoint(accelerator, checkpoints) and accelerator.is_main_process:
        print(f"resuming after step {state.step}")
    if state.step >= steps:
        return state

    train_images, held_out = open_images(arguments.data_dir or SAMPLE_DIR).split(arguments.holdout)
    views = make_views({"train": train_images, "holdout": held_out}, teacher, arguments, accelerator)
    state.teacher_seconds = sum(part.seconds for part in views.values())
    if state.step == 0:
        model.set_statistics(views["train"].statistics())
    num_samples = steps * arguments.batch_size * accelerator.num_processes
    batches = accelerator.prepare(loader(views["train"], arguments, num_samples, tuple(arguments.color_jitter)))
    batches = accelerator.skip_first_batches(batches, state.step)
    holdout = loader(views["holdout"], arguments, len(held_out), (0.0,) * 4)

    model.train()
    progress = tqdm(total=steps, initial=state.step, desc="distil")
    started = time.perf_counter() - state.seconds
    for batch in batches:
        values = wrapped(batch["pixel_values"], batch["features"])
        losses = finite_or_error(values, state.step)
        accelerator.backward(torch.stack([*values.values()]).mean())
        accelerator.clip_grad_norm_([x for _, x in trained], arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        state.step += 1
        progress.update()
        progress.set_postfix({name: f"{value:.3f}" for name, value in losses.items()})
        done = state.step == steps
        if done or state.step % max(1, steps // 200) == 0 or state.step % arguments.eval_steps == 0:
            state.history.append({"step": state.step, "train": losses})
        if done or state.step % arguments.eval_steps == 0:
            state.history[-1]["holdout"] = measure(model, holdout, accelerator)
        if done or state.step % arguments.checkpoint_steps == 0:
            state.seconds = time.perf_counter() - started
            save_checkpoint(accelerator, checkpoints)
    progress.close()
    return state


def plot_losses(history: list[dict[str, Any]], file: Path) -> None:
    """Writes a PNG with a panel per teacher map."""
    names = [name for name in history[-1]["train"] if name.startswith("loss")]
    figure = Figure(figsize=(4.5 * len(names), 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for part in ("train", "holdout"):
            entries = [entry for entry in history if part in entry]
            axis.plot([x["step"] for x in entries], [x[part][name] for x in entries], label=part)
        axis.set(title=name, xlabel="step", ylim=(0, None))
        axis.legend()
    figure.savefig(file, dpi=110)


def without_folders(value: Any) -> Any:
    """The same argument with an absolute path cut to its last part: folders of one machine are not published."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def main() -> None:
    (arguments,) = HfArgumentParser(DistillationArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    output = Path(arguments.output_dir)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=arguments.mixed_precision,
        # The others wait while the main process runs the teacher.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )
    set_seed(arguments.seed)
    config = student_config(arguments)
    teacher = load_backbone(arguments.teacher).eval()
    model = FeatureMatching(AutoModel.from_config(config), teacher_channels(teacher, arguments.teacher_maps))

    state = distill(model, teacher, arguments, accelerator)

    if accelerator.is_main_process:
        student = model.student.to(getattr(torch, arguments.save_dtype))
        student.save_pretrained(output)
        settings = asdict(arguments) | {"student": config.to_diff_dict()}
        record = {
            "teacher": without_folders(arguments.teacher),
            "parameters": sum(parameter.numel() for parameter in student.parameters()),
            "steps": state.step,
            "losses": state.history[-1],
            "history": state.history,
            "seconds": {"teacher": state.teacher_seconds, "training": state.seconds},
            "device": f"{accelerator.num_processes} process(es), {accelerator.device.type}",
            "threads": torch.get_num_threads(),
            "command": shlex.join(["python", "examples/distill_backbone.py", *map(without_folders, sys.argv[1:])]),
            "arguments": {
                name: without_folders(value) for name, value in settings.items() if name not in NOT_OF_THE_RESULT
            },
            "versions": {name: version(name) for name in ("mt-adapters", "torch", "transformers", "accelerate")},
        }
        (output / "distillation.json").write_text(json.dumps(record, indent=1) + "\n")
        plot_losses(state.history, output / "loss.png")
        if not arguments.keep_views:
            shutil.rmtree(output / "views", ignore_errors=True)
        held_out = {name: round(value, 3) for name, value in state.history[-1]["holdout"].items()}
        print(f"\nHeld-out images: {held_out}\nThe backbone is in {output}: --backbone {output}; see also loss.png")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
