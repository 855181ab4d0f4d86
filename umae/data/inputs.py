"""A model's inputs: images flipped and normalised on the device, and the image processor for evaluation."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor
from transformers.image_utils import PILImageResampling
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from image_processing_umae import UMAEImageProcessor
from umae import seeding
from umae.data.decoding import RGB, Reading

IMAGENET_MEAN, IMAGENET_STD = tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)  # of RGB in 0..1


def flipped(pixel_values: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Images (batch, channels, height, width) on any device, mirrored where `flip` says so.

    Args:
        flip: bool (batch, 2) on the CPU, as of `random_flips`: left and right, upside down.
    """
    for dimension, where in ((-1, flip[:, 0]), (-2, flip[:, 1])):
        if where.any():
            where = on_device(where, pixel_values.device)[:, None, None, None]
            pixel_values = torch.where(where, pixel_values.flip(dimension), pixel_values)
    return pixel_values


def normalize(pixel_values: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(x - mean) / std, of 8 bits (x / 255 - mean) / std.

    Args:
        pixel_values: (batch, channels, height, width), uint8, or float32 in 0..1; on any device.
        mean, std: one number per channel, of values in 0..1.

    Returns:
        float32, same shape.

    Raises:
        ValueError: there are more or fewer means or deviations than channels.
    """
    channels = pixel_values.shape[1]
    if not channels == len(mean) == len(std):
        raise ValueError(f"{channels} channels, but {len(mean)} means and {len(std)} deviations to normalise them by")
    shift, scale = (_of_channels(tuple(numbers), pixel_values.device) for numbers in (mean, std))
    units = pixel_values.float().div_(255) if pixel_values.dtype == torch.uint8 else pixel_values.clone()
    return units.sub_(shift).div_(scale)


@lru_cache
def _of_channels(numbers: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """(channels, 1, 1), copied to the device once, not at every step."""
    return torch.tensor(numbers, device=device)[:, None, None]


def evaluation_processor(
    size: tuple[int, int],
    reading: Reading = RGB,
    image_mean: Sequence[float] = IMAGENET_MEAN,
    image_std: Sequence[float] = IMAGENET_STD,
) -> UMAEImageProcessor:
    """The image processor for evaluation: resize the shortest edge, crop the centre, normalise.

    MAE resizes to 256 and crops to 224; other sizes keep this ratio, but images under 96 pixels (CIFAR, digits) are
    not cropped.

    Args:
        size: (height, width) of the result, in pixels.
        reading: channels and range of intensities.
        image_mean, image_std: one number per channel, of values in 0..1.
    """
    shortest = min(size)
    return UMAEImageProcessor(
        num_channels=reading.num_channels,
        intensity_range=reading.intensity_range or "full",
        do_convert_rgb=reading.is_rgb,
        do_resize=True,
        size={"shortest_edge": round(shortest * 256 / 224) if shortest >= 96 else shortest},
        resample=PILImageResampling.BICUBIC,
        do_center_crop=True,
        crop_size={"height": size[0], "width": size[1]},
        image_mean=list(image_mean),
        image_std=list(image_std),
    )


def evaluation_pixels(processor: BaseImageProcessor, image: Image.Image | np.ndarray) -> torch.Tensor:
    """One image resized and cropped, but not normalised: (channels, height, width), uint8, or float32 in 0..1."""
    prepared = processor(images=image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    if isinstance(image, np.ndarray) and image.dtype != np.uint8:
        return prepared
    return prepared.round().clamp(0, 255).byte()


def device_inputs(
    batch: dict, device: torch.device, num_patches: int, seed: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A micro-batch of crops -> flipped, normalised float32 images and masking noise (batch, num_patches)."""
    # Drawn on the CPU: on a GPU it takes some 70 tiny kernels, and Apple's lack fast 64-bit integers
    noise = seeding.uniform(seed, seeding.MASK, batch["epoch"], batch["index"], num_patches)
    return flipped_and_normalized(batch, device, mean, std), on_device(noise, device)


def flipped_and_normalized(
    batch: dict, device: torch.device, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """A micro-batch of crops -> normalised float32 images, mirrored as the batch says."""
    pixel_values = flipped(on_device(batch["pixel_values"], device), batch["flip"])
    return normalize(pixel_values, mean, std)


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`, copied without waiting."""
    return tensor.to(device, non_blocking=True)


def load_processor(
    name_or_path: str, size: tuple[int, int] | None = None, revision: str | None = None
) -> UMAEImageProcessor:
    """The image processor of a U-MAE, ViT or ViTMAE, by Pillow, reading images as `open_image` does.

    Args:
        size: (height, width) of the encoder's images, for a file of the original code, which has no processor and
            gets `evaluation_processor(size)`.

    Raises:
        ValueError: there is no image processor, or it is not one of these models.
    """
    if size is not None and Path(name_or_path).is_file():
        return evaluation_processor(size)
    try:
        settings, _ = UMAEImageProcessor.get_image_processor_dict(name_or_path, revision=revision)
    except OSError as error:
        raise ValueError(f"{name_or_path} has no image processor: {error}") from error
    class_name = settings.get("image_processor_type") or settings.get("feature_extractor_type") or "none"
    if not class_name.startswith("ViT"):
        raise ValueError(f"{name_or_path} has the image processor {class_name}; expected one of ViT, ViTMAE or U-MAE")
    # transformers declares `revision: str`, and passes None on to huggingface_hub, which takes it for the default
    return UMAEImageProcessor.from_pretrained(name_or_path, revision=revision)  # type: ignore[arg-type]
