"""The VTA adapter: a peft tuner that conditions the blocks of a frozen backbone on the task."""

from mt_adapters.tuners.vta.conditioning import TaskConditioning
from mt_adapters.tuners.vta.config import VtaAdapterConfig
from mt_adapters.tuners.vta.context import TaskContext, find_context
from mt_adapters.tuners.vta.layer import VtaLayer
from mt_adapters.tuners.vta.model import VtaTuner, train_adapters_only

__all__ = [
    "TaskConditioning",
    "TaskContext",
    "VtaAdapterConfig",
    "VtaLayer",
    "VtaTuner",
    "find_context",
    "train_adapters_only",
]
