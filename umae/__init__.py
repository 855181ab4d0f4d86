"""U-MAE for the Hugging Face ecosystem. Importing this package registers the models with transformers' Auto classes.

What trains and evaluates is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

from configuration_umae import UMAEConfig
from image_processing_umae import UMAEImageProcessor, open_image, read_image
from modeling_umae import (
    UMAEBackbone,
    UMAEForImageClassification,
    UMAEForPreTraining,
    UMAEModel,
    coding_rate_loss,
    reconstruction_loss,
    uniformity_loss,
)

if TYPE_CHECKING:
    from umae.convert import encoder_from_pretrained
    from umae.data.images import Images, load_images
    from umae.data.inputs import load_processor
    from umae.evaluation.classification import evaluate
    from umae.evaluation.diagnosis import diagnose
    from umae.evaluation.features import extract_features
    from umae.programs.finetune import finetune
    from umae.programs.pretrain import pretrain
    from umae.programs.probe import probe
    from umae.programs.shrink import shrink
    from umae.programs.study import study
    from umae.sharing.report import report
    from umae.training.folder import Run

__version__ = "0.1.0"

AutoConfig.register("umae", UMAEConfig, exist_ok=True)
AutoBackbone.register(UMAEConfig, UMAEBackbone, exist_ok=True)
AutoModel.register(UMAEConfig, UMAEModel, exist_ok=True)
AutoModelForPreTraining.register(UMAEConfig, UMAEForPreTraining, exist_ok=True)
AutoModelForImageClassification.register(UMAEConfig, UMAEForImageClassification, exist_ok=True)

_LAZY = {
    "Images": "umae.data.images",
    "Run": "umae.training.folder",
    "diagnose": "umae.evaluation.diagnosis",
    "encoder_from_pretrained": "umae.convert",
    "evaluate": "umae.evaluation.classification",
    "extract_features": "umae.evaluation.features",
    "finetune": "umae.programs.finetune",
    "load_images": "umae.data.images",
    "load_processor": "umae.data.inputs",
    "pretrain": "umae.programs.pretrain",
    "probe": "umae.programs.probe",
    "report": "umae.sharing.report",
    "shrink": "umae.programs.shrink",
    "study": "umae.programs.study",
}

__all__ = [
    "Images",
    "Run",
    "UMAEBackbone",
    "UMAEConfig",
    "UMAEForImageClassification",
    "UMAEForPreTraining",
    "UMAEImageProcessor",
    "UMAEModel",
    "coding_rate_loss",
    "diagnose",
    "encoder_from_pretrained",
    "evaluate",
    "extract_features",
    "finetune",
    "load_images",
    "load_processor",
    "open_image",
    "pretrain",
    "probe",
    "read_image",
    "reconstruction_loss",
    "report",
    "shrink",
    "study",
    "uniformity_loss",
]


def __getattr__(name: str) -> Any:
    name = "load_images" if name == "load_pictures" else name  # its former name
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
