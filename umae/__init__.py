"""U-MAE for the Hugging Face ecosystem. Importing this package registers the models with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

from configuration_umae import UMAEConfig
from image_processing_umae import UMAEImageProcessor, open_image
from modeling_umae import (
    UMAEForImageClassification,
    UMAEForPreTraining,
    UMAEModel,
    reconstruction_loss,
    uniformity_loss,
)

AutoConfig.register("umae", UMAEConfig, exist_ok=True)
AutoModel.register(UMAEConfig, UMAEModel, exist_ok=True)
AutoModelForPreTraining.register(UMAEConfig, UMAEForPreTraining, exist_ok=True)
AutoModelForImageClassification.register(UMAEConfig, UMAEForImageClassification, exist_ok=True)

__all__ = [
    "UMAEConfig",
    "UMAEForImageClassification",
    "UMAEForPreTraining",
    "UMAEImageProcessor",
    "UMAEModel",
    "open_image",
    "reconstruction_loss",
    "uniformity_loss",
]
