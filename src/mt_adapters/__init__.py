"""One frozen vision transformer, many dense tasks.

Importing the package registers the model with transformers' Auto classes and the adapter type VTA with peft.
"""

from mt_adapters.models.vta.configuration_vta import VtaConfig
from mt_adapters.models.vta.image_processing_pil_vta import VtaImageProcessorPil
from mt_adapters.models.vta.modeling_vta import MultitaskOutput, VtaModel
from mt_adapters.pipelines import MultitaskDensePredictionPipeline
from mt_adapters.registration import register
from mt_adapters.tasks import TASKS, get_task
from mt_adapters.tuners.vta import VtaAdapterConfig
from mt_adapters.version import __version__

register()

__all__ = [
    "TASKS",
    "MultitaskDensePredictionPipeline",
    "MultitaskOutput",
    "VtaAdapterConfig",
    "VtaConfig",
    "VtaImageProcessorPil",
    "VtaModel",
    "__version__",
    "get_task",
]
