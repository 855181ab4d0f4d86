"""Random crops as pure functions: the random numbers are arguments (see seeding.py)."""

import math
from typing import NamedTuple

import torch
from torch.nn.functional import interpolate

from umae import seeding

MIN_SCALE, RATIO = 0.2, (3 / 4, 4 / 3)  # of pre-training's crops: smallest share of the area, width / height
_ATTEMPTS = 10
CROP_NUMBERS = 2 * _ATTEMPTS + 2  # an area and a ratio per attempt, then the two of the position


class Flips(NamedTuple):
    """Shares of the images that are mirrored: left and right, and upside down."""

    horizontal: float = 0.5
    vertical: float = 0.0


FLIPS = Flips()


def crop_box(
    numbers: torch.Tensor,
    height: int,
    width: int,
    scale: tuple[float, float] = (MIN_SCALE, 1.0),
    ratio: tuple[float, float] = RATIO,
) -> tuple[int, int, int, int]:
    """The box of a random resized crop, distributed as in torchvision's RandomResizedCrop.get_params.

    The first of ten random boxes that fits, else the largest central box of an allowed ratio.

    Args:
        numbers: float (CROP_NUMBERS,), uniform in [0, 1).
        height, width: of the image, in pixels.
        scale: bounds of the box's share of the image's area, drawn uniformly.
        ratio: bounds of the box's width / height, drawn uniformly in the logarithm.

    Returns:
        (top, left, height, width) in pixels, at least 1 x 1 and inside the image.
    """
    *shapes, vertical, horizontal = numbers.tolist()
    if len(shapes) != 2 * _ATTEMPTS:
        raise ValueError(f"{len(numbers)} numbers for a crop; expected CROP_NUMBERS = {CROP_NUMBERS}")
    for share, shape in zip(shapes[::2], shapes[1::2], strict=True):
        area = height * width * (scale[0] + share * (scale[1] - scale[0]))
        aspect = ratio[0] * (ratio[1] / ratio[0]) ** shape
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(vertical * (height - box_height + 1))
            left = int(horizontal * (width - box_width + 1))
            return top, left, box_height, box_width
    box_height = min(height, max(1, round(width / ratio[0])))
    box_width = min(width, max(1, round(height * ratio[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def random_resized_crop(
    image: torch.Tensor,
    numbers: torch.Tensor,
    size: tuple[int, int],
    scale: tuple[float, float] = (MIN_SCALE, 1.0),
) -> torch.Tensor:
    """Crop the box of `crop_box` and resize it, bicubic with antialiasing.

    Args:
        image: (channels, height, width), uint8, or float32 in 0..1; on the CPU.
        numbers: float (CROP_NUMBERS,), uniform in [0, 1).
        size: (height, width) of the result, in pixels.
        scale: bounds of the box's share of the image's area.

    Returns:
        (channels, *size), of the image's type and range, contiguous, in new memory; a box of this size already keeps
        its pixels.
    """
    image_height, image_width = image.shape[-2:]
    top, left, height, width = crop_box(numbers, image_height, image_width, scale)
    box = image[None, :, top : top + height, left : left + width]
    if image.dtype == torch.uint8:
        return interpolate(box, size, mode="bicubic", antialias=True)[0]
    if (height, width) == tuple(size):  # which rounding would change
        return box[0].clone(memory_format=torch.contiguous_format)
    return interpolate(box, size, mode="bicubic", antialias=True)[0].clamp_(0, 1)  # as 8 bits cannot overshoot either


def least_side(size: tuple[int, int], min_scale: float = MIN_SCALE) -> int:
    """How many pixels an image's shorter side must keep when it is decoded at a reduced scale, for crops of `size`.

    Its smallest crop then has at least 1.5 times the pixels of the result along each axis: on ImageNet the crops
    differ from those of the full scale by less than 1 of 255 levels on average.
    """
    return math.ceil(1.5 * max(size) / math.sqrt(min_scale * RATIO[0]))


def random_crop(
    pixels: torch.Tensor, seed: int, epoch: int, index: int, size: tuple[int, int], min_scale: float = MIN_SCALE
) -> torch.Tensor:
    """The crop of one image, keyed by (seed, epoch, index): (channels, height, width) -> (channels, *size)."""
    (numbers,) = seeding.uniform(seed, seeding.CROP, epoch, torch.tensor([index]), CROP_NUMBERS)
    return random_resized_crop(pixels, numbers, size, (min_scale, 1.0))


def random_flips(seed: int, epoch: int | torch.Tensor, index: torch.Tensor, flips: Flips) -> torch.Tensor:
    """Which images are mirrored, left and right and upside down: bool (batch, 2), keyed by (seed, epoch, index).

    Args:
        epoch: the same for all images, or int64 (batch,).
        index: int64 (batch,).
    """
    return seeding.uniform(seed, seeding.FLIP, epoch, index, 2) < torch.tensor(flips)
