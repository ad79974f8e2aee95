"""The package's only side effects: what transformers and peft must know of it. Running it twice changes nothing."""

from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.pipelines import PIPELINE_REGISTRY

from mt_adapters.models.vta.configuration_vta import VtaConfig
from mt_adapters.models.vta.image_processing_pil_vta import VtaImageProcessorPil
from mt_adapters.models.vta.modeling_vta import VtaModel
from mt_adapters.pipelines import PIPELINE_TASK, MultitaskDensePredictionPipeline
from mt_adapters.tuners.vta import VtaAdapterConfig, VtaTuner


def add_peft_type(name: str) -> None:
    """Adds a member to peft's closed enumeration of adapter types, which has no way in for other packages."""
    if name in PeftType.__members__:
        return
    member: Any = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    # Python 3.12 finds members as attributes of the class, earlier versions through _member_map_.
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    assert PeftType(name) is PeftType[name] is getattr(PeftType, name)


def register() -> None:
    add_peft_type("VTA")
    if PeftType("VTA") not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="vta", config_cls=VtaAdapterConfig, model_cls=VtaTuner)
    AutoConfig.register("vta", VtaConfig, exist_ok=True)
    AutoModel.register(VtaConfig, VtaModel, exist_ok=True)
    AutoImageProcessor.register(VtaConfig, image_processor_classes={"pil": VtaImageProcessorPil}, exist_ok=True)
    if PIPELINE_TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        # With AutoModel a folder of another model loads, and the pipeline can say what is wrong with it.
        PIPELINE_REGISTRY.register_pipeline(
            PIPELINE_TASK, MultitaskDensePredictionPipeline, pt_model=AutoModel, type="image"
        )
