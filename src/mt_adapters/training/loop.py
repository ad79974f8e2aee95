"""The training loop: batches in, a trained model out, exactly resumable.

The order of samples, their augmentation and the weights depend on the seed and the step alone, so that a run that was
killed and resumed ends with the same weights as one that was not.
"""

import math
import shutil
import time
from contextlib import nullcontext
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging

from mt_adapters.data import AugmentedDataset, Mixture, MultitaskCollator, StepSampler, TrainTransform
from mt_adapters.models.vta.modeling_vta import VtaModel
from mt_adapters.models.vta.parameters import adapter_parameter_names
from mt_adapters.training.arguments import DataArguments, MultitaskArguments, TrainingArguments
from mt_adapters.training.bad_samples import BadSamples
from mt_adapters.training.evaluation import Results, eval_loader, evaluate, mean_gain
from mt_adapters.training.loop_state import (
    BEST_FILE,
    LoopState,
    finite_or_error,
    load_best,
    load_checkpoint,
    register_checkpoint_files,
    save_checkpoint,
    save_tensors,
    trained_state,
)
from mt_adapters.training.step import MultitaskStep

logger = logging.get_logger(__name__)

# Biases and embeddings that have the shape of a matrix.
NO_DECAY = ("position_embeddings", "relative_position_bias_table", "cls_token", "mask_token")


def parameter_groups(model: VtaModel, training: TrainingArguments) -> list[dict[str, Any]]:
    """Weight decay on matrices only; embeddings, biases and norms are not pulled to zero."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    adapters = set(adapter_parameter_names(model))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_backbone = name.startswith("backbone.") and name not in adapters
            decays = parameter.ndim > 1 and not name.endswith(NO_DECAY)
            groups.setdefault((is_backbone, decays), []).append(parameter)
    backbone_rate = training.backbone_learning_rate
    backbone_rate = training.learning_rate if backbone_rate is None else backbone_rate
    return [
        {
            "params": parameters,
            "lr": backbone_rate if is_backbone else training.learning_rate,
            "weight_decay": training.weight_decay if decays else 0.0,
        }
        for (is_backbone, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def train_loader(
    mixture: Mixture, model: VtaModel, data: DataArguments, training: TrainingArguments, num_samples: int
) -> DataLoader:
    transform = TrainTransform(
        model.tasks,
        (data.image_size, data.image_size),
        scale=tuple(data.crop_scale),  # type: ignore[arg-type]
        color_jitter=tuple(data.color_jitter),  # type: ignore[arg-type]
    )
    return DataLoader(
        AugmentedDataset(mixture, transform, training.seed, skip_bad=data.on_bad_sample == "skip"),
        batch_size=training.batch_size,
        sampler=StepSampler(mixture.shard_lengths, num_samples, training.seed, mixture.weights),
        collate_fn=MultitaskCollator(model.tasks),
        num_workers=data.num_workers,
        drop_last=True,
        # Its own, so that starting the loader again after a resume draws nothing from the model's randomness.
        generator=torch.Generator().manual_seed(training.seed),
    )


def train(
    model: VtaModel,
    train_set: Dataset,
    validation_set: Dataset,
    data: DataArguments,
    training: TrainingArguments,
    accelerator: Accelerator,
    baseline: Results,
    multitask: MultitaskArguments | None = None,
) -> LoopState:
    """Trains the model in place and leaves it with the weights of its best evaluation.

    Args:
        baseline: results that the score of an evaluation is measured against (the input-blind predictor's).
        multitask: how the tasks act on each other.

    Raises:
        ValueError: if a setting does not fit, or a loss becomes NaN or infinite.
    """
    multitask = multitask or MultitaskArguments()
    steps, accumulation = training.max_steps, training.gradient_accumulation_steps
    checkpoints = Path(training.output_dir) / "checkpoints"
    if not training.resume and accelerator.is_main_process:
        # An earlier run in this folder must not be what a later --resume goes on from.
        shutil.rmtree(checkpoints, ignore_errors=True)
    accelerator.wait_for_everyone()
    checkpoints.mkdir(parents=True, exist_ok=True)
    num_samples = steps * accumulation * training.batch_size * accelerator.num_processes
    mixture = Mixture.of(train_set, {task.name: task.kind for task in model.tasks})
    loader = train_loader(mixture, model, data, training, num_samples)
    side = data.eval_image_size or data.image_size
    validation = eval_loader(
        validation_set, model.tasks, side, training.batch_size, data.num_workers, data.on_bad_sample == "skip"
    )
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    wrapped = accelerator.prepare_model(model)
    step = MultitaskStep(model, wrapped, accelerator, multitask)
    if training.batch_size * accumulation < step.num_parts:
        raise ValueError(
            f"affinity_similarity={multitask.affinity_similarity} compares two halves of what goes into a step, but a "
            "step has one image per process: raise batch_size or gradient_accumulation_steps, or choose "
            "affinity_similarity=cosine or affinity_interval=0"
        )
    groups = parameter_groups(model, training)
    if weights := list(step.balancing.parameters()):
        groups.append({"params": weights, "lr": training.learning_rate, "weight_decay": 0.0})
    optimizer = AdamW(groups, betas=(0.9, 0.98))
    scheduler = get_cosine_schedule_with_warmup(optimizer, round(steps * training.warmup_ratio), steps)
    optimizer, loader, validation = accelerator.prepare(optimizer, loader, validation)

    state = LoopState()
    # The scheduler counts optimiser steps, whatever the number of processes; Accelerate's wrapper would not.
    register_checkpoint_files(accelerator, state, scheduler, step.state)
    if training.resume and load_checkpoint(accelerator, checkpoints):
        logger.warning("resuming after step %d", state.step)
        loader = accelerator.skip_first_batches(loader, state.step * accumulation)
    bad_samples = BadSamples(state.bad_samples, data.max_bad_share, len(mixture))
    if state.step == steps:
        load_best(model, checkpoints)
        return state

    model.train()
    progress = tqdm(total=steps, initial=state.step, desc="train")
    started = time.perf_counter() - state.seconds
    batches_of_loader = iter(loader)
    while batches := list(islice(batches_of_loader, accumulation)):
        bad_samples.add(batches, accelerator)
        step.begin(state.step, [batch["labels"] for batch in batches])
        for number, batch in enumerate(batches):
            with nullcontext() if number + 1 == accumulation else accelerator.no_sync(wrapped):
                losses = finite_or_error(step.backward(batch["pixel_values"], batch["labels"]), state.step)
        step.finish()
        accelerator.clip_grad_norm_(
            [parameter for parameter in model.parameters() if parameter.requires_grad], training.max_grad_norm
        )
        step.observe()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        state.step += 1
        progress.update()
        progress.set_postfix({name: f"{value:.3f}" for name, value in losses.items()})
        accelerator.log(
            {f"train/{name}": value for name, value in losses.items()} | {"learning_rate": scheduler.get_last_lr()[0]},
            step=state.step,
        )
        done = state.step == steps
        if step.learns_affinity and (done or state.step % step.history_interval(steps) == 0):
            entry = {"step": state.step, **step.affinity_record()}
            state.affinity_history.append(entry)
            pairs = product(enumerate(model.task_names), repeat=2)
            accelerator.log(
                {f"affinity/{source}_to_{target}": entry["affinity"][s][t] for (s, source), (t, target) in pairs},
                step=state.step,
            )
        if done or (training.eval_steps and state.step % training.eval_steps == 0):
            results = evaluate(model, validation, accelerator)
            bad_samples.check()
            record(state, results, mean_gain(results, baseline, model.tasks))
            accelerator.log(
                {f"eval/{task}/{k}": v for task, metrics in results.items() for k, v in metrics.items()},
                step=state.step,
            )
            if state.best_step == state.step and accelerator.is_main_process:
                save_tensors(trained_state(model), checkpoints / BEST_FILE)
        if done or state.step % training.checkpoint_steps == 0:
            state.seconds = time.perf_counter() - started
            save_checkpoint(accelerator, checkpoints)
    progress.close()
    accelerator.wait_for_everyone()
    load_best(model, checkpoints)
    return state


def record(state: LoopState, results: Results, score: float) -> None:
    state.history.append({"step": state.step, "score": score, "results": results})
    # A NaN score (a metric without any labelled pixel) loses against every number.
    if state.best_score is None or math.isnan(state.best_score) or score > state.best_score:
        state.best_step, state.best_score = state.step, score
