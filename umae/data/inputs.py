"""What a model is fed: images flipped and normalised on the device, and the processor that evaluates."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.image_utils import PILImageResampling
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from image_processing_umae import UMAEImageProcessor
from umae import seeding

IMAGENET_MEAN, IMAGENET_STD = tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)  # of RGB in 0..1


def horizontal_flip(pixel_values: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Mirror left and right the images (batch, channels, height, width) where flip, bool (batch,), is True."""
    return torch.where(flip[:, None, None, None], pixel_values.flip(-1), pixel_values)


def normalize(pixel_values: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(x / 255 - mean) / std.

    Args:
        pixel_values: uint8 (batch, channels, height, width), on any device.
        mean, std: one number per channel, of values in 0..1.

    Returns:
        float32, same shape.
    """
    values = pixel_values.float().div_(255)
    # Channel by channel, because a tensor of the means would have to be copied to the device at every step.
    for channel, channel_mean, channel_std in zip(values.unbind(1), mean, std, strict=True):
        channel.sub_(channel_mean).div_(channel_std)
    return values


def evaluation_processor(size: tuple[int, int]) -> UMAEImageProcessor:
    """The transform that features are computed with: resize the shortest edge, cut the centre, normalise.

    MAE resizes to 256 and cuts 224; other sizes keep that proportion. Small images (under 96 pixels: CIFAR, digits)
    have no margin to spare and are used whole.

    Args:
        size: (height, width) of the result, in pixels.
    """
    shortest = min(size)
    return UMAEImageProcessor(
        do_convert_rgb=True,
        do_resize=True,
        size={"shortest_edge": round(shortest * 256 / 224) if shortest >= 96 else shortest},
        resample=PILImageResampling.BICUBIC,
        do_center_crop=True,
        crop_size={"height": size[0], "width": size[1]},
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )


def device_inputs(
    batch: dict, device: torch.device, num_patches: int, seed: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A micro-batch of uint8 crops -> flipped and normalised float32 images, and the noise that masks them."""
    index, epoch = on_device(batch["index"], device), on_device(batch["epoch"], device)
    pixel_values = flipped_and_normalized(batch, device, seed, mean, std)
    return pixel_values, seeding.uniform(seed, seeding.MASK, epoch, index, num_patches)


def flipped_and_normalized(
    batch: dict, device: torch.device, seed: int, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """A micro-batch of uint8 crops -> float32 images, half of them mirrored."""
    index, epoch = on_device(batch["index"], device), on_device(batch["epoch"], device)
    pixel_values = normalize(on_device(batch["pixel_values"], device), mean, std)
    return horizontal_flip(pixel_values, seeding.uniform(seed, seeding.FLIP, epoch, index, 1)[:, 0] < 0.5)


def on_device(value: torch.Tensor | int, device: torch.device) -> torch.Tensor | int:
    """A tensor, where it is wanted, without waiting for it; a number, as it is."""
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


def load_processor(
    name_or_path: str, size: tuple[int, int] | None = None, revision: str | None = None
) -> UMAEImageProcessor:
    """The image processor of a U-MAE, ViT or ViTMAE, by Pillow, reading images as `open_image` does.

    Args:
        size: (height, width) of the encoder's images; a file of the original code, which says nothing of how they
            are prepared, then means MAE's way.

    Raises:
        ValueError: there is none, or it is not of the kind that these models have.
    """
    if size is not None and Path(name_or_path).is_file():
        return evaluation_processor(size)
    try:
        settings, _ = UMAEImageProcessor.get_image_processor_dict(name_or_path, revision=revision)
    except OSError as error:
        raise ValueError(f"{name_or_path} does not say how its images are prepared: {error}") from error
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or "none"
    if not kind.startswith("ViT"):
        raise ValueError(f"{name_or_path} prepares its images by {kind}; expected an image processor of the ViT family")
    return UMAEImageProcessor.from_pretrained(name_or_path, revision=revision)
