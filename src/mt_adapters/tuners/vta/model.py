"""The VTA tuner: puts adapters around the blocks of a plain transformers backbone, as peft's other tuners do."""

from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from mt_adapters.backbones import get_family
from mt_adapters.tuners.vta.config import VtaAdapterConfig
from mt_adapters.tuners.vta.context import TaskContext, check_task_ids, find_context
from mt_adapters.tuners.vta.layer import VtaLayer


class VtaTuner(BaseTuner):
    """Adapts a frozen backbone to several dense tasks.

    The adapted backbone takes `task_ids` (B,) int64 as one more keyword of its forward and conditions each sample on
    the task at that position of the config's list `tasks`.

    Raises:
        ValueError: if the backbone's family is unknown, the adapter was made for another backbone,
            `target_modules` names something that is no block, or the backbone's attention takes no bias.

    Example:
        >>> model = get_peft_model(AutoModel.from_pretrained("microsoft/swin-tiny-patch4-window7-224"),
        ...                        VtaAdapterConfig(tasks=["semseg", "depth"]))
        >>> model(pixel_values, task_ids=torch.tensor([0, 1])).last_hidden_state
    """

    prefix = "vta_"
    tuner_layer_cls = VtaLayer
    target_module_mapping: dict[str, list[str]] = {}
    model: PreTrainedModel

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        try:
            check_adapter_names(model, adapter_name, list(self.peft_config))
            # get_peft_model takes a name twice: what the new adapter does not replace must not stay.
            self._remove_adapter(model, adapter_name)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            # transformers' add_adapter leaves the name taken, PeftModel's a half-made adapter.
            self._remove_adapter(model, adapter_name)
            self.peft_config.pop(adapter_name, None)
            raise

    def _remove_adapter(self, model: nn.Module, adapter_name: str) -> None:
        for module in model.modules():
            if isinstance(module, VtaLayer):
                module.remove_adapter(adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for module in self.model.modules():
            if isinstance(module, VtaLayer):
                module.cast_trained_copy(adapter_name)

    def train(self, mode: bool = True) -> "VtaTuner":
        super().train(mode)
        train_adapters_only(self.model, mode)
        return self

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        assert isinstance(peft_config, VtaAdapterConfig)
        config = self.model.config
        family = get_family(getattr(config, "model_type", str(type(self.model).__name__)))
        family.check_attention_implementation(config)
        signature = family.signature(config)
        if peft_config.backbone_signature not in (None, signature):
            raise ValueError(
                f"the adapter was made for a backbone with {peft_config.backbone_signature}, but this one has "
                f"{signature}: load the backbone that the adapter's base_model_name_or_path names "
                f"({peft_config.base_model_name_or_path!r}), or start from what fits this one: "
                "VtaModel.from_adapter(..., backbone=...)"
            )
        if not peft_config.tasks or len(set(peft_config.tasks)) < len(peft_config.tasks):
            raise ValueError(
                f"VtaAdapterConfig has tasks={peft_config.tasks}; name at least one task, each once: "
                'VtaAdapterConfig(tasks=["semseg", "depth"])'
            )
        peft_config.backbone_signature = signature
        if peft_config.target_modules is None:
            peft_config.target_modules = family.default_targets(config)
        if peft_config.attention_grid is None:
            # Kept with the weights: they also fit a backbone of the same shape with another window or image size.
            peft_config.attention_grid = list(family.attention_grid(config))
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, VtaAdapterConfig)
        model, config = self.model, self.model.config
        family = get_family(config.model_type)
        stages = family.stages(config)
        stage = next((i for i, paths in enumerate(stages) if current_key.endswith(tuple(paths))), None)
        if stage is None:
            raise ValueError(
                f"target_modules matches {current_key!r}, which is no transformer block; VTA adapts whole blocks, "
                f"e.g. {family.default_targets(config)}"
            )
        # Modules come in forward order, so the last layer that has this adapter is the one before this block.
        earlier = [m for m in model.modules() if isinstance(m, VtaLayer) and adapter_name in m.vta_adapter]
        root: Any = model if current_key in family.blocks(config) else model.base_model
        mergings = list(family.mergings(root, earlier[-1].stage, stage)) if earlier else []
        layer = target
        if not isinstance(layer, VtaLayer):
            context = find_context(model)
            if context is None:
                context = TaskContext()
                add_task_ids_keyword(model, context)
            layer = VtaLayer(target, family, config, stage, context)
            for module in checkpointed_modules(model)[:1]:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = module._gradient_checkpointing_func
            layer.set_adapter([adapter_name])
            self._replace_module(parent, target_name, layer, target)
        layer.update_layer(adapter_name, peft_config, mergings, peft_config.inference_mode)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # The base class copies `weight` and `bias`, which a block does not have.
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        for module in list(self.model.modules()):
            if isinstance(module, VtaLayer):
                if merge:
                    module.merge()
                module.remove_hooks()
        model: Any = self.model
        model._vta_task_ids.remove()
        del model._vta_task_ids
        return super()._unload_and_optionally_merge(False, *args, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # The name stands behind the first component with our prefix: ...vta_adapter.<name>.bottleneck.up.weight
        head, separator, tail = key.partition(f".{cls.prefix}")
        attribute, _, rest = tail.partition(".")
        if not separator or not rest.startswith(f"{adapter_name}."):
            return key
        return f"{head}{separator}{attribute}.{rest.removeprefix(f'{adapter_name}.')}"


def check_adapter_names(model: nn.Module, new_name: str, names: list[str]) -> None:
    """
    Raises:
        ValueError: if torch allows no submodule of the new name, or peft could not save one of several adapters.
    """
    try:
        nn.ModuleDict({new_name: nn.Identity()})
    except KeyError as error:
        raise ValueError(f"{new_name!r} cannot be the name of an adapter, choose another: {error.args[0]}") from error
    parts: set[str] = set()
    for key in model.state_dict():
        without_name = [VtaTuner._remove_adapter_name_from_key(key, name) for name in names]
        parts.update(min(without_name, key=len).split("."))
    clashing = sorted(parts.intersection(names))
    if len(names) > 1 and clashing:
        # peft leaves every key with such a name in it out of the other adapters' files.
        raise ValueError(
            f"of the adapters {names}, {clashing} are also names of modules inside the model; with several "
            "adapters peft cannot tell them apart: choose other names"
        )


class TaskIdsKeyword:
    """Two hooks that make `task_ids` a keyword of a backbone's forward."""

    def __init__(self, model: PreTrainedModel, context: TaskContext) -> None:
        self.context = context
        self.handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        pixel_values: Tensor = args[0] if args else kwargs["pixel_values"]
        batch_size, _, height, width = pixel_values.shape
        task_ids = kwargs.pop("task_ids", None)
        family = get_family(model.config.model_type)
        family.check_image_size(model.config, height, width)
        running = {module.running_adapter() for module in model.modules() if isinstance(module, VtaLayer)} - {""}
        if running:
            # It can be switched at any time.
            family.check_attention_implementation(model.config)
        if task_ids is not None and running:
            num_tasks = self.context.conditioning[running.pop()].num_tasks
            task_ids = check_task_ids(task_ids, num_tasks, batch_size).to(pixel_values.device)
        prepare_checkpointing(model, self.context)
        self.context.begin(task_ids, family.token_grid(model.config, height, width))
        return args, kwargs

    def after(self, model: PreTrainedModel, args: tuple, output: Any) -> None:
        self.context.end()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def add_task_ids_keyword(model: Any, context: TaskContext) -> None:
    # Kept on the model, because transformers throws the tuner object away after injection.
    model._vta_task_ids = TaskIdsKeyword(model, context)


def prepare_checkpointing(model: PreTrainedModel, context: TaskContext) -> None:
    """Lets the stages that transformers checkpoints, adapted blocks inside, find the tasks when they run again."""
    # transformers and peft make the embeddings' output ask for a gradient, which only reentrant checkpointing needs:
    # frozen blocks would keep their activations, and Swin's embeddings return a tuple, on which that fails.
    model.disable_input_require_grads()
    for module in checkpointed_modules(model):
        module._gradient_checkpointing_func = context.keep_tasks(module._gradient_checkpointing_func)


def checkpointed_modules(model: nn.Module) -> list[Any]:
    """Those that transformers has told to run again in the backward pass."""
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]


def train_adapters_only(model: nn.Module, mode: bool) -> None:
    """Sets a frozen backbone to eval (no drop path, no dropout) and the adapters inside it, of any kind, to `mode`."""
    model.eval()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module, nn.Module):
            for name, child in module.named_children():
                if name != "base_layer":
                    child.train(mode)
