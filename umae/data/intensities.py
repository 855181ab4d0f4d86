"""What the images of a data set are like: their channels, the range of their values, their mean and deviation."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from image_processing_umae import UnreadableImage, check_intensity_range, declared_channels, read_image
from umae.data.decoding import Reading, to_tensor
from umae.data.images import Images
from umae.data.inputs import IMAGENET_MEAN, IMAGENET_STD
from umae.data.streaming import Stream

MOST_IMAGES = 2000  # that are measured
MOST_VALUES = 2**28  # of them together, beyond which no further image is read
VALUES_OF_AN_IMAGE = 2**14  # that percentiles are taken of
PERCENTILES = (0.1, 99.9)
WARNING_IMAGES = 64  # that are read for the warning alone
SMALL_SHARE = 1 / 16  # of the full range


@dataclass(frozen=True)
class Inputs:
    """How images are read and normalised, in numbers."""

    reading: Reading
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]


class FirstImage(NamedTuple):
    """Of the first image of a data set: the channels if its file says how many, and whether it has 8 bits."""

    channels: int | None
    has_8_bits: bool


def first_image(images: Images | Stream, num_channels: int | None = None) -> FirstImage:
    """What the first file says, or the first after damaged arrays; see `declared_channels`.

    Args:
        num_channels: as given, which then is what an array has whose shape does not say.

    Raises:
        ValueError: an array's shape does not say, and nor does `num_channels`.
    """
    for source in images.encoded():
        try:
            channels = declared_channels(source)
        except (UnreadableImage, OSError):
            continue
        except ValueError as error:
            if num_channels is None:
                raise ValueError(f"{images.description}: {error}") from error
            channels = num_channels
        for count in (3, 4) if channels is None else (channels,):
            with contextlib.suppress(UnreadableImage):
                return FirstImage(channels, np.asarray(read_image(source, "", count, None)).dtype == np.uint8)
        return FirstImage(channels, True)  # a damaged one, or colours of 16 bits, of which 8 are read
    return FirstImage(None, True)


def find_inputs(
    images: Images | Stream,
    first: FirstImage,
    num_channels: int,
    intensity_range: str | Sequence[float] = "full",
    image_mean: str | Sequence[float] | None = None,
    image_std: str | Sequence[float] | None = None,
    seed: int = 0,
) -> tuple[Inputs, str]:
    """How a run reads and normalises images, from what it was told; all that is measured is a function of the seed.

    Args:
        first: of the images, see `first_image`.
        intensity_range: as of `read_image`, also as text (`0,4095`); or `set` for the minimum and maximum of at most
            MOST_IMAGES images, `percentiles` for 0.1 % and 99.9 %.
        image_mean, image_std: numbers, one for each channel, also as text (`0.4,0.5`); `imagenet`, or `measure` for
            those of at most MOST_IMAGES images. By default `imagenet` for photographs: 3 channels, the full range, and
            files that Pillow reads.

    Returns:
        Also a warning, empty if there is none.

    Raises:
        ValueError: an argument is wrong, no image can be read, or a channel is constant.
    """
    asked = intensity_range
    if isinstance(asked, str) and asked not in ("full", "image", "set", "percentiles"):
        asked = numbers_of("intensity_range", asked)
    spread = None
    if asked in ("set", "percentiles"):
        spread = spread_of(images.read_as(Reading(num_channels, None)), seed)
        bounds = (spread.lowest, spread.highest) if asked == "set" else (spread.low, spread.high)
        if bounds[0] >= bounds[1]:
            raise ValueError(
                f"intensity_range {asked}: the values of {images.description} go from {bounds[0]:g} to {bounds[1]:g}, "
                f"an empty range; give two numbers"
            )
        asked = [_rounded(bound) for bound in bounds]
    asked = check_intensity_range(asked)
    reading = Reading(num_channels, asked if isinstance(asked, str) else (float(asked[0]), float(asked[1])))
    images = images.read_as(reading)
    images.check_readable()
    usual = "imagenet" if reading.is_rgb and first.channels is None else "measure"
    given = {"image_mean": image_mean or usual, "image_std": image_std or usual}
    measured = dict(zip(given, mean_and_std(images, seed), strict=True)) if "measure" in given.values() else {}
    numbers = {}
    for (name, value), imagenet in zip(given.items(), (IMAGENET_MEAN, IMAGENET_STD), strict=True):
        if value == "measure":
            numbers[name] = measured[name]
        else:
            numbers[name] = imagenet if value == "imagenet" else tuple(numbers_of(name, value))
        if len(numbers[name]) != num_channels:
            raise ValueError(f"{name} has {len(numbers[name])} numbers, and the images {num_channels} channels")
    constant = [channel for channel, deviation in enumerate(numbers["image_std"], 1) if not deviation > 0]
    if constant:
        raise ValueError(
            f"image_std is {numbers['image_std'][constant[0] - 1]:g} in channel {constant[0]} of {num_channels}; give "
            f"numbers above 0, such as 1 for a channel that is constant"
        )
    inputs = Inputs(reading, numbers["image_mean"], numbers["image_std"])
    return inputs, _warning(images, seed) if asked == "full" and not first.has_8_bits else ""


def numbers_of(name: str, given: str | Sequence[float]) -> list[float]:
    """`0.4,0.5` -> [0.4, 0.5]; raises `ValueError` unless there are finite numbers only."""
    try:
        numbers = [float(part) for part in (given.split(",") if isinstance(given, str) else given)]
    except (TypeError, ValueError) as error:
        words = {"intensity_range": "full, set, percentiles, image"}.get(name, "imagenet, measure")
        raise ValueError(f"{name} {given!r:.80}; expected {words}, or numbers separated by commas") from error
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} {given!r:.80}; expected finite numbers")
    return numbers


class Spread(NamedTuple):
    """Of the values as they are stored: all of them, PERCENTILES of a part, and whether all files have 8 bits."""

    lowest: float
    highest: float
    low: float
    high: float
    full: float  # the largest value of the type: 255, 65535 or 1


def spread_of(images: Images | Stream, seed: int, count: int = MOST_IMAGES) -> Spread:
    """Of at most `count` images, of all channels together; `images` are read as they are stored."""
    parts, lowest, highest, full = [], np.inf, -np.inf, 255.0
    for index, values in _values(images, seed, count):
        lowest, highest = min(lowest, float(values.min())), max(highest, float(values.max()))
        if values.dtype != np.uint8:
            full = 1.0 if values.dtype.kind == "f" else 65535.0
        flat = values.reshape(-1)
        if len(flat) > VALUES_OF_AN_IMAGE:
            flat = flat[np.random.default_rng((seed, index)).integers(0, len(flat), VALUES_OF_AN_IMAGE)]
        parts.append(flat)
    low, high = np.percentile(np.concatenate(parts), PERCENTILES).tolist()
    return Spread(lowest, highest, low, high, full)


def mean_and_std(images: Images | Stream, seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in 0..1, of at most MOST_IMAGES images that count alike.

    Computed in float64 by one thread, and rounded to 6 digits, so that they are the same on every machine.
    """
    means, squares = [], []
    for _, values in _values(images, seed, MOST_IMAGES):
        units = values.reshape(len(values), -1).astype(np.float64) / (255 if values.dtype == np.uint8 else 1)
        means.append(units.mean(axis=1))
        squares.append((units * units).mean(axis=1))
    mean = np.mean(means, axis=0)
    variance = np.maximum(np.mean(squares, axis=0) - mean**2, 0)
    deviation = np.where(variance < 1e-12, 0, np.sqrt(variance))  # less is rounding
    return tuple(map(_rounded, mean.tolist())), tuple(map(_rounded, deviation.tolist()))


def _values(images: Images | Stream, seed: int, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """(index, (channels, height, width)) of images until there are MOST_VALUES."""
    done, seen = 0, set()
    for index, image in images.sample(seed, count):
        if index in seen:  # a stream begins again
            return
        seen.add(index)
        values = np.ascontiguousarray(to_tensor(image).numpy())
        yield index, values
        done += values.size
        if done > MOST_VALUES:
            return
    if not done:
        images.check_readable()  # which says why not
        raise ValueError(f"no image of {images.description} can be measured")


def _warning(images: Images | Stream, seed: int) -> str:
    """Says so if the values fill a small part of the full range: those of a camera with 12 bits in files of 16."""
    spread = spread_of(images.read_as(Reading(images.reading.num_channels, None)), seed, WARNING_IMAGES)
    if spread.high >= SMALL_SHARE * spread.full:
        return ""
    return f"the values reach {spread.highest:,.6g} of {spread.full:,.6g}; with intensity_range set they fill the range"


def _rounded(number: float) -> float:
    """To 6 digits."""
    return float(f"{number:.6g}")
