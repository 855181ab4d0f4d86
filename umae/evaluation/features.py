"""Frozen features of a data set, each image encoded exactly once on any number of processes.

umae features RUN FOLDER features.parquet
"""

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, List, Value
from torch.nn.functional import layer_norm
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BaseImageProcessor
from transformers.utils.logging import disable_progress_bar

from image_processing_umae import UnreadableImage
from modeling_umae import UMAEModel
from umae.convert import encoder_from_pretrained
from umae.data.batches import AugmentedImages, EvaluationImages
from umae.data.images import Images, load_images
from umae.data.inputs import load_processor
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


def main(argv: Sequence[str]) -> None:
    """Write the features of a folder of images to a parquet file."""
    parser = argparse.ArgumentParser(prog="umae features", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("run", help="folder of a pre-trained model, or its name on the Hub (U-MAE, ViT, ViTMAE)")
    parser.add_argument("folder", help="folder of images, or another data set, whose split `train` is read")
    parser.add_argument("out", type=Path, help="parquet file to write, with the columns file, cls and mean")
    parser.add_argument("--batch_size", type=int, default=256, help="images per batch (default 256)")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read images (default 0)")
    args = parser.parse_args(argv)
    write_features(args.run, args.folder, args.out, args.batch_size, args.num_workers)


def write_features(run: str, folder: str, out: Path, batch_size: int, num_workers: int) -> None:
    """Write the features of the images in `folder` to `out`, one row per readable image; the others are reported.

    Raises:
        ValueError: `out` cannot be written, the run or the images cannot be loaded, or no image can be read.
    """
    _check_target(out)
    if batch_size < 1 or num_workers < 0:
        raise ValueError(
            f"batch_size must be at least 1 and num_workers at least 0, got {batch_size} and {num_workers}"
        )
    accelerator = Accelerator()
    disable_progress_bar()  # transformers' own; `extract_features` shows one
    encoder = encoder_from_pretrained(run, pooling="mean")
    processor = load_processor(run, encoder.config.image_height_width)
    images = load_images(folder)
    if images.not_read:
        accelerator.print(f"not read: {images.not_read}")
    features = extract_features(
        encoder, images, processor, batch_size, num_workers, accelerator=accelerator, skip_unreadable=True
    )
    readable = features["cls"].isfinite().all(dim=1)
    kept, skipped = readable.nonzero()[:, 0].tolist(), int((~readable).sum())
    if not kept:
        raise ValueError(f"none of the {skipped} images of {images.description} can be read")
    if accelerator.is_main_process:
        columns: dict[str, list[str] | np.ndarray] = {"file": [images.name_of(index) for index in kept]}
        columns |= {name: values[readable].numpy() for name, values in features.items()}
        _write_parquet(columns, out)
        print(f"{out}: features of {len(kept)} images of {images.description}; {skipped} could not be read")


def _check_target(out: Path) -> None:
    """Raise `ValueError` unless `out` can become, or already is, a parquet file."""
    if out.suffix != ".parquet":
        raise ValueError(f"{out}: features are written as parquet; name a file that ends in .parquet")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.parent}")
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"{out}: the folder {out.parent} cannot be written to")
    if out.exists() and not (out.is_file() and out.open("rb").read(4) == b"PAR1"):
        raise ValueError(f"{out} exists and is not a parquet file; it is not overwritten, name another file")


def _write_parquet(columns: dict, out: Path) -> None:
    """Write to a temporary file first, so that `out` is complete whenever it exists."""
    vector = List(Value("float32"))
    schema = Features({"file": Value("string"), "cls": vector, "mean": vector})
    temporary = out.with_name(f"{out.name}.tmp")
    Dataset.from_dict(columns, features=schema).to_parquet(temporary)
    os.replace(temporary, out)
