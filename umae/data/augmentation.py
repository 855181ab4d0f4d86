"""Augmentations of fine-tuning after the crop, as pure functions: the random numbers are arguments (see seeding.py).

The loader's workers change single crops (`augment`: flip, RandAugment, random erasing), the device mixes image pairs
(`mix_pairs`: mixup, cutmix). An image's random numbers are keyed by (seed, epoch, index), a pair's by its first image,
so that the number of workers or processes and interruptions change nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from PIL import Image, ImageEnhance, ImageOps

from umae import seeding

OPERATIONS = 2  # of RandAugment for each image
SPREAD = 0.5  # standard deviation of their magnitudes
MOST = 10.0  # the largest magnitude
AUGMENT_NUMBERS = 4 * OPERATIONS  # which operation, whether to apply it, magnitude, direction
ERASED = (0.02, 1 / 3)  # bounds of the share of the area
ERASED_RATIO = (0.3, 1 / 0.3)  # bounds of height / width, drawn uniformly in the logarithm
_ATTEMPTS = 10
ERASE_NUMBERS = 1 + 4 * _ATTEMPTS  # whether to erase, then area, ratio and position of every attempt
_TRIES = 16  # to draw from the beta distribution; fewer than one pair in 60,000 needs more
MIX_NUMBERS = 2 * _TRIES + 3  # then: mixup or cutmix, and the centre of the box
_NORMAL = NormalDist()
_HALF_STEP = 2.0**-25  # half the spacing of the random numbers: moves [0, 1) into (0, 1)


def _enhance(enhancer: type) -> Callable[[Image.Image, float, tuple], Image.Image]:
    """Colour, contrast, brightness or sharpness: 1 is the image itself, a change of up to 0.9 either way."""
    return lambda image, strength, fill: enhancer(image).enhance(max(0.1, 1 + 0.9 * strength))


def _affine(image: Image.Image, matrix: Sequence[float], fill: tuple[int, int, int]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill)


def _solarize_add(image: Image.Image, strength: float) -> Image.Image:
    """Raise dark levels (below 128) by up to 110."""
    added = int(110 * abs(strength))
    return image.point([min(255, level + added) if level < 128 else level for level in range(256)] * 3)


# Each: (image, strength in [-1, 1], fill colour for pixels from outside the image) -> image. A negative strength is the
# opposite direction, if there is one. A larger absolute strength changes the image more ("increasing").
AUGMENTATIONS: dict[str, Callable[[Image.Image, float, tuple[int, int, int]], Image.Image]] = {
    "autocontrast": lambda image, strength, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, fill: ImageOps.equalize(image),
    "invert": lambda image, strength, fill: ImageOps.invert(image),
    "rotate": lambda image, strength, fill: image.rotate(30 * strength, Image.Resampling.BICUBIC, fillcolor=fill),
    "posterize": lambda image, strength, fill: _posterize(image, 4 - int(4 * abs(strength))),
    "solarize": lambda image, strength, fill: ImageOps.solarize(image, 256 - int(256 * abs(strength))),
    "solarize_add": lambda image, strength, fill: _solarize_add(image, strength),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, strength, fill: _affine(image, (1, 0.3 * strength, 0, 0, 1, 0), fill),
    "shear_y": lambda image, strength, fill: _affine(image, (1, 0, 0, 0.3 * strength, 1, 0), fill),
    "translate_x": lambda image, strength, fill: _affine(image, (1, 0, 0.45 * strength * image.width, 0, 1, 0), fill),
    "translate_y": lambda image, strength, fill: _affine(image, (1, 0, 0, 0, 1, 0.45 * strength * image.height), fill),
}


# Those that change colours rather than places
OF_COLOURS = [name for name in AUGMENTATIONS if not name.startswith(("rotate", "shear", "translate"))]


def _posterize(image: Image.Image, bits: int) -> Image.Image:
    """Keep only the highest `bits` bits of every level; 0 makes the image black."""
    kept = 0xFF & ~((1 << (8 - bits)) - 1)
    return image.point([level & kept for level in range(256)] * 3)


def rand_augment(
    image: torch.Tensor, numbers: torch.Tensor, magnitude: float, fill: tuple[int, int, int]
) -> torch.Tensor:
    """RandAugment (Cubuk et al. 2020, "RandAugment: Practical automated data augmentation...", section 3).

    OPERATIONS are drawn from AUGMENTATIONS, with replacement; each is applied with probability 1/2, with a normally
    distributed magnitude, in either direction with probability 1/2. Operations and magnitudes are those of the
    policy that MAE fine-tunes with, `rand-m9-mstd0.5-inc1` in timm's documentation.

    Args:
        image: uint8 (3, height, width); its operations are those of Pillow on RGB.
        numbers: float (AUGMENT_NUMBERS,), uniform in [0, 1).
        magnitude: mean of the magnitudes, 0 (weakest) to 10.
        fill: colour of pixels from outside the image, 0..255.

    Returns:
        uint8 (3, height, width).
    """
    names, changed, applied = list(AUGMENTATIONS), None, []
    for which, whether, how, direction in numbers.view(OPERATIONS, 4).tolist():
        if whether < 0.5:
            strength = min(max(magnitude + SPREAD * _NORMAL.inv_cdf(how + _HALF_STEP), 0.0), MOST) / MOST
            applied.append((names[int(which * len(names))], strength if direction < 0.5 else -strength))
    for name, strength in applied:
        if changed is None:
            changed = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        changed = AUGMENTATIONS[name](changed, strength, fill)
    return image if changed is None else _to_tensor(changed)


def check_rand_augment(image: torch.Tensor) -> None:
    """Raise `ValueError` unless RandAugment can change an image (channels, height, width)."""
    if image.dtype != torch.uint8 or len(image) != 3:
        kind = "8 bits" if image.dtype == torch.uint8 else "floats"
        raise ValueError(
            f"rand_augment changes colours of 8-bit RGB ({', '.join(OF_COLOURS)}), and the images are {kind} of "
            f"{len(image)} channels; use rand_augment 0"
        )


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB -> uint8 (3, height, width), contiguous."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def erased_box(numbers: torch.Tensor, height: int, width: int, probability: float) -> tuple[int, int, int, int] | None:
    """The box of random erasing (Zhong et al. 2020, "Random Erasing Data Augmentation", algorithm 1).

    Args:
        numbers: float (ERASE_NUMBERS,), uniform in [0, 1).
        height, width: of the image, in pixels.
        probability: share of the images with a box.

    Returns:
        (top, left, height, width) in pixels, the first of ten random boxes that fits; None for no box.
    """
    whether, *attempts = numbers.tolist()
    if whether >= probability:
        return None
    for i in range(0, 4 * _ATTEMPTS, 4):
        share, shape, vertical, horizontal = attempts[i : i + 4]
        area = height * width * (ERASED[0] + share * (ERASED[1] - ERASED[0]))
        ratio = ERASED_RATIO[0] * (ERASED_RATIO[1] / ERASED_RATIO[0]) ** shape
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < rows < height and 0 < columns < width:
            return int(vertical * (height - rows + 1)), int(horizontal * (width - columns + 1)), rows, columns
    return None


def random_erasing(
    image: torch.Tensor,
    box: tuple[int, int, int, int],
    numbers: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> torch.Tensor:
    """Fill a box with noise, drawn for every pixel and channel.

    The normalised pixels are normally distributed, mean 0 and variance 1, but clipped to the range of an image, about
    two standard deviations from the mean, and with 8 bits rounded to its levels.

    Args:
        image: (channels, height, width), uint8, or float32 in 0..1; not changed.
        box: (top, left, height, width), as returned by `erased_box`.
        numbers: float (channels * box height * box width,), uniform in [0, 1).
        mean, std: of the images' normalisation, of values in 0..1.
    """
    top, left, rows, columns = box
    noise = math.sqrt(2) * torch.erfinv(2 * (numbers.double() + _HALF_STEP) - 1).view(-1, rows, columns)
    scale, offset = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (std, mean))
    image = image.clone()
    if image.dtype == torch.uint8:
        levels = (255 * (noise * scale + offset)).round_().clamp_(0, 255)
    else:
        levels = (noise * scale + offset).clamp_(0, 1)
    image[:, top : top + rows, left : left + columns] = levels.to(image.dtype)
    return image


@dataclass(frozen=True)
class Strengths:
    """The strength of every augmentation; 0 turns one off.

    Args:
        horizontal_flip: share of the images that are flipped.
        rand_augment: RandAugment's mean magnitude, up to 10.
        random_erasing: share of the images with a box of noise.
        mixup, cutmix: alpha of the beta distribution of a pair's mixing weight, up to 1; with both, a pair gets one of
            them with probability 1/2.
        label_smoothing: share of the target that is spread over all classes.
    """

    horizontal_flip: float = 0.5
    rand_augment: float = 9.0
    random_erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    label_smoothing: float = 0.1

    @property
    def mixes(self) -> bool:
        """Whether pairs of images are mixed."""
        return self.mixup > 0 or self.cutmix > 0


def augment(
    crops: list[torch.Tensor],
    epoch: int,
    index: torch.Tensor,
    *,
    seed: int,
    strengths: Strengths,
    mean: Sequence[float],
    std: Sequence[float],
) -> list[torch.Tensor]:
    """Flip, RandAugment and random erasing, in this order, keyed by (seed, epoch, index).

    Args:
        crops: (channels, height, width) each, uint8, or float32 in 0..1; for RandAugment uint8 RGB.
        index: int64 (batch,), their positions in the data set.
        mean, std: of the images' normalisation, of values in 0..1; pixels from outside the image get the mean colour.
    """
    if strengths.rand_augment > 0:
        for image in crops:
            check_rand_augment(image)
    red, green, blue = (round(255 * value) for value in (*mean, 0, 0)[:3])
    flips = (seeding.uniform(seed, seeding.FLIP, epoch, index, 1)[:, 0] < strengths.horizontal_flip).tolist()
    chosen = seeding.uniform(seed, seeding.AUGMENT, epoch, index, AUGMENT_NUMBERS)
    erased = seeding.uniform(seed, seeding.ERASE, epoch, index, ERASE_NUMBERS)
    changed = []
    for i, image in enumerate(crops):
        image = image.flip(-1) if flips[i] else image
        if strengths.rand_augment > 0:
            image = rand_augment(image, chosen[i], strengths.rand_augment, (red, green, blue))
        height, width = image.shape[-2:]
        box = erased_box(erased[i], height, width, strengths.random_erasing)
        if box is not None:
            count = ERASE_NUMBERS + len(image) * box[2] * box[3]  # the first ERASE_NUMBERS have chosen the box
            (noise,) = seeding.uniform(seed, seeding.ERASE, epoch, index[i : i + 1], count)
            image = random_erasing(image, box, noise[ERASE_NUMBERS:], mean, std)
        changed.append(image)
    return changed


def beta(numbers: torch.Tensor, alpha: float) -> torch.Tensor:
    """Beta(alpha, alpha) from uniform numbers, by Jöhnk's rejection (1964) with a fixed number of tries.

    Args:
        numbers: float (batch, 2 * tries), uniform in [0, 1).
        alpha: in (0, 1], where at least half of the tries are accepted.

    Returns:
        float (batch,) in [0, 1]; 1/2 where no try was accepted.
    """
    first, second = ((numbers + _HALF_STEP).log() / alpha).unflatten(1, (-1, 2)).unbind(2)  # (batch, tries)
    accepted = torch.logaddexp(first, second) <= 0
    is_first = accepted & (accepted.cumsum(dim=1) == 1)
    drawn = (torch.sigmoid(first - second) * is_first).sum(dim=1)
    return torch.where(accepted.any(dim=1), drawn, 0.5)


def cut_boxes(share: torch.Tensor, centre: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The boxes of cutmix: a share of the image's area around a centre, clipped to the image.

    Args:
        share: float (batch,), in [0, 1].
        centre: float (batch, 2), (vertical, horizontal), uniform in [0, 1).

    Returns:
        bool (batch, height, width), True inside.
    """
    inside = []
    for axis, side in enumerate((height, width)):
        length, middle = (side * share.sqrt()).floor(), (side * centre[:, axis]).floor()
        positions, first = torch.arange(side, device=share.device), middle - (length / 2).floor()
        inside.append((positions >= first[:, None]) & (positions < (first + length)[:, None]))  # (batch, side)
    return inside[0][:, :, None] & inside[1][:, None, :]


def mix_pairs(
    pixel_values: torch.Tensor, targets: torch.Tensor, numbers: torch.Tensor, mixup: float, cutmix: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each image with its neighbour in the batch, by mixup or cutmix, and their targets in the same proportion.

    Mixup (Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization") averages two images with the weights
    lambda and 1 - lambda, cutmix (Yun et al. 2019, "CutMix: Regularization Strategy to Train Strong Classifiers...")
    puts a box of one into the other, with 1 - lambda of its area. Lambda is drawn for each pair: images 0 and 1, 2 and
    3, and so on. (MAE draws one lambda for all images of a process and pairs the first with the last, so its images
    depend on the number of processes.) Never waits for the device.

    Args:
        pixel_values: float (batch, channels, height, width), an even number of images.
        targets: float (batch, classes).
        numbers: float (batch / 2, MIX_NUMBERS), uniform in [0, 1), on the same device.
        mixup, cutmix: alpha of the beta distribution of lambda, in (0, 1]; 0 for never. With both, a pair gets one of
            them with probability 1/2.

    Returns:
        Images and targets, of the same shapes.
    """
    height, width = pixel_values.shape[-2:]
    draws, which, centre = numbers[:, : 2 * _TRIES], numbers[:, 2 * _TRIES], numbers[:, 2 * _TRIES + 1 :]
    cuts = torch.full_like(which, mixup == 0, dtype=torch.bool) if 0 in (mixup, cutmix) else which < 0.5
    boxes = torch.zeros(len(numbers), height, width, device=numbers.device)
    if cutmix > 0:
        boxes = cut_boxes(1 - beta(draws, cutmix), centre, height, width).float()
    kept = 1 - boxes.mean(dim=(1, 2))
    if mixup > 0:
        kept = torch.where(cuts, kept, beta(draws, mixup))
    # The weight of an image's own pixels, (pairs, height, width)
    weights = torch.where(cuts[:, None, None], 1 - boxes, kept[:, None, None])

    def mixed(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        pairs = values.unflatten(0, (-1, 2))
        return (pairs * weights + pairs.flip(1) * (1 - weights)).flatten(0, 1)

    return mixed(pixel_values, weights[:, None, None]), mixed(targets, kept[:, None, None])


def soft_targets(labels: torch.Tensor, num_classes: int, smoothing: float) -> torch.Tensor:
    """Smoothed one-hot targets (label smoothing, Szegedy et al. 2016): int64 (batch,) -> (batch, C)."""
    targets = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    return targets.scatter_add_(1, labels[:, None], torch.full_like(targets[:, :1], 1 - smoothing))


def soft_multi_hot(labels: torch.Tensor, num_classes: int, smoothing: float) -> torch.Tensor:
    """Smoothed multi-hot targets: bool (batch, C) -> float (batch, C).

    Every class is a question with two answers, of which label smoothing gives each the same share: 0.1 makes 0 and 1
    into 0.05 and 0.95.
    """
    return labels.float() * (1 - smoothing) + smoothing / 2
