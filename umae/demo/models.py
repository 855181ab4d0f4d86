"""A model to try: its weights, and how it reads images."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from configuration_umae import UMAEConfig
from image_processing_umae import UMAEImageProcessor
from modeling_umae import UMAEForPreTraining, UMAEModel
from umae.convert import load_exactly, read_model, set_pooling
from umae.data.decoding import Reading, reading_of
from umae.data.inputs import load_processor
from umae.evaluation.features import frozen_features
from umae.evaluation.reconstruction import to_pixels


@dataclass(frozen=True)
class DemoModel:
    """A model in evaluation mode, whose attention weights can be read.

    Args:
        name: of its folder, without the path, or on the Hub.
        encoder: with `pooling="mean"`, so that one pass gives both features.
        pretraining: the same encoder with its decoder; None if the weights have no decoder.
        processor: reads and prepares its images.
        pooling: the feature that it was trained with, `cls` or `mean`.
    """

    name: str
    encoder: UMAEModel
    pretraining: UMAEForPreTraining | None
    processor: UMAEImageProcessor
    pooling: str

    @property
    def config(self) -> UMAEConfig:
        return self.encoder.config

    @property
    def reading(self) -> Reading:
        """Channels and range of its images."""
        return reading_of(self.processor)

    def read(self, source: bytes | str | os.PathLike, name: str) -> torch.Tensor:
        """`prepare` of an image file; raises `UnreadableImage` with `name`."""
        return self.prepare(self.reading.read(source, name))

    def prepare(self, image: Image.Image | np.ndarray) -> torch.Tensor:
        """What the model sees of an image: (1, channels, height, width), resized, cropped and normalised."""
        return self.processor(images=image, return_tensors="pt")["pixel_values"]

    def pixels(self, pixel_values: torch.Tensor) -> np.ndarray:
        """(1, channels, height, width) -> uint8 (height, width, 3), see `to_pixels`."""
        return to_pixels(pixel_values, self.processor.image_mean, self.processor.image_std)[0]

    @torch.inference_mode()
    def features(self, pixel_values: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Of one image, unmasked: `{"cls": (D,), "mean": (D,)}` and the patches, (patches, D), float32 on the CPU."""
        tokens = frozen_features(self.encoder, pixel_values.to(self.encoder.device), tokens=True)[0].float().cpu()
        return {"cls": tokens[0], "mean": tokens[1]}, tokens[2:]


def load_model(name_or_path: str) -> DemoModel:
    """A run folder, or any other model that `read_model` knows, on the GPU if there is one.

    Raises:
        ValueError: there is no such model, or it has no image processor.
    """
    model = read_weights_of(name_or_path, attn_implementation="eager")
    processor = load_processor(name_or_path, model.config.image_height_width)
    pooling = model.config.pooling
    model.to(Accelerator().device).eval()
    encoder = set_pooling(model.vit if isinstance(model, UMAEForPreTraining) else model, "mean")
    return DemoModel(
        name=Path(name_or_path).resolve().name if Path(name_or_path).exists() else name_or_path,
        encoder=encoder.eval(),
        pretraining=model if isinstance(model, UMAEForPreTraining) else None,
        processor=processor,
        pooling=pooling,
    )


def read_weights_of(name_or_path: str, **options: str) -> UMAEForPreTraining | UMAEModel:
    """The model with its decoder if it has one, else the encoder; without a classifier."""
    config, tensors = read_model(name_or_path)
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("classifier.")}
    kind = UMAEForPreTraining if any(key.startswith("decoder.") for key in tensors) else UMAEModel
    return load_exactly(kind._from_config(config, **options), tensors, name_or_path)
