"""Everything a distillation is told on the command line."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class DistillationArguments:
    """What is learned from whom, and how."""

    teacher: str = field(default="facebook/dinov2-small", metadata={"help": "Hub id or folder of a backbone."})
    student_config: str | None = field(
        default=None, metadata={"help": "JSON file with the student's config, model_type included."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder of pictures; default: the shipped rooms."})
    output_dir: str = field(default="outputs/distilled", metadata={"help": "Where everything is written."})
    image_size: int = field(default=128, metadata={"help": "Side of what the student sees, in pixels."})
    teacher_image_size: int = field(default=224, metadata={"help": "Side of what the teacher sees, in pixels."})
    teacher_maps: list[int] = field(
        default_factory=lambda: [1, 3],
        metadata={"help": "Which of the teacher's feature maps; of a plain ViT 0 to 3 are at its quarters."},
    )
    num_views: int = field(default=8, metadata={"help": "Fixed crops of each image."})
    crop_scale: list[float] = field(
        default_factory=lambda: [0.4, 1.0], metadata={"help": "Smallest and largest share of the image in a view."}
    )
    color_jitter: list[float] = field(
        default_factory=lambda: [0.3, 0.3, 0.3, 0.05],
        metadata={"help": "Brightness, contrast, saturation, hue: of the student's images only."},
    )
    holdout: float = field(default=0.05, metadata={"help": "Share of the images that is not learned, but measured."})
    max_steps: int = field(default=2000, metadata={"help": "Optimiser steps."})
    batch_size: int = field(default=16, metadata={"help": "Images per process and step."})
    teacher_batch_size: int = field(default=16, metadata={"help": "Images that the teacher sees at a time."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.05, metadata={"help": "On weight matrices only."})
    warmup_ratio: float = field(default=0.05, metadata={"help": "Share of steps with a rising learning rate."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    mixed_precision: Literal["no", "bf16", "fp16"] | None = field(
        default=None, metadata={"help": "Of teacher and student; default: what `accelerate config` says."}
    )
    eval_steps: int = field(default=500, metadata={"help": "Measure the held-out images every so many steps."})
    checkpoint_steps: int = field(default=200, metadata={"help": "Write a checkpoint every so many steps."})
    num_workers: int = field(default=0, metadata={"help": "Processes that prepare images."})
    save_dtype: Literal["float32", "float16", "bfloat16"] = field(
        default="float32", metadata={"help": "Number format of the student's file."}
    )
    keep_views: bool = field(default=False, metadata={"help": "Keep the teacher's features for other students."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir, if any."})
    seed: int = field(default=0, metadata={"help": "Of weights, order, crops and colours."})

    def __post_init__(self) -> None:
        for name in ("num_views", "max_steps", "batch_size", "teacher_batch_size", "eval_steps", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name, length in (("crop_scale", 2), ("color_jitter", 4)):
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {length} numbers")
