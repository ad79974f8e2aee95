"""Pictures to pixel values, and a model's logits to maps in the labels' units, at the pictures' own sizes."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.processing_utils import ImagesKwargs, Unpack

from mt_adapters.tasks import Task, get_tasks


class VtaImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    tasks (`list[dict]`, *optional*):
        The model's tasks, as its config has them; `post_process` needs them.
    """

    tasks: list[dict[str, Any]]


class VtaImageProcessorPil(PilBackend):
    """Resizes RGB pictures to `size` and normalises them with ImageNet's mean and standard deviation."""

    valid_kwargs = VtaImageProcessorKwargs
    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 224, "width": 224}
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    tasks: list[dict[str, Any]] | None = None

    def __init__(self, **kwargs: Unpack[VtaImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)  # type: ignore[misc]

    def post_process(
        self, outputs: Any, target_sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[dict[str, Tensor]]:
        """Maps of each image: {task: map} of class ids (H,W), metres (H,W), unit normals (3,H,W), probabilities (H,W).

        Args:
            outputs: a `MultitaskOutput`, or a dict of logits {task: (B,K,H,W)}.
            target_sizes: (height, width) of each image's maps; default: the size of the logits.

        Raises:
            ValueError: if the processor does not know a task of the outputs, or there is not one size per image.
        """
        logits: Mapping[str, Tensor] = getattr(outputs, "logits", outputs)
        tasks = {task.name: task for task in get_tasks(self.tasks)} if self.tasks else {}
        unknown = sorted(set(logits) - set(tasks))
        if unknown:
            raise ValueError(
                f"the image processor does not know the task {unknown[0]!r}; it has {sorted(tasks)}: load it from the "
                "model's folder, or make it with VtaImageProcessorPil(tasks=model.config.tasks)"
            )
        num_images = len(next(iter(logits.values())))
        if target_sizes is not None and len(target_sizes) != num_images:
            raise ValueError(f"target_sizes has {len(target_sizes)} sizes for {num_images} images; give one per image")
        return [
            {
                name: resized_prediction(
                    tasks[name], logit[index : index + 1], None if target_sizes is None else target_sizes[index]
                )
                for name, logit in logits.items()
            }
            for index in range(num_images)
        ]


def resized_prediction(task: Task, logits_1KHW: Tensor, size: tuple[int, int] | None) -> Tensor:
    if size is not None and tuple(size) != tuple(logits_1KHW.shape[-2:]):
        logits_1KHW = F.interpolate(logits_1KHW.float(), size=tuple(size), mode="bilinear")
    return task.predict(logits_1KHW)[0]
