"""Features of a data set in files: one parquet file, or a folder of shards that continues after an interruption.

umae features RUN IMAGES features.parquet
umae features RUN IMAGES features --patches --dtype float16 --format safetensors
"""

import argparse
import json
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from accelerate import Accelerator
from safetensors.numpy import save_file
from transformers.utils.logging import disable_progress_bar

from umae.convert import encoder_from_pretrained
from umae.data.images import load_images
from umae.data.inputs import load_processor
from umae.evaluation.features import feature_batches, frozen_features, parse_layers, weights_hash
from umae.files import write_file, write_text

SHARD_BYTES = 2**28
DESCRIPTION = "features.json"

Rows = tuple[list[str], dict[str, np.ndarray]]  # names of images, and their features by column


@dataclass(frozen=True)
class Columns:
    """What is written of every image.

    Args:
        pooled: names of features of D numbers: `cls`, `mean`, and `cls@3`, `mean@3` for a layer 3.
        num_patches: T, if the features of all patches follow, (T, D); else 0.
        width: D.
        dtype: `float32` or `float16`.
    """

    pooled: list[str]
    num_patches: int
    width: int
    dtype: str

    @property
    def names(self) -> list[str]:
        return [*self.pooled, *(["patches"] if self.num_patches else [])]

    @property
    def count(self) -> int:
        """Features of D numbers."""
        return len(self.pooled) + self.num_patches

    @property
    def bytes(self) -> int:
        """Of one image."""
        return self.count * self.width * np.dtype(self.dtype).itemsize

    @property
    def schema(self) -> pyarrow.Schema:
        """Of a parquet file."""
        vector = pyarrow.list_(pyarrow.from_numpy_dtype(self.dtype))
        fields = {"file": pyarrow.string(), **dict.fromkeys(self.pooled, vector)}
        return pyarrow.schema(fields | ({"patches": pyarrow.list_(vector)} if self.num_patches else {}))

    def split(self, encoded: np.ndarray) -> dict[str, np.ndarray]:
        """float32 (N, count, D) -> (N, D) by name, and `patches`, (N, T, D)."""
        encoded = encoded.astype(self.dtype)
        columns = {name: encoded[:, position] for position, name in enumerate(self.pooled)}
        return columns | ({"patches": encoded[:, len(self.pooled) :]} if self.num_patches else {})


def main(argv: Sequence[str]) -> None:
    """Write the features of images to files."""
    parser = argparse.ArgumentParser(prog="umae features", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("run", help="folder of a pre-trained model, or its name on the Hub (U-MAE, ViT, ViTMAE)")
    parser.add_argument("folder", help="folder of images, or another data set, whose split `train` is read")
    parser.add_argument("out", type=Path, help="parquet file to write; or a folder for shards, which can be continued")
    parser.add_argument("--layers", default="last", help="also features after these layers: `3,6` or `all`")
    parser.add_argument("--patches", action="store_true", help="also the features of all patches")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="default float32")
    parser.add_argument("--format", choices=("parquet", "safetensors"), default="parquet", help="of the shards")
    parser.add_argument("--batch_size", type=int, default=256, help="images per batch (default 256)")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read images (default 0)")
    write_features(**vars(parser.parse_args(argv)))


def write_features(
    run: str,
    folder: str,
    out: Path,
    layers: str = "last",
    patches: bool = False,
    dtype: str = "float32",
    format: str = "parquet",
    batch_size: int = 256,
    num_workers: int = 0,
) -> None:
    """Write the features of the images in `folder` to `out`, one row per readable image; the others are reported.

    A batch is in memory at a time, with safetensors a shard.

    Args:
        run, folder: the model and the images.
        out: a parquet file, or a folder for shards of SHARD_BYTES at most; those that are there are not made again.
        layers: also features after these layers, `3,6` or `all`.
        patches: also the features of all patches.
        dtype, format: of the numbers and of the shards.

    Raises:
        ValueError: `out` cannot be written or holds other features, the run or the images cannot be loaded, or no
            image can be read.
    """
    single = out.suffix == ".parquet"
    _check_file(out) if single else _check_folder(out)
    if single and format != "parquet":
        raise ValueError(f"{out}: one file is parquet; for shards of {format} name a folder")
    if batch_size < 1 or num_workers < 0:
        raise ValueError(
            f"batch_size must be at least 1 and num_workers at least 0, got {batch_size} and {num_workers}"
        )
    accelerator = Accelerator()
    disable_progress_bar()  # transformers' own; `feature_batches` shows one
    encoder = encoder_from_pretrained(run, pooling="mean")
    config = encoder.config
    numbers = parse_layers(layers, config.num_hidden_layers)
    pooled = ["cls", "mean", *(f"{name}@{layer}" for layer in numbers for name in ("cls", "mean"))]
    columns = Columns(pooled, math.prod(config.grid) if patches else 0, config.hidden_size, dtype)
    processor = load_processor(run, config.image_height_width)
    images = load_images(folder)
    if images.not_read:
        accelerator.print(f"not read: {images.not_read}")
    per_shard, targets, done = len(images), [out], 0
    if not single:
        # Whole batches, so that what continues has the same ones and the same last digits
        per_shard = batch_size * max(1, SHARD_BYTES // (batch_size * columns.bytes))
        count = math.ceil(len(images) / per_shard)
        targets = [out / f"features-{number:05}-of-{count:05}.{format}" for number in range(count)]
        identity = {
            "weights": weights_hash(encoder),
            "preprocessing": processor.to_json_string(),
            "data": images.description,
            "dataset_fingerprint": images.fingerprint(),
            "pictures": len(images),
            "columns": columns.names,
            "grid": list(config.grid),
            "dtype": dtype,
            "format": format,
            "batch_size": batch_size,
            "pictures_per_shard": per_shard,
        }
        done = _finished(out, identity, targets)
        accelerator.wait_for_everyone()  # all have looked before the first one writes
        if accelerator.is_main_process:
            out.mkdir(exist_ok=True)
            record = identity | {"versions": {name: version(name) for name in ("torch", "transformers")}}
            write_text(out / DESCRIPTION, json.dumps(record, indent=2) + "\n")
    start = min(done * per_shard, len(images))
    encode = partial(frozen_features, layers=numbers, tokens=patches)
    batches = feature_batches(
        encoder, images, processor, batch_size, num_workers, accelerator, encode, columns.count,
        range(start, len(images)), skip_unreadable=True,
    )  # fmt: skip
    begin, written = time.monotonic(), 0

    def readable(parts: Iterable[tuple[int, torch.Tensor]]) -> Iterator[Rows]:
        nonlocal written
        for first, encoded in parts:
            finite = encoded[:, 0].isfinite().all(dim=1)
            names = [images.name_of(first + row) for row in finite.nonzero()[:, 0].tolist()]
            written += len(names)
            if start == 0 and not written and first + len(encoded) == len(images):
                raise ValueError(f"none of the {len(images)} images of {images.description} can be read")
            yield names, columns.split(encoded[finite].numpy())

    write = _write_parquet if format == "parquet" else _write_safetensors
    for shard, parts in groupby(_cut(batches, start, per_shard), key=lambda part: part[0] // per_shard):
        if accelerator.is_main_process:
            write_file(targets[shard], partial(write, readable(parts), columns))
        else:
            deque(readable(parts), maxlen=0)  # encodes its share
    read, seconds = len(images) - start, time.monotonic() - begin
    there = f"{start:,} were there already, " if start else ""
    accelerator.print(
        f"{out}: features of {written:,} images of {images.description}; {there}{read - written:,} could not be read; "
        f"{read / seconds:,.0f} images/s"
    )


def _cut(batches: Iterable[torch.Tensor], start: int, per_shard: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(index of the first image, features) of parts of batches, each part in one shard."""
    for encoded in batches:
        while len(encoded):
            part = encoded[: per_shard - start % per_shard]
            yield start, part
            start, encoded = start + len(part), encoded[len(part) :]


def _write_parquet(rows: Iterable[Rows], columns: Columns, path: Path) -> None:
    with pyarrow.parquet.ParquetWriter(path, columns.schema) as writer:
        for names, values in rows:
            arrays = [pyarrow.array(names, pyarrow.string()), *map(_nested, values.values())]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=columns.schema))


def _nested(values: np.ndarray) -> pyarrow.Array:
    """(N, ..., D) as N lists of ... lists of D numbers."""
    array = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
    for size in reversed(values.shape[1:]):
        array = pyarrow.ListArray.from_arrays(np.arange(0, len(array) + 1, size, dtype=np.int32), array)
    return array


def _write_safetensors(rows: Iterable[Rows], columns: Columns, path: Path) -> None:
    parts = list(rows)
    tensors = {name: np.concatenate([values[name] for _, values in parts]) for name in columns.names}
    files = [name for names, _ in parts for name in names]
    save_file(tensors, path, metadata={"file": json.dumps(files)})


def _finished(out: Path, identity: dict[str, Any], shards: Sequence[Path]) -> int:
    """How many shards are there, from the first on; raises `ValueError` if the folder holds other features."""
    if not (out / DESCRIPTION).exists():
        return 0
    known = json.loads((out / DESCRIPTION).read_text())
    if different := [name for name, value in identity.items() if known.get(name) != value]:
        raise ValueError(f"{out} holds features with other {', '.join(different)}; give a new folder")
    return next((number for number, shard in enumerate(shards) if not shard.exists()), len(shards))


def _check_file(out: Path) -> None:
    """Raise `ValueError` unless `out` can become, or already is, a parquet file."""
    _check_parent(out)
    if out.exists() and not (out.is_file() and out.open("rb").read(4) == b"PAR1"):
        raise ValueError(f"{out} exists and is not a parquet file; it is not overwritten, name another file")


def _check_folder(out: Path) -> None:
    """Raise `ValueError` unless `out` can become, or already is, a folder of features."""
    if out.suffix and not out.is_dir():
        raise ValueError(f"{out}: name a file that ends in .parquet, or a folder, which has no ending")
    _check_parent(out)
    if out.exists() and not (out / DESCRIPTION).exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and holds no {DESCRIPTION}; give a new or empty folder")


def _check_parent(out: Path) -> None:
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.parent}")
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"{out}: the folder {out.parent} cannot be written to")
