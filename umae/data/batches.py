"""Batches of images: which images every process gets at every step, and the data sets that read them.

The order of the images is a pure function of (seed, epoch, step, rank), and a crop is one of (seed, epoch, index), so
a run resumes at step N with the same batches, and the number of workers or processes changes nothing.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor

from image_processing_umae import UnreadableImage
from umae import seeding
from umae.data.crops import (
    CROP_NUMBERS,
    FLIPS,
    MIN_SCALE,
    Flips,
    least_side,
    random_crop,
    random_flips,
    random_resized_crop,
)
from umae.data.decoding import reading_of, stacked
from umae.data.images import Images
from umae.data.inputs import flipped_and_normalized
from umae.progress_bar import progress_bar

Augment = Callable[[list[torch.Tensor], int, torch.Tensor], list[torch.Tensor]]
MEMORY_LIMIT = 2**30  # bytes of decoded images that a process keeps in memory
CROP_SCALE = 0.08  # smallest share of an image's area in the crops that probes are trained on


@dataclass(frozen=True)
class Plan:
    """Which images every process gets at every step; a pure function of the numbers below.

    An epoch is a keyed permutation of the images, split into micro-batches of `batch_size * processes`; images that do
    not fill a whole optimiser step are left out (different ones in every epoch). The same global micro-batch goes to
    one process or is shared by several.

    Args:
        images: images of the data set.
        batch_size: images of a micro-batch on one process.
        accumulation: micro-batches of an optimiser step.
        processes: how many processes there are.
        seed: of the run.
    """

    images: int
    batch_size: int
    accumulation: int
    processes: int
    seed: int

    @property
    def images_per_step(self) -> int:
        """The effective batch: images of one optimiser step on all processes."""
        return self.batch_size * self.accumulation * self.processes

    @property
    def steps_per_epoch(self) -> int:
        """Whole optimiser steps in an epoch."""
        return self.images // self.images_per_step

    def micro_batches(self, rank: int, start_step: int, stop_step: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(epoch, indices of `batch_size` images) for one process, `accumulation` of them for every step."""
        order: torch.Tensor | None = None
        order_epoch = -1
        for step in range(start_step, stop_step):
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            if order is None or epoch != order_epoch:
                order, order_epoch = seeding.permutation(self.seed, epoch, self.images), epoch
            for micro in range(step_of_epoch * self.accumulation, (step_of_epoch + 1) * self.accumulation):
                first = (micro * self.processes + rank) * self.batch_size
                yield epoch, order[first : first + self.batch_size]


def check_fills_a_step(plan: Plan, description: str) -> None:
    """Raise `ValueError` if there are fewer images than an optimiser step takes."""
    if plan.steps_per_epoch == 0:
        raise ValueError(
            f"{description} holds {plan.images} images, fewer than one step of {plan.images_per_step} "
            f"({plan.batch_size} per device x {plan.processes} processes x {plan.accumulation} accumulated); lower "
            f"per_device_train_batch_size"
        )


@dataclass(frozen=True)
class Decoded:
    """Images of one size, in memory.

    Args:
        pixels: (N, channels, height, width), uint8, or float32 in 0..1.
        refusals: the errors of the images that cannot be read, by index.
    """

    pixels: torch.Tensor
    refusals: dict[int, UnreadableImage]


def decode_all(images: Images, show_progress: bool = True) -> Decoded | None:
    """A small data set (CIFAR, digits) decoded into memory, which makes cropping three times faster than from files.

    Returns None if the images differ in size or in their type, or together exceed MEMORY_LIMIT.
    """
    pixels: torch.Tensor | None = None
    refusals: dict[int, UnreadableImage] = {}
    for start in progress_bar(
        range(0, len(images), 256), "decoding", unit="batch", leave=False, disable=not show_progress
    ):
        indices = list(range(start, min(start + 256, len(images))))
        for index, image in zip(indices, images.read_pixels(indices), strict=True):
            if isinstance(image, UnreadableImage):
                refusals[index] = image
                continue
            if pixels is None:
                if len(images) * image.nbytes > MEMORY_LIMIT:
                    return None
                pixels = torch.zeros(len(images), *image.shape, dtype=image.dtype)
            if image.shape != pixels.shape[1:] or image.dtype != pixels.dtype:
                return None
            pixels[index] = image
    return None if pixels is None else Decoded(pixels, refusals)


class TrainingImages(torch.utils.data.Dataset):
    """Random crops of images, indexed by a whole micro-batch: (epoch, indices int64 (batch,)).

    A batch is `{"pixel_values": (batch, channels, height, width), "flip": bool (batch, 2), "index": int64 (batch,),
    "epoch": int, "refusals": {index: error message}}`. Pixels are uint8, or float32 in 0..1 where an image is not of 8
    bits at the full range; they are flipped and normalised later, on the device. An image that cannot be read is
    replaced by the next readable one in the epoch's order, the same one in every process and worker.

    Args:
        size: (height, width) of the crops, in pixels.
        decoded: the images in memory, if `decode_all` returned them.
        min_scale: smallest share of an image's area in a crop.
        flips: shares of the images that `flip` names.
        augment: (crops, epoch, indices int64 (batch,)) -> crops, applied after cropping; of the same type after.
    """

    def __init__(
        self,
        images: Images,
        size: tuple[int, int],
        seed: int,
        decoded: Decoded | None = None,
        min_scale: float = MIN_SCALE,
        augment: Augment | None = None,
        flips: Flips = FLIPS,
    ):
        self.images, self.size, self.seed, self.decoded = images, size, seed, decoded
        self.min_scale, self.augment, self.flips = min_scale, augment, flips

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, micro_batch: tuple[int, torch.Tensor]) -> dict:
        epoch, indices = micro_batch
        numbers = seeding.uniform(self.seed, seeding.CROP, epoch, indices, CROP_NUMBERS)
        used_indices, crops = indices.tolist(), []
        refusals: dict[int, UnreadableImage] = {}
        for position, pixels in enumerate(self._read(used_indices.copy())):
            if isinstance(pixels, UnreadableImage):
                used, pixels = self._next_readable(epoch, used_indices[position], pixels, refusals)
                used_indices[position] = used
                crops.append(random_crop(pixels, self.seed, epoch, used, self.size, self.min_scale))
            else:
                crops.append(random_resized_crop(pixels, numbers[position], self.size, (self.min_scale, 1.0)))
        index = torch.tensor(used_indices)
        return {
            "pixel_values": stacked(crops if self.augment is None else self.augment(crops, epoch, index)),
            "flip": random_flips(self.seed, epoch, index, self.flips),
            "index": index,
            "epoch": epoch,
            "refusals": {index: str(error) for index, error in refusals.items()},
        }

    def _read(self, indices: list[int]) -> Iterator[torch.Tensor | UnreadableImage]:
        if self.decoded is None:
            return self.images.read_pixels(indices, least_side(self.size, self.min_scale))
        return (self.decoded.refusals.get(index, self.decoded.pixels[index]) for index in indices)

    def _next_readable(
        self, epoch: int, index: int, pixels: torch.Tensor | UnreadableImage, refusals: dict[int, UnreadableImage]
    ) -> tuple[int, torch.Tensor]:
        """The first readable image after `index` in the epoch's order; adds the others to `refusals`."""
        order = seeding.permutation(self.seed, epoch, len(self)).tolist()
        position = order.index(index)
        while isinstance(pixels, UnreadableImage):
            refusals[index] = pixels
            if len(refusals) == len(self):
                raise pixels
            position = (position + 1) % len(order)
            index = order[position]
            (pixels,) = self._read([index])
        return index, pixels


def ignore_signals(worker: int = 0) -> None:
    """Ignore SIGINT and SIGTERM in a worker: Ctrl-C is sent to it, too, but it ends with the training process."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def training_loader(
    dataset: TrainingImages,
    plan: Plan,
    rank: int,
    start_step: int,
    stop_step: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Micro-batches of one process from `start_step` on. One iterator is the whole run, so workers start only once."""
    return DataLoader(
        dataset,
        sampler=plan.micro_batches(rank, start_step, stop_step),
        batch_size=None,  # an element of the sampler is a whole micro-batch
        num_workers=num_workers,
        worker_init_fn=ignore_signals if num_workers else None,
        pin_memory=pin_memory,
    )


class EvaluationImages(torch.utils.data.Dataset):
    """Images after the image processor, indexed by a whole batch of indices.

    A batch is `{"pixel_values": (readable, channels, height, width), "index": int64 (readable,), "rows": int64
    (readable,), "errors": [str]}`: `rows` are the positions of the readable images in the batch, and `errors` name the
    others. (An exception in a worker would arrive with two tracebacks.)
    """

    def __init__(self, images: Images, processor: BaseImageProcessor):
        self.images, self.processor = images.read_as(reading_of(processor)), processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Sequence[int]) -> dict:
        images: list[Any] = []
        readable, errors = [], []
        for row, index in enumerate(indices):
            try:
                images.append(self.images.read(index))
                readable.append(row)
            except UnreadableImage as error:
                errors.append(str(error))
        if not hasattr(self.processor, "intensity_range") and any(isinstance(image, np.ndarray) for image in images):
            raise ValueError(
                f"{type(self.processor).__name__} does not read arrays as training does; use load_processor"
            )
        pixel_values = self.processor(images=images, return_tensors="pt")["pixel_values"] if images else None
        rows = torch.tensor(readable, dtype=torch.int64)
        return {"pixel_values": pixel_values, "index": torch.tensor(indices)[rows], "rows": rows, "errors": errors}


class AugmentedImages(torch.utils.data.Dataset):
    """Random resized crops and flips of images, drawn as in `TrainingImages`, in batches like `EvaluationImages`.

    Args:
        processor: of transformers, with `image_mean` and `image_std`.
        view: number of the augmentation; the same number gives the same pixels.
        size: (height, width) of the crops, in pixels.
    """

    def __init__(self, images: Images, processor: Any, view: int, size: tuple[int, int]):
        images = images.read_as(reading_of(processor))
        self.crops = TrainingImages(images, size, seed=0, min_scale=CROP_SCALE)
        self.view, self.processor = view, processor

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, indices: Sequence[int]) -> dict:
        batch = self.crops[self.view, torch.tensor(indices)]
        mean, std = self.processor.image_mean, self.processor.image_std
        pixel_values = flipped_and_normalized(batch, torch.device("cpu"), mean, std)
        rows, errors = torch.arange(len(indices)), list(batch["refusals"].values())
        return {"pixel_values": pixel_values, "index": batch["index"], "rows": rows, "errors": errors}
