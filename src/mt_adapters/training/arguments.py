"""Everything a training run is told, from a YAML recipe and the command line, which has the last word."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser

from mt_adapters.data import Source
from mt_adapters.training.balancing import get_balancing
from mt_adapters.troa import Similarity, Troa, Weighting

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
        default_factory=dict, metadata={"help": "Settings of VtaAdapterConfig (recipes only)."}
    )
    lora_settings: dict = field(default_factory=dict, metadata={"help": "Settings of LoraConfig (recipes only)."})
    decoder: str = field(default="fpn", metadata={"help": "fpn, swin_unet, or linear (a linear probe)."})
    decoder_dim: int = field(default=64, metadata={"help": "Channels of the decoder."})
    share_decoder: bool = field(default=False, metadata={"help": "One decoder for all tasks instead of one each."})


@dataclass
class DataArguments:
    """What it is trained and evaluated on."""

    dataset: str = field(default="rooms", metadata={"help": "Name of the data set."})
    data_dir: str | None = field(default=None, metadata={"help": "Its folder; default: the sample that is shipped."})
    dataset_options: dict = field(
        default_factory=dict, metadata={"help": "Further settings of the data set (recipes only)."}
    )
    sources: list[dict] = field(
        default_factory=list,
        metadata={
            "help": "Several data sets at once, in place of the three above: dicts with dataset, data_dir, weight, "
            "labels, options, evaluate (recipes only)."
        },
    )
    on_bad_sample: Literal["error", "skip"] = field(
        default="error", metadata={"help": "Stop at a frame that is damaged, or go on without its labels."}
    )
    max_bad_share: float = field(
        default=0.01, metadata={"help": "Stop where more than this share of the frames drawn were skipped."}
    )
    image_size: int = field(default=128, metadata={"help": "Side of the training crops in pixels."})
    eval_image_size: int | None = field(default=None, metadata={"help": "Side in evaluation; default: image_size."})
    crop_scale: list[float] = field(
        default_factory=lambda: [0.5, 1.0], metadata={"help": "Smallest and largest share of the image in a crop."}
    )
    color_jitter: list[float] = field(
        default_factory=lambda: [0.2, 0.2, 0.2, 0.1], metadata={"help": "Brightness, contrast, saturation, hue."}
    )
    num_workers: int = field(default=2, metadata={"help": "Worker processes of each data loader."})

    def __post_init__(self) -> None:
        for name, length in (("crop_scale", 2), ("color_jitter", 4)):
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {length} numbers")
        self.all_sources()

    def all_sources(self) -> list[Source]:
        """
        Raises:
            ValueError: for an unknown data set, or a source with an unknown key.
        """
        if self.sources:
            return [Source.from_dict(source) for source in self.sources]
        return [Source(self.dataset, self.data_dir, options=self.dataset_options)]


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
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Run adapted blocks again in the backward pass: less memory, more time."}
    )
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


@dataclass
class MultitaskArguments:
    """How the tasks act on each other: affinities (TROA) and the balance of their losses."""

    affinity_similarity: Similarity = field(
        default="fisher", metadata={"help": "What of the tasks' gradients is compared."}
    )
    affinity_weighting: Weighting = field(
        default="average", metadata={"help": "How affinities mix the task embeddings; the last three are controls."}
    )
    affinity_interval: int = field(
        default=10, metadata={"help": "Learn affinities every so many steps; 0 keeps them as they are."}
    )
    affinity_momentum: float = field(default=0.9, metadata={"help": "Momentum of the running mean of similarities."})
    affinity_parameters: Literal["all", "first_block"] = field(
        default="all", metadata={"help": "Gradients of the shared parameters of all adapted blocks, or of the first."}
    )
    mirror_rate: float = field(default=0.3, metadata={"help": "Step size eta of affinity_weighting=mirror."})
    mirror_entropy: float = field(
        default=0.3, metadata={"help": "Entropy lambda of affinity_weighting=mirror; 0 is TAWT."}
    )
    balancing: str = field(
        default="fixed",
        metadata={
            "help": "Weights of the losses: fixed, uncertainty, dwa, random; or by gradients, with torchjd: "
            "aligned_mtl, cagrad, config, dualproj, graddrop, imtl_g, mgda, pcgrad, upgrad."
        },
    )
    balancing_settings: dict = field(
        default_factory=dict, metadata={"help": "Keyword arguments of the balancing (recipes only)."}
    )

    def __post_init__(self) -> None:
        if self.affinity_interval < 0:
            raise ValueError(f"affinity_interval is {self.affinity_interval}; it must be at least 0 (0: off)")
        # Wrong settings are told before any data is read.
        get_balancing(self.balancing, 1, self.balancing_settings)
        self.make_troa(torch.eye(1), 0)

    def make_troa(self, affinity_TT: torch.Tensor, num_parameters: int) -> Troa:
        return Troa(
            affinity_TT,
            num_parameters,
            self.affinity_similarity,
            self.affinity_weighting,
            self.affinity_momentum,
            self.mirror_rate,
            self.mirror_entropy,
        )


Arguments = tuple[ModelArguments, DataArguments, TrainingArguments, MultitaskArguments]
SECTIONS = (ModelArguments, DataArguments, TrainingArguments, MultitaskArguments)


def parse_arguments(
    default_recipe: Path | None = None, argv: Sequence[str] | None = None, parser: HfArgumentParser | None = None
) -> Arguments:
    """Reads `--recipe FILE` (default: `default_recipe`) and the command line.

    Args:
        parser: a parser of `SECTIONS` that has more options; default: one without.

    Raises:
        ValueError: if the recipe is no file or has a key or a value that is not known; names the allowed ones.
    """
    parser = parser or HfArgumentParser(SECTIONS)  # type: ignore[arg-type]
    parser.add_argument("--recipe", type=Path, default=default_recipe, help="YAML file with any of these settings.")
    argv = list(sys.argv[1:] if argv is None else argv)
    recipe = parser.parse_known_args(argv)[0].recipe
    if recipe is not None:
        parser.set_defaults(**read_recipe(recipe))
    model, data, training, multitask, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    return model, data, training, multitask


class RecipeLoader(yaml.SafeLoader):
    """Reads numbers and truth values as YAML 1.2 does: 1e-3 is a number, and no is text."""


RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|True|false|False"), list("tTfF"))
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.\d+|\d+\.\d*|\d+(?=[eE]))([eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)


def read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no recipe {str(path)!r}; give a YAML file, e.g. those in examples/recipes")
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), RecipeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the recipe {str(path)!r} is no valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"the recipe {str(path)!r} must hold 'key: value' lines")
    hints = {name: hint for section in SECTIONS for name, hint in get_type_hints(section).items()}
    # HfArgumentParser allows no more than names here.
    hints["tasks"] = list[str | dict]
    unknown = [key for key in recipe if key not in hints]
    if unknown:
        raise ValueError(f"the recipe {str(path)!r} has the unknown key {unknown[0]!r}; known are {sorted(hints)}")
    for key, value in recipe.items():
        if not _fits(value, hints[key]):
            allowed = str(hints[key]) if get_origin(hints[key]) else hints[key].__name__
            raise ValueError(f"the recipe {str(path)!r} has {key}: {value!r}; it must be {allowed}")
    return recipe


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if get_args(hint):
        return any(_fits(value, option) for option in get_args(hint))
    # A bool is an int to Python, and a whole number is a fine float.
    kinds = (int, float) if hint is float else hint
    return isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))
