"""Frozen features of a data set, each image encoded exactly once on any number of processes."""

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn.functional import layer_norm
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BaseImageProcessor

from image_processing_umae import UnreadableImage
from modeling_umae import UMAEModel
from umae.data.batches import AugmentedImages, EvaluationImages
from umae.data.images import Images
from umae.progress_bar import progress_bar

Encode = Callable[[UMAEModel, torch.Tensor, torch.Tensor], torch.Tensor]


def extract_features(
    encoder: UMAEModel,
    images: Images,
    processor: BaseImageProcessor,
    batch_size: int,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    skip_unreadable: bool = False,
    layers: Sequence[int] = (),
    tokens_in: Path | None = None,
    view: int | None = None,
) -> dict[str, torch.Tensor]:
    """The features of N images, unmasked, with the encoder in evaluation mode.

    The batches are the same for any number of processes, which share them, so the features do not depend on it.

    Args:
        encoder: loaded with `pooling="mean"`, so that one pass gives both features; moved to the accelerator's device.
        images: the images to encode.
        processor: the encoder's image processor.
        batch_size: images per batch and process.
        num_workers: loader workers of each process; with 0 the process itself reads the images.
        accelerator: determines the device and the processes, all of which must call this; a new one by default.
        skip_unreadable: print the names of images that cannot be read, and set their features to NaN.
        layers: also encode after these layers, counted from 1: class token and mean of the patches, tokens normalised.
        tokens_in: also keep the patch tokens, in an unnamed file in this folder.
        view: encode random crops and flips instead of whole images, see `AugmentedImages`.

    Returns:
        `{"cls": (N, D), "mean": (N, D)}` and, for a layer 3, `cls@3` and `mean@3`, float32, on the CPU of every
        process, in the order of `images`; on the main process also `tokens`, float16 (N, T, D).

    Raises:
        UnreadableImage: an image cannot be read, and `skip_unreadable` is False.
        ValueError: features are not finite, `pooling` is not "mean", or the disk has no room for the tokens.
    """
    accelerator = accelerator or Accelerator()
    names = ["cls", "mean", *(f"{name}@{layer}" for layer in layers for name in ("cls", "mean"))]
    width, num_patches = encoder.config.hidden_size, math.prod(encoder.config.grid)
    features = {name: torch.empty(len(images), width) for name in names}
    if tokens_in is not None and accelerator.is_main_process:
        features["tokens"] = scratch_tensor(tokens_in, (len(images), num_patches, width))
    encode, start = partial(frozen_features, layers=layers, tokens=tokens_in is not None), 0
    batches = feature_batches(
        encoder, images, processor, batch_size, num_workers, accelerator, encode,
        len(names) + (num_patches if tokens_in is not None else 0), skip_unreadable=skip_unreadable, view=view,
    )  # fmt: skip
    for encoded in batches:
        stop = start + len(encoded)
        for column, name in enumerate(names):
            features[name][start:stop] = encoded[:, column]
        if "tokens" in features:
            features["tokens"][start:stop] = encoded[:, len(names) :]
        start = stop
    return features


def scratch_tensor(folder: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """A float16 tensor in an unnamed file in `folder`, which the system deletes when the process ends.

    Raises:
        ValueError: the disk has no room for it.
    """
    size = 2 * math.prod(shape)
    folder.mkdir(parents=True, exist_ok=True)
    reserve = getattr(os, "posix_fallocate", lambda file, _, size: os.truncate(file, size))  # missing on macOS
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            reserve(file.fileno(), 0, size)
        except OSError as error:
            raise ValueError(
                f"the tokens of {shape[0]:,} images take {size / 1e9:.1f} GB, and {folder} has no room for them "
                f"({error.strerror}); give a folder on another disk, or fewer images"
            ) from error
        return torch.from_numpy(np.memmap(file, np.float16, "r+", shape=shape))  # outlives the open file


def frozen_features(
    encoder: UMAEModel,
    pixel_values: torch.Tensor,
    index: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    layers: Sequence[int] = (),
    tokens: bool = False,
) -> torch.Tensor:
    """(batch, channels, height, width) -> (batch, 2 + 2 * layers + tokens, D).

    Class token and mean of the patch tokens, then both after each of `layers`, then the patch tokens.
    """
    output = encoder(pixel_values, noise=noise, output_hidden_states=bool(layers))
    pooled = [output.last_hidden_state[:, 0], output.pooler_output]
    for layer in layers:  # hidden_states begins with the embeddings
        normalised = layer_norm(output.hidden_states[layer].float(), (encoder.config.hidden_size,), eps=1e-6)
        pooled += [normalised[:, 0], normalised[:, 1:].mean(dim=1)]
    features = torch.stack(pooled, dim=1)
    return torch.cat([features, output.last_hidden_state[:, 1:]], dim=1) if tokens else features


def feature_batches(
    encoder: UMAEModel,
    images: Images,
    processor: BaseImageProcessor,
    batch_size: int,
    num_workers: int,
    accelerator: Accelerator,
    encode: Encode = frozen_features,
    num_features: int = 2,
    indices: Sequence[int] | None = None,
    skip_unreadable: bool = False,
    view: int | None = None,
) -> Iterator[torch.Tensor]:
    """What `encode` returns for the images, in their order, one batch of every process at a time.

    Args:
        encode: (encoder, pixel_values, indices int64 (batch,)) -> (batch, num_features, D); called without gradients.
        num_features: features per image that `encode` returns.
        indices: which images; all by default.
        view: encode random crops and flips instead of whole images, see `AugmentedImages`.

    Yields:
        (images, num_features, D), float32, on the CPU of every process; NaN for an image that cannot be read.
    """
    if encoder.config.pooling != "mean":
        raise ValueError('the encoder must be loaded with pooling="mean", then one pass gives both features')
    encoder.to(accelerator.device).eval()
    indices = range(len(images)) if indices is None else indices
    count, processes = len(indices), accelerator.num_processes
    batches = [indices[first : first + batch_size] for first in range(0, count, batch_size)]
    dataset: EvaluationImages | AugmentedImages = EvaluationImages(images, processor)
    if view is not None:
        dataset = AugmentedImages(images, processor, view, encoder.config.image_height_width)
    loader = DataLoader(
        dataset,
        sampler=batches[accelerator.process_index :: processes],
        batch_size=None,  # an element of the sampler is a whole batch
        num_workers=num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    loaded = iter(loader)
    bar = progress_bar(total=count, desc=images.description, unit="image", disable=not accelerator.is_main_process)
    for start in range(0, count, batch_size * processes):
        shape = (batch_size, num_features, encoder.config.hidden_size)
        encoded = torch.full(shape, torch.nan, device=accelerator.device)
        if (batch := next(loaded, None)) is not None:  # in the last round some processes have no batch
            _report_unreadable(batch["errors"], skip_unreadable)
            if batch["pixel_values"] is not None:
                encoded[batch["rows"]] = _encode(encoder, encode, batch["pixel_values"], batch["index"])
        gathered = accelerator.gather(encoded)[: count - start].cpu()  # in the order of the batches
        yield gathered
        bar.update(len(gathered))
    bar.close()


@torch.inference_mode()
def _encode(encoder: UMAEModel, encode: Encode, pixel_values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    encoded = encode(encoder, pixel_values.to(encoder.device, non_blocking=True), index.to(encoder.device)).float()
    if not encoded.isfinite().all():
        raise ValueError("the encoder's features are not finite; check that its weights are")
    return encoded


def _report_unreadable(errors: Sequence[str], skip: bool) -> None:
    for error in errors:
        if not skip:
            raise UnreadableImage(error)
        tqdm.write(f"skipped: {error}")


def parse_layers(text: str, count: int) -> list[int]:
    """`3,6` -> [3, 6]; `all` -> all but the last, which is always evaluated; `last` -> []."""
    if text in ("last", "all"):
        return list(range(1, count)) if text == "all" else []
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 1 <= int(word) < count for word in words):
        raise ValueError(
            f"layers {text}: expected `last`, `all`, or numbers from 1 to {count - 1} separated by commas; the "
            f"encoder has {count} layers and its last is always evaluated"
        )
    return sorted({int(word) for word in words})


def weights_hash(encoder: UMAEModel) -> str:
    """SHA-256 of the weights, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
