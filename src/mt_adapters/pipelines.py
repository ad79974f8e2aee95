"""From pictures to maps in one call: transformers' pipeline for models with several dense tasks."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import Pipeline
from transformers.image_utils import load_image

from mt_adapters.hub.shipped import local_source
from mt_adapters.models.loading import load_model
from mt_adapters.models.vta.image_processing_pil_vta import VtaImageProcessorPil

PIPELINE_TASK = "multitask-dense-prediction"
# No task can have this name, so it may stand beside the tasks' logits: transformers takes only flat dicts apart.
TARGET_SIZE = "target-size"


class MultitaskDensePredictionPipeline(Pipeline):
    """Predicts the maps of all tasks, or of some, at each picture's own size; it puts the model in eval mode.

    Args:
        model: a `VtaModel`.
        image_processor: the model's `VtaImageProcessorPil`.
        tasks: names of the tasks to run; default: all. This, `timeout` and `batch_size` may also be given in a call.

    Raises:
        ValueError: if the model is of another kind, or does not have one of `tasks`.

    Example:
        >>> import mt_adapters
        >>> from transformers import pipeline
        >>> pipe = pipeline("multitask-dense-prediction", model="outputs/demo")  # of a full model
        >>> pipe = MultitaskDensePredictionPipeline.from_pretrained("outputs/demo/adapter")  # also of an adapter
        >>> maps = pipe("photo.jpg", tasks=["depth"])
        >>> maps["depth"]["map"].shape  # metres
        (480, 640)
        >>> maps["depth"]["picture"].save("depth.png")
    """

    _load_processor: Any = False
    _load_image_processor: Any = True
    _load_feature_extractor: Any = False
    _load_tokenizer: Any = False

    model: Any
    image_processor: Any

    # transformers.pipeline passes `local_files_only` on to the class.
    def __init__(self, model: Any, *args: Any, local_files_only: bool = False, **kwargs: Any) -> None:
        if not hasattr(model, "task_names"):
            raise ValueError(f"the model is a {type(model).__name__}; this pipeline takes a VtaModel")
        super().__init__(model, *args, **kwargs)
        self.model.eval()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        backbone: str | Path | None = None,
        tasks: Sequence[str] | None = None,
        device: Any = None,
        **options: Any,
    ) -> "MultitaskDensePredictionPipeline":
        """The pipeline of a full model or, which `transformers.pipeline` cannot do, of an adapter on its backbone.

        Args:
            source: a folder, a Hub id, or a name of `hub.shipped.SHIPPED`.
            backbone: an adapter's, if it is not the one of its config.
            tasks: names of the tasks to run, and of an adapter to load; default: all.
            device: as in `Pipeline`; default: that of `Pipeline`.
            options: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Raises:
            ValueError: as `load_model`; or if the model does not have one of `tasks`.
        """
        model = load_model(source, backbone, tasks, **options)
        processor = VtaImageProcessorPil.from_pretrained(local_source(source), **options)
        return cls(model, image_processor=processor, tasks=tasks, device=device)

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """One dict per picture: {task: {"map": array in the labels' units, "picture": the map as an RGB picture}}.

        Maps are class ids (H,W) int64, metres (H,W), unit normals (3,H,W) and probabilities (H,W), all float32. The
        camera's note of orientation is followed, so H and W are those of the upright picture.

        Args:
            inputs: a path, URL, PIL picture or array (H,W), (H,W,3) or (H,W,4) uint8; or a list of them (gives a
                list), a generator or a torch `Dataset` (gives an iterator).
            kwargs: `tasks`, `batch_size`, `num_workers`, and `timeout` of a download in seconds.

        Raises:
            ValueError: if a picture cannot be read, which it names, or a task is unknown.
        """
        return [] if isinstance(inputs, list) and not inputs else super().__call__(inputs, *args, **kwargs)

    def _sanitize_parameters(  # type: ignore[override]
        self, tasks: Sequence[str] | None = None, timeout: float | None = None
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        known: list[str] = self.model.task_names
        if tasks is not None and (isinstance(tasks, str) or not tasks or not set(tasks) <= set(known)):
            raise ValueError(f"tasks is {tasks!r}; give a list out of this model's tasks {known}")
        return (
            {} if timeout is None else {"timeout": timeout},
            {} if tasks is None else {"tasks": tasks},
            {},
        )

    def preprocess(  # type: ignore[override]
        self, input_: Any, timeout: float | None = None
    ) -> dict[str, Any]:
        picture = read_picture(input_, timeout)
        pixels = self.image_processor(picture, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels.to(self.dtype), TARGET_SIZE: (picture.height, picture.width)}

    def _forward(  # type: ignore[override]
        self, input_tensors: dict[str, Any], tasks: Sequence[str] | None = None
    ) -> dict[str, Any]:
        logits = self.model(input_tensors["pixel_values"], tasks=tasks).logits
        return {**logits, TARGET_SIZE: input_tensors[TARGET_SIZE]}

    def postprocess(  # type: ignore[override]
        self, model_outputs: dict[str, Any]
    ) -> dict[str, dict[str, Any]]:
        size = model_outputs.pop(TARGET_SIZE)
        (maps,) = self.image_processor.post_process(model_outputs, target_sizes=[size])
        tasks = {task.name: task for task in self.model.tasks}
        return {
            name: {"map": map_.numpy(), "picture": Image.fromarray(tasks[name].colorize(map_).numpy())}
            for name, map_ in maps.items()
        }

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes the model and its image processor, from which the pipeline loads again."""
        # Pipeline would also copy this file, and ask to trust remote code when it is loaded.
        self.model.save_pretrained(save_directory, **kwargs)
        self.image_processor.save_pretrained(save_directory, **kwargs)


def read_picture(source: Any, timeout: float | None = None) -> Image.Image:
    """The upright, decoded RGB picture of a path, URL, PIL picture or uint8 array.

    Raises:
        ValueError: if it cannot be read; names the file.
    """
    if isinstance(source, np.ndarray):
        is_picture = source.ndim == 2 or (source.ndim == 3 and source.shape[-1] in (3, 4))
        if source.dtype != np.uint8 or not is_picture or not source.size:
            raise ValueError(
                f"a picture is an array of {source.dtype} with the shape {source.shape}; it must be uint8, 0 to 255, "
                "with the shape (H, W), (H, W, 3) or (H, W, 4)"
            )
        source = Image.fromarray(source)
    source = os.fspath(source) if isinstance(source, os.PathLike) else source
    name = source if isinstance(source, str) else getattr(source, "filename", "")
    try:
        return load_image(source, timeout)
    except TypeError:  # neither a text nor a picture, and the message says so
        raise
    except Exception as error:  # each of Pillow's decoders has errors of its own, few of which name the file
        raise ValueError(f"cannot read the picture {str(name)[:300]!r}: {str(error)[:1000]}") from error
