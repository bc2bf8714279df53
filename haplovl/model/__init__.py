"""HaploVL: configuration, model, processor, and their registration with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from haplovl.model.configuration import HaploConfig, HaploDecoderConfig, HaploPreDecoderConfig
from haplovl.model.decoder import HaploDecoderModel
from haplovl.model.image_processing import HaploImageProcessor
from haplovl.model.modeling import HaploForConditionalGeneration, HaploModel
from haplovl.model.packed import pack_for_cpu
from haplovl.model.processing import HaploProcessor

__all__ = [
    "HaploConfig",
    "HaploDecoderConfig",
    "HaploDecoderModel",
    "HaploForConditionalGeneration",
    "HaploImageProcessor",
    "HaploModel",
    "HaploPreDecoderConfig",
    "HaploProcessor",
    "pack_for_cpu",
]

AutoConfig.register("haplovl", HaploConfig)
AutoConfig.register("haplovl_pre_decoder", HaploPreDecoderConfig)
AutoConfig.register("haplovl_decoder", HaploDecoderConfig)
AutoModel.register(HaploDecoderConfig, HaploDecoderModel)
AutoModel.register(HaploConfig, HaploModel)
AutoModelForImageTextToText.register(HaploConfig, HaploForConditionalGeneration)
AutoModelForMultimodalLM.register(HaploConfig, HaploForConditionalGeneration)
AutoProcessor.register(HaploConfig, HaploProcessor)
AutoImageProcessor.register(HaploConfig, slow_image_processor_class=HaploImageProcessor)
