"""Everything a training run is told, from a YAML recipe and the command line, which has the last word."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser

DEFAULT_TASKS = ["semseg", "depth", "normals", "edges"]


@dataclass
class ModelArguments:
    """The network."""

    backbone: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a pretrained backbone. Without it: backbone_config."}
    )
    backbone_config: dict | None = field(
        default=None, metadata={"help": "Config of a backbone with random weights, with model_type (recipes only)."}
    )
    train_backbone: bool = field(default=False, metadata={"help": "Train the backbone's own weights too."})
    tasks: list[str] = field(
        default_factory=lambda: list(DEFAULT_TASKS),
        metadata={"help": "Task names; in recipes also dicts with name, type, weight and the kind's settings."},
    )
    adapter: Literal["vta", "lora", "none"] = field(
        default="vta", metadata={"help": "Adapter, or a baseline: LoRA shared by all tasks, or no adapter."}
    )
    adapter_settings: dict = field(
        default_factory=dict, metadata={"help": "Settings of VtaAdapterConfig or LoraConfig (recipes only)."}
    )
    decoder: str = field(default="fpn", metadata={"help": "fpn, swin_unet, or linear (a linear probe)."})
    decoder_dim: int = field(default=64, metadata={"help": "Channels of the decoder."})
    share_decoder: bool = field(default=False, metadata={"help": "One decoder for all tasks instead of one each."})


@dataclass
class DataArguments:
    """What it is trained and evaluated on."""

    dataset: str = field(default="rooms", metadata={"help": "Name of the data set."})
    data_dir: str | None = field(default=None, metadata={"help": "Its folder; default: the sample that is shipped."})
    image_size: int = field(default=128, metadata={"help": "Side of the training crops in pixels."})
    eval_image_size: int | None = field(default=None, metadata={"help": "Side in evaluation; default: image_size."})
    crop_scale: list[float] = field(
        default_factory=lambda: [0.5, 1.0], metadata={"help": "Smallest and largest share of the image in a crop."}
    )
    color_jitter: list[float] = field(
        default_factory=lambda: [0.2, 0.2, 0.2, 0.1], metadata={"help": "Brightness, contrast, saturation, hue."}
    )
    num_workers: int = field(default=2, metadata={"help": "Worker processes of each data loader."})


@dataclass
class TrainingArguments:
    """How it is trained."""

    output_dir: str = field(default="outputs/demo", metadata={"help": "Where everything is written."})
    max_steps: int = field(default=1000, metadata={"help": "Optimiser steps."})
    batch_size: int = field(default=16, metadata={"help": "Images per process and forward pass."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes per optimiser step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of adapters, decoders, heads."})
    backbone_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the backbone's own weights, if they are trained; default: learning_rate."}
    )
    weight_decay: float = field(default=0.05, metadata={"help": "On weight matrices only."})
    warmup_ratio: float = field(default=0.1, metadata={"help": "Share of steps with a rising learning rate."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    mixed_precision: Literal["no", "bf16", "fp16"] | None = field(
        default=None, metadata={"help": "Default: what `accelerate config` or `accelerate launch` says."}
    )
    eval_steps: int | None = field(
        default=None, metadata={"help": "Evaluate every so many steps; default: at the end."}
    )
    checkpoint_steps: int = field(default=200, metadata={"help": "Write a checkpoint every so many steps."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir, if any."})
    seed: int = field(default=0, metadata={"help": "Of weights, order and augmentation."})
    trackers: list[str] = field(
        default_factory=lambda: ["tensorboard"], metadata={"help": "Trackers of Accelerate, or none."}
    )

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


Arguments = tuple[ModelArguments, DataArguments, TrainingArguments]
SECTIONS = (ModelArguments, DataArguments, TrainingArguments)


def parse_arguments(default_recipe: Path | None = None, argv: Sequence[str] | None = None) -> Arguments:
    """Reads `--recipe FILE` (default: `default_recipe`) and the command line.

    Raises:
        ValueError: if the recipe is no file or has a key or a value that is not known; names the allowed ones.
    """
    parser = HfArgumentParser(SECTIONS)
    parser.add_argument("--recipe", type=Path, default=default_recipe, help="YAML file with any of these settings.")
    argv = list(sys.argv[1:] if argv is None else argv)
    recipe = parser.parse_known_args(argv)[0].recipe
    if recipe is not None:
        parser.set_defaults(**read_recipe(recipe))
    model, data, training, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    return model, data, training


def read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no recipe {str(path)!r}; give a YAML file, e.g. those in examples/recipes")
    try:
        recipe = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"the recipe {str(path)!r} is no valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"the recipe {str(path)!r} must hold 'key: value' lines")
    known = {item.name: item for section in SECTIONS for item in fields(section)}
    unknown = sorted(set(recipe) - set(known))
    if unknown:
        raise ValueError(f"the recipe {str(path)!r} has the unknown key {unknown[0]!r}; known are {sorted(known)}")
    for key, value in recipe.items():
        # YAML reads 1e-3, without a point, as text.
        if isinstance(value, str) and known[key].type in (int, float):
            try:
                recipe[key] = known[key].type(value)
            except ValueError:
                raise ValueError(f"the recipe {str(path)!r} has {key}: {value!r}, which is no number") from None
    return recipe
