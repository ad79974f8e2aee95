"""The multitask model: an image goes through the frozen backbone once and comes out as one map per task.

Shape suffixes: B batch, T tasks, K output channels of a task, H height, W width.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from mt_adapters.backbones import Tokens, align, check_report, get_family, load_backbone
from mt_adapters.decoders import get_decoder
from mt_adapters.hub.download import check_size, hub_options, pinned, readable_weight_errors, weight_files
from mt_adapters.models.vta.adapter_files import (
    config_from_dict,
    config_to_dict,
    load_adapter_files,
    save_adapter_files,
)
from mt_adapters.models.vta.configuration_vta import VtaConfig
from mt_adapters.models.vta.parameters import adapter_parameter_names, copy_requires_grad, count_parameters
from mt_adapters.models.vta.publishing import push
from mt_adapters.tasks import Task, get_tasks
from mt_adapters.tuners.vta import TaskConditioning, VtaAdapterConfig, VtaLayer, find_context, train_adapters_only

logger = logging.get_logger(__name__)


@dataclass
class MultitaskOutput(ModelOutput):
    """What a `VtaModel` returns.

    Args:
        loss: weighted sum of the tasks' losses, when labels were given.
        losses: {task: scalar}, not weighted.
        logits: {task: (B,K,H,W)} at the size of the input.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    logits: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class SharedFeatures:
    """What all tasks share of a batch of images: everything before the fan-out.

    Args:
        tokens: those that enter the first task-conditioned block.
        prepared: what the decoder has made of the shared feature maps.
        image_size, padded_size: height and width of the images, and of what the backbone saw.
    """

    tokens: Tokens
    prepared: list[Tensor]
    image_size: tuple[int, int]
    padded_size: tuple[int, int]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.tokens.hidden, *self.prepared]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "SharedFeatures":
        return replace(self, tokens=Tokens(tensors[0], self.tokens.grid), prepared=list(tensors[1:]))

    def chunk(self, num_chunks: int) -> list["SharedFeatures"]:
        """The same for groups of the images."""
        chunks = zip(*(tensor.chunk(num_chunks) for tensor in self.tensors), strict=True)
        return [self.with_tensors(tensors) for tensors in chunks]

    def select(self, indices: Tensor) -> "SharedFeatures":
        """The same for some of the images."""
        return self.with_tensors([tensor.index_select(0, indices) for tensor in self.tensors])


class VtaModel(PreTrainedModel):
    """A vision transformer that solves several dense tasks through task-conditioned adapters.

    Example:
        >>> model = VtaModel.from_backbone("facebook/dinov2-small", tasks=["depth", "normals"])
        >>> model(pixel_values).logits["depth"].shape
        torch.Size([1, 1, 224, 224])
    """

    config_class = VtaConfig
    base_model_prefix = "vta"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = {"affinity", "mixing_weights"}

    def __init__(self, config: VtaConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        backbone_config: Any = config.backbone_config
        if not isinstance(backbone_config, PreTrainedConfig):
            raise ValueError("the config has no backbone_config, so there is no model to build: use from_backbone")
        self.family = get_family(backbone_config.model_type)
        self.family.check_num_blocks(backbone_config)
        self.tasks: list[Task] = get_tasks(config.tasks or ())
        self.backbone = AutoModel.from_config(backbone_config) if backbone is None else backbone
        self.backbone.requires_grad_(config.train_backbone)
        if config.adapter is not None:
            self._inject_adapter(config)
        for name, parameter in self.backbone.named_parameters():
            # Without a gradient they would stop distributed training, and drift by weight decay.
            parameter.requires_grad &= not self.family.is_unused(name)
        blocks = self.family.blocks(backbone_config)
        adapted = [isinstance(self.backbone.get_submodule(path), VtaLayer) for path in blocks]
        self.num_blocks = len(blocks)
        # Everything before the first task-conditioned block is the same for all tasks.
        self.first_task_block = adapted.index(True) if True in adapted else len(blocks)
        self.num_shared_maps = self.family.num_maps_before(backbone_config, self.first_task_block)
        self.decoder = get_decoder(config.decoder)(
            self.task_names,
            self.family.map_channels(backbone_config),
            self.family.map_strides(backbone_config),
            self.num_shared_maps,
            config.decoder_dim,
            config.share_decoder,
        )
        self.heads = nn.ModuleDict(
            {task.name: nn.Conv2d(self.decoder.out_channels, task.num_channels, 1) for task in self.tasks}
        )
        if not any(parameter.is_meta for parameter in self.parameters()):
            for module in self.modules():
                # Every module has initialised itself; transformers would overwrite FiLM's zeros with random numbers.
                module._is_hf_initialized = True  # type: ignore[assignment]
        self.post_init()
        # A frozen backbone runs in eval mode from the start, also one that was built from a config.
        self.train()

    @classmethod
    def from_backbone(
        cls,
        backbone: str | Path | PreTrainedConfig,
        tasks: Sequence[str | dict[str, Any]],
        adapter: PeftConfig | Literal["vta"] | None = "vta",
        decoder: str = "fpn",
        **config: Any,
    ) -> "VtaModel":
        """Puts new adapters, decoders and heads on a backbone.

        Args:
            backbone: Hub id, folder or shipped name of pretrained weights, or a config (random weights).
            tasks: names or dicts, e.g. {"name": "parts", "type": "semseg", "num_labels": 7}.
            adapter: settings of a VTA adapter (the default) or of any other peft method; None for no adapter.
            config: further settings of `VtaConfig`, and `num_labels`, `id2label` of the segmentation.

        Raises:
            ValueError: if a task, the backbone or the decoder is unknown, or the weights cannot be read.
        """
        name = None if isinstance(backbone, PreTrainedConfig) else str(backbone)
        if "id2label" in config:
            config.setdefault("num_labels", len(config["id2label"]))
        # Tasks are checked before any weight is read.
        model_config = VtaConfig(tasks=list(tasks), decoder=decoder, backbone_name_or_path=name, **config)
        loaded = load_backbone(backbone)
        model_config.backbone_config = loaded.config
        if adapter is not None:
            adapter = VtaAdapterConfig() if adapter == "vta" else adapter
            model_config.adapter = config_to_dict(adapter)
        return cls(model_config, loaded)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> Any:
        """Loads a full model that `save_pretrained` or `push_to_hub` wrote; safetensors only.

        Raises:
            ValueError: if a file is missing, truncated or not safetensors, a weight is missing or of another shape, or
                the config asks for more than the weights hold, or for code of the repository.
        """
        source = pretrained_model_name_or_path
        wants_report = kwargs.pop("output_loading_info", False)
        # Weights of another shape are refused below, with a message that names them.
        kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True}
        with readable_weight_errors(source):
            files = weight_files(source, **hub_options(kwargs, "subfolder", "variant"))
            kwargs = pinned(kwargs, files[0])
            settings = dict(kwargs)
            config: Any = settings.pop("config", None)
            if not isinstance(config, VtaConfig):
                config, _ = VtaConfig.from_pretrained(config or source, return_unused_kwargs=True, **settings)
            described = check_size(source, lambda: cls(copy.deepcopy(config)), files)
            loaded: Any = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        model, report = loaded
        check_report(source, report)
        align(model)
        copy_requires_grad(described, model)
        return (model, report) if wants_report else model

    def _inject_adapter(self, config: VtaConfig) -> None:
        assert config.adapter is not None
        adapter = config_from_dict(config.adapter)
        if isinstance(adapter, VtaAdapterConfig):
            if adapter.tasks not in (None, self.task_names):
                raise ValueError(
                    f"the adapter has the tasks {adapter.tasks}, the model {self.task_names}: task embeddings and "
                    "affinities go by position, so both lists must be equal, order included"
                )
            adapter.tasks = self.task_names
        base = adapter.base_model_name_or_path
        self.backbone.add_adapter(adapter)
        # add_adapter takes the name from the backbone object, which has none when it was built from a config.
        adapter.base_model_name_or_path = config.backbone_name_or_path or base
        config.adapter = config_to_dict(adapter)
        if config.train_backbone:
            adapters = set(adapter_parameter_names(self))
            for name, parameter in self.backbone.named_parameters():
                if f"backbone.{name}" not in adapters:
                    parameter.requires_grad = True

    @property
    def task_names(self) -> list[str]:
        return [task.name for task in self.tasks]

    @property
    def affinity(self) -> Tensor:
        """Task affinities (T,T), float32 in [0,1], [source, target], in the order of `task_names`.

        Raises:
            ValueError: if the model has no VTA adapter.
        """
        return self.conditioning.affinity.detach().clone()

    @property
    def has_affinity(self) -> bool:
        """Whether there is a VTA adapter."""
        return find_context(self.backbone) is not None

    @property
    def conditioning(self) -> TaskConditioning:
        """Task embeddings and affinities of the active adapter.

        Raises:
            ValueError: if the model has no VTA adapter.
        """
        context = find_context(self.backbone)
        if context is None:
            raise ValueError("this model has no VTA adapter and hence no task affinities")
        return context.conditioning[self.backbone.active_adapters()[0]]

    def affinity_parameters(self, first_block_only: bool = False) -> list[nn.Parameter]:
        """The adapter's parameters whose gradients TROA compares: shared by all tasks, without FiLM's weights."""
        name = self.backbone.active_adapters()[0]
        layers = [module for module in self.backbone.modules() if isinstance(module, VtaLayer)]
        adapted = [parameters for layer in layers if (parameters := list(layer.affinity_parameters(name)))]
        return [parameter for parameters in adapted[: 1 if first_block_only else None] for parameter in parameters]

    def shared_parameters(self) -> list[nn.Parameter]:
        """All trainable parameters that serve every task: everything but the tasks' own decoders and heads."""
        return [
            parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and not name.startswith(("decoder.tasks.", "heads."))
        ]

    def train(self, mode: bool = True) -> "VtaModel":
        super().train(mode)
        if not self.config.train_backbone:
            train_adapters_only(self.backbone, mode)
        return self

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(enable, *args, **kwargs)
        if enable and not (self.has_affinity or self.config.train_backbone):
            logger.warning_once(
                "gradient checkpointing has no effect here: transformers checkpoints blocks in train mode only, and a "
                "frozen backbone without VTA adapters runs in eval mode"
            )

    def forward(
        self,
        pixel_values: Tensor,
        labels: dict[str, Tensor] | None = None,
        tasks: Sequence[str] | None = None,
    ) -> MultitaskOutput:
        """
        Args:
            pixel_values: (B,3,H,W), RGB normalised with ImageNet's mean and standard deviation.
            labels: {task: label} for all tasks or some; a label's "not labelled" pixels add nothing.
            tasks: names of the tasks to run; default: all.

        Raises:
            ValueError: if the image is too small, a task is unknown, or a label has a wrong shape, type or range.
        """
        requested = self._requested(tasks)
        self._check_image(pixel_values)
        self.check_labels(pixel_values, labels or {}, requested)
        shared = self.encode(pixel_values)
        logits = {task.name: logits_BKHW for task, logits_BKHW in self._fan_out(shared, requested)}
        if labels is None:
            return MultitaskOutput(logits=logits)
        labelled = [task for task in requested if task.name in labels]
        losses = {task.name: task.loss(logits[task.name], labels[task.name]) for task in labelled}
        loss = sum((task.weight * losses[task.name] for task in labelled), start=pixel_values.new_zeros(()).float())
        return MultitaskOutput(loss=loss, losses=losses, logits=logits)

    def encode(self, pixel_values: Tensor) -> SharedFeatures:
        """Runs what all tasks share, for `decode` to go on from; `pixel_values` (B,3,H,W) as in `forward`."""
        padded = pad_to_patches(pixel_values, self.family.patch_size(self.config.backbone_config))
        # Of a frozen backbone nothing here asks for a gradient, so that autograd keeps nothing either.
        tokens = self.family.run_blocks(
            self.backbone, self.family.stem(self.backbone, padded), 0, self.first_task_block
        )
        prepared = self.decoder.prepare(tokens.feature_maps)
        (height, width), (padded_height, padded_width) = pixel_values.shape[-2:], padded.shape[-2:]
        return SharedFeatures(
            Tokens(tokens.hidden, tokens.grid), prepared, (height, width), (padded_height, padded_width)
        )

    def decode(self, shared: SharedFeatures, task: str) -> Tensor:
        """Logits (B,K,H,W) of one task. The graphs of two tasks have nothing in common but parameters and `shared`."""
        ((_, logits_BKHW),) = self._fan_out(shared, self._requested([task]))
        return logits_BKHW

    def _fan_out(self, shared: SharedFeatures, tasks: list[Task]) -> Iterator[tuple[Task, Tensor]]:
        """From what all tasks share to the logits of each: the one place where the batch meets the tasks."""
        for task, task_maps in self._task_maps(shared.tokens, tasks):
            features = self.decoder(task.name, shared.prepared, task_maps)
            logits_BKHW = F.interpolate(self.heads[task.name](features), size=shared.padded_size, mode="bilinear")
            height, width = shared.image_size
            yield task, logits_BKHW[..., :height, :width]

    def _task_maps(self, tokens: Tokens, tasks: list[Task]) -> Iterator[tuple[Task, Sequence[Tensor]]]:
        """Feature maps of each task, one task after another or all in one batch."""
        if find_context(self.backbone) is None:
            yield from ((task, ()) for task in tasks)
            return
        batch_size, device = tokens.hidden.shape[0], tokens.hidden.device
        numbers = [self.task_names.index(task.name) for task in tasks]
        if self.config.fan_out == "batched":
            repeated = Tokens(tokens.hidden.repeat(len(tasks), 1, 1), tokens.grid)
            task_ids_BT = torch.tensor(numbers, device=device).repeat_interleave(batch_size)
            maps = self._run_task_blocks(repeated, task_ids_BT)
            yield from zip(tasks, zip(*(map_.split(batch_size) for map_ in maps), strict=True), strict=True)
            return
        for task, number in zip(tasks, numbers, strict=True):
            # One id per image, as a plain peft model gets them, so that results agree to the last bit.
            yield task, self._run_task_blocks(tokens, torch.full((batch_size,), number, device=device))

    def _run_task_blocks(self, tokens: Tokens, task_ids: Tensor) -> tuple[Tensor, ...]:
        context = find_context(self.backbone)
        assert context is not None
        with context.condition(task_ids, tokens.grid):
            return self.family.run_blocks(self.backbone, tokens, self.first_task_block, self.num_blocks).feature_maps

    def _requested(self, tasks: Sequence[str] | None) -> list[Task]:
        if isinstance(tasks, str):
            raise ValueError(f"tasks is the text {tasks!r}; give a list out of {self.task_names}, e.g. [{tasks!r}]")
        unknown = [name for name in tasks or () if name not in self.task_names]
        if unknown:
            raise ValueError(f"unknown task {unknown[0]!r}; give a list out of {self.task_names}")
        return self.tasks if tasks is None else [self.tasks[self.task_names.index(name)] for name in tasks]

    def _check_image(self, pixel_values: Tensor) -> None:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"pixel_values has the shape {tuple(pixel_values.shape)}; it must be (B, 3, H, W)")
        self.family.check_image_size(self.config.backbone_config, *pixel_values.shape[-2:])
        if self.has_affinity:
            self.family.check_attention_implementation(self.backbone.config)

    def check_labels(self, pixel_values: Tensor, labels: dict[str, Tensor], tasks: Sequence[Task]) -> None:
        """
        Raises:
            ValueError: if a label is of no task, or has a wrong shape, type or range.
        """
        batch_size, _, height, width = pixel_values.shape
        unknown = sorted(set(labels) - set(self.task_names))
        if unknown:
            raise ValueError(f"labels for the unknown task {unknown[0]!r}; this model has {self.task_names}")
        if not torch.compiler.is_compiling():
            for task in tasks:
                if task.name in labels:
                    task.check_label(labels[task.name], batch_size, height, width)

    def parameter_report(self) -> dict[str, dict[str, int]]:
        """Numbers of parameters {group: {"total", "trainable"}} of backbone, adapters, decoders, heads, and in total.

        Trainable copies of adapted blocks count as backbone.
        """
        return count_parameters(self)

    @torch.no_grad()
    def add_task(self, task: str | dict[str, Any], freeze_others: bool = False) -> None:
        """Adds a task with a new embedding, decoder and head beside trained ones, whose outputs stay the same.

        They do so to the last bit (with fan_out="batched" to rounding). The affinities between the new task and the
        others are 0 until training learns them. Call it before an optimiser or Accelerate takes the parameters.

        Args:
            task: name or dict, as in `from_backbone`.
            freeze_others: train only what the new task adds, so that the others' outputs also stay the same in
                training; affinities are then not learned.

        Raises:
            ValueError: if the task is unknown or its name is taken.
        """
        *_, added = tasks = get_tasks([*(self.config.tasks or ()), task])
        if freeze_others:
            self.requires_grad_(False)
        like = next(self.heads.parameters())
        if self.has_affinity:
            self.conditioning.add_task()
            adapter: Any = self.backbone.peft_config[self.backbone.active_adapters()[0]]
            adapter.tasks = [task.name for task in tasks]
            self.config.adapter = config_to_dict(adapter)
        self.decoder.add_task(added.name)
        self.heads[added.name] = nn.Conv2d(self.decoder.out_channels, added.num_channels, 1)
        for modules in (self.decoder.tasks, self.heads):
            if added.name in modules:
                modules[added.name].to(like.device, like.dtype).train(self.training)
        self.tasks = tasks
        self.config.tasks = [task.to_dict() for task in tasks]

    def save_adapter(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes the adapter in peft's format, and decoders and heads, one file per task, in `dtype` (or as they are).

        Raises:
            ValueError: if there is no adapter, or the backbone itself is trainable and would be lost.
        """
        save_adapter_files(self, Path(folder), dtype)

    @classmethod
    def from_adapter(
        cls,
        source: str | Path,
        backbone: str | Path | PreTrainedConfig | PreTrainedModel | None = None,
        tasks: Sequence[str] | None = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """Loads what `save_adapter` wrote on top of its backbone, or, as a start for training, of a new one.

        On a backbone of another kind or shape, affinities and task embeddings carry over, and every tensor that has
        a place of its shape; adapted blocks are paired from the last one on. The rest starts anew and is logged.

        Args:
            source: folder or Hub id.
            backbone: Hub id, folder, config or model; default: the one that the adapter was trained on.
            tasks: those to load, in this order; default: all. They predict what they do among all, to the last bit,
                and files of other tasks are not fetched.
            output_loading_info: return (model, `AdapterReport`), which lists what was and what was not loaded.
            options: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Raises:
            ValueError: if a file is missing, truncated, not safetensors or of another model, or the adapter has no
                such task.
        """
        model, report = load_adapter_files(cls, source, backbone, tasks, **options)
        return (model, report) if output_loading_info else model

    def push_to_hub(self, repo_id: str, **options: Any) -> str:  # type: ignore[override]
        """Uploads the full model, its image processor, card, results and pictures in one commit; returns its URL.

        Args:
            repo_id: "organization/name".
            options: `run_folder`, the folder with the results of these weights (default: where the model was loaded
                from, if it still is the same); `image_processor` (default: the one found there); `base_model`, the
                Hub id of the backbone, if it was loaded from a folder; `license` of the weights ("apache-2.0");
                `max_shard_size`; and `commit_message`, `private`, `token`, `revision`, `create_pr`.

        Raises:
            ValueError: if the results are not those of these weights, or the repository holds an adapter.
        """
        return push(self, repo_id, is_adapter=False, **options)

    def push_adapter_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads what `save_adapter` writes, a few MB, as `push_to_hub` does for the full model.

        Raises:
            ValueError: as `push_to_hub` and `save_adapter`, or if the backbone is a folder of this machine and
                `base_model` does not say which one others can load.
        """
        return push(self, repo_id, is_adapter=True, **options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        reset_parameters = getattr(module, "reset_parameters", None)
        if reset_parameters is not None:
            reset_parameters()


def pad_to_patches(pixel_values_B3HW: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Repeats the last rows and columns until height and width are multiples of the patch."""
    height, width = pixel_values_B3HW.shape[-2:]
    bottom, right = -height % patch_size[0], -width % patch_size[1]
    return F.pad(pixel_values_B3HW, (0, right, 0, bottom), mode="replicate") if bottom or right else pixel_values_B3HW
