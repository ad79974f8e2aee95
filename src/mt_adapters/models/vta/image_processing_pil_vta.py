"""Pictures to pixel values, and a model's logits to maps in the labels' units, at the pictures' own sizes."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.processing_utils import ImagesKwargs, Unpack

from mt_adapters.tasks import Task, get_tasks

# A preprocessor_config.json from elsewhere must not be able to ask for more memory than there is.
MAX_SIDE = 16384


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

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        if image_processor_dict.get("auto_map"):
            raise ValueError(
                "the image processor's config has 'auto_map', which names code of the repository; none is needed or "
                "used: do not load it, or remove the key"
            )
        return super().from_dict(image_processor_dict, **kwargs)

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Runs when a processor is made or loaded, and at every call."""
        kwargs = super()._standardize_kwargs(**kwargs)
        for name in ("size", "crop_size", "pad_size"):
            sides = dict(kwargs[name] or {})
            for side in sides.values():
                if not isinstance(side, Integral) or not 1 <= int(side) <= MAX_SIDE:
                    raise ValueError(f"{name} is {sides}; sides are whole numbers of pixels from 1 to {MAX_SIDE}")
        return kwargs

    def post_process(
        self, outputs: Any, target_sizes: Sequence[tuple[int, int]] | Tensor | None = None
    ) -> list[dict[str, Tensor]]:
        """Maps of each image: {task: map} of class ids (H,W), metres (H,W), unit normals (3,H,W), probabilities (H,W).

        Args:
            outputs: a `MultitaskOutput`, or a dict of logits {task: (B,K,H,W)}.
            target_sizes: (height, width) of each image's maps, or a tensor (B,2); default: the size of the logits.

        Raises:
            ValueError: if the processor does not know a task of the outputs, or there is not one size per image.
        """
        logits = logits_of(outputs)
        tasks = self._tasks_of(logits)
        num_images = len(next(iter(logits.values())))
        if target_sizes is not None and len(target_sizes) != num_images:
            raise ValueError(f"target_sizes has {len(target_sizes)} sizes for {num_images} images; give one per image")
        sizes = [None] * num_images if target_sizes is None else [(int(h), int(w)) for h, w in target_sizes]
        return [
            {
                name: tasks[name].predict_at(logit[index : index + 1], size or (logit.shape[-2], logit.shape[-1]))[0]
                for name, logit in logits.items()
            }
            for index, size in enumerate(sizes)
        ]

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[tuple[int, int]] | Tensor | None = None,
        task_name: str | None = None,
    ) -> list[Tensor]:
        """Class ids (H,W) int64 of each image.

        Args:
            outputs, target_sizes: as in `post_process`.
            task_name: which segmentation, when the outputs have several.

        Raises:
            ValueError: as `post_process`, and if the outputs do not have exactly one such task.
        """
        return self._maps("semseg", outputs, target_sizes, task_name)

    def post_process_depth_estimation(
        self,
        outputs: Any,
        target_sizes: Sequence[tuple[int, int]] | Tensor | None = None,
        task_name: str | None = None,
    ) -> list[dict[str, Tensor]]:
        """{"predicted_depth": metres (H,W)} of each image; arguments as in `post_process_semantic_segmentation`."""
        return [{"predicted_depth": map_} for map_ in self._maps("depth", outputs, target_sizes, task_name)]

    def post_process_normal_estimation(
        self,
        outputs: Any,
        target_sizes: Sequence[tuple[int, int]] | Tensor | None = None,
        task_name: str | None = None,
    ) -> list[dict[str, Tensor]]:
        """{"normals": unit vectors (3,H,W)} of each image; arguments as in `post_process_semantic_segmentation`."""
        return [{"normals": map_} for map_ in self._maps("normals", outputs, target_sizes, task_name)]

    def post_process_edge_detection(
        self,
        outputs: Any,
        target_sizes: Sequence[tuple[int, int]] | Tensor | None = None,
        task_name: str | None = None,
    ) -> list[dict[str, Tensor]]:
        """{"edges": probabilities (H,W)} of each image; arguments as in `post_process_semantic_segmentation`."""
        return [{"edges": map_} for map_ in self._maps("edges", outputs, target_sizes, task_name)]

    def _maps(
        self,
        kind: str,
        outputs: Any,
        target_sizes: Sequence[tuple[int, int]] | Tensor | None,
        task_name: str | None,
    ) -> list[Tensor]:
        logits = logits_of(outputs)
        of_kind = [task.name for task in self._tasks_of(logits).values() if task.kind == kind]
        chosen = [name for name in of_kind if task_name in (None, name)]
        if len(chosen) != 1:
            raise ValueError(
                f"task_name is {task_name!r}; give one of the {kind} tasks of the outputs, which are {of_kind}"
            )
        return [maps[chosen[0]] for maps in self.post_process({chosen[0]: logits[chosen[0]]}, target_sizes)]

    def _tasks_of(self, logits: Mapping[str, Tensor]) -> dict[str, Task]:
        tasks = {task.name: task for task in get_tasks(self.tasks)} if self.tasks else {}
        unknown = sorted(set(logits) - set(tasks))
        if unknown:
            raise ValueError(
                f"the image processor does not know the task {unknown[0]!r}; it has {sorted(tasks)}: load it from the "
                "model's folder, or make it with VtaImageProcessorPil(tasks=model.config.tasks)"
            )
        return {name: tasks[name] for name in logits}


def logits_of(outputs: Any) -> Mapping[str, Tensor]:
    return getattr(outputs, "logits", outputs)
