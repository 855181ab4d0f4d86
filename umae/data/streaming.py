"""Images of a data set in shards, streamed: nothing is downloaded in advance, nothing is stored on the disk.

The shards of an epoch are put in a keyed order and distributed to the readers, which are the loader's workers of all
processes; the rows of a shard are shuffled by a keyed permutation of every block of BLOCK rows. A reader's position is
therefore four numbers, its cursor, from which a run continues with the next image.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import datasets
import fsspec.asyn
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from image_processing_umae import UnreadableImage
from umae import seeding
from umae.data.batches import Plan, ignore_signals
from umae.data.crops import FLIPS, MIN_SCALE, Flips, least_side, random_crop, random_flips
from umae.data.decoding import RGB, Reading, read_pixels, stacked
from umae.data.images import comes_in_files, describe, find_image_column, load_split

BLOCK = 1024  # rows that a reader holds, still encoded: about 100 MB of ImageNet
HEAD = 64  # rows that are checked before training
ROW_BITS = 32  # an image's index is its shard * 2**32 + its row


class Cursor(NamedTuple):
    """A reader's position: epoch, position in its shards of the epoch, block of the shard, rows done of the block."""

    epoch: int
    position: int
    block: int
    done: int


START = Cursor(0, 0, 0, 0)


@dataclass(frozen=True)
class Row:
    """An encoded image, and the cursor from which the next row is read."""

    index: int
    epoch: int
    source: bytes | str
    name: str
    cursor: Cursor


@dataclass(frozen=True)
class Stream:
    """One split of a data set that is read during training.

    Args:
        dataset: rows with the undecoded image (`{"bytes", "path"}`).
        image_column: name of the image's column.
        description: its name in messages: `org/set (train)`.
        num_images: None if the data set does not say.
        reading: channels and range of intensities that images are read with.
    """

    dataset: datasets.IterableDataset
    image_column: str
    description: str
    num_images: int | None
    reading: Reading = RGB

    def read_as(self, reading: Reading) -> "Stream":
        """The same images, read with other channels or another range."""
        return replace(self, reading=reading)

    @property
    def num_shards(self) -> int:
        return self.dataset.num_shards

    @property
    def has_labels(self) -> bool:
        """False: a stream is read without labels."""
        return False

    @property
    def label_summary(self) -> str:
        """The counterpart of `Images.label_summary`."""
        return "none, a stream is read without them"

    @property
    def not_read(self) -> str:
        """The counterpart of `Images.not_read`, empty: a stream has rows, not files."""
        return ""

    def index_name(self, index: int) -> str:
        """An index as text, for messages."""
        return f"row {index % 2**ROW_BITS} of shard {index >> ROW_BITS}"

    def walk(self, seed: int, reader: int = 0, readers: int = 1, start: Cursor = START) -> Iterator[Row]:
        """One reader's rows from `start` on, epoch after epoch, without end.

        Raises:
            ValueError: an epoch of this reader holds no row.
        """
        epoch, position, first_block, done = start
        while True:
            shards = seeding.permutation(seed, epoch, self.num_shards).tolist()[reader::readers]
            has_rows = start != START and epoch == start.epoch
            for position in range(position, len(shards)):  # noqa: B020  # the first epoch begins in the middle
                for block, rows in enumerate(self._blocks(shards[position], first_block), first_block):
                    order = seeding.permutation(seed, epoch, len(rows), shards[position], block).tolist()
                    for count, row in enumerate(order[done:], done + 1):
                        index, has_rows = (shards[position] << ROW_BITS) + block * BLOCK + row, True
                        source, name = self._source(rows[row], index)
                        yield Row(index, epoch, source, name, Cursor(epoch, position, block, count))
                    done = 0
                first_block = done = 0
            if not has_rows:
                raise ValueError(f"{self.description}: the shards {shards[:5]} hold no rows")
            epoch, position = epoch + 1, 0

    def _blocks(self, shard: int, first: int) -> Iterator[list[dict]]:
        """The encoded images of a shard in blocks of BLOCK, from block `first` on."""
        rows = self.dataset.shard(self.num_shards, shard)
        rows = rows.skip(first * BLOCK) if first else rows
        for batch in rows.iter(BLOCK):  # unlike iter(rows), not split among the loader's workers again
            yield batch[self.image_column]

    def _source(self, encoded: dict, index: int) -> tuple[bytes | str, str]:
        source = encoded["path"] if encoded["bytes"] is None else encoded["bytes"]
        return source, f"{self.description}, {self.index_name(index)}"

    def _readable(self, rows: Iterable[Row], refusals: list[str]) -> Iterator[tuple[int, Image.Image | np.ndarray]]:
        for row in rows:
            try:
                yield row.index, self.reading.read(row.source, row.name)
            except UnreadableImage as error:
                refusals.append(str(error))

    def _head(self) -> list[Row]:
        """The first rows of the first shard."""
        rows = self.dataset.shard(self.num_shards, 0).iter(HEAD)
        images: list[dict] = next(rows, {self.image_column: []})[self.image_column]
        return [Row(index, 0, *self._source(encoded, index), START) for index, encoded in enumerate(images)]

    def encoded(self) -> Iterator[bytes | str]:
        """The bytes or the path of the first images, one after the other."""
        return (row.source for row in self._head())

    def check_readable(self) -> None:
        """Raise `ValueError`, with the first three errors, if none of the first HEAD images can be read."""
        refusals: list[str] = []
        if next(self._readable(self._head(), refusals), None) is None:
            raise ValueError(
                f"none of the first {len(refusals)} images of {self.description} can be read: {'; '.join(refusals[:3])}"
            )

    def sample(self, seed: int, count: int) -> Iterator[tuple[int, Image.Image | np.ndarray]]:
        """(index, image) of `count` images that can be read; the same ones for the same seed."""
        return islice(self._readable(self.walk(seed), []), count)

    def fingerprint(self) -> str:
        """16 hex digits, different for other images of the same name: a hash of the first ones and the shard count."""
        digest = hashlib.sha256(str(self.num_shards).encode())
        for row in self._head():
            digest.update(row.source if isinstance(row.source, bytes) else row.source.encode())
        return digest.hexdigest()[:16]


def load_stream(name: str, config_name: str | None, split: str, image_column: str | None) -> Stream:
    """One split of a data set that `datasets` can stream: on the Hub, or a folder of parquet, arrow or tar files.

    Raises:
        ValueError: the data set, split or column does not exist or is ambiguous; the message lists those that exist.
    """
    if comes_in_files(name):
        raise ValueError(f"{name} does not come in shards; leave out streaming")
    dataset, description = load_split(name, config_name, split, streaming=True), describe(name, split)
    column = find_image_column(dataset.features or {}, image_column, description)
    splits = dataset.info.splits or {}
    count = splits[split].num_examples if split in splits else None
    dataset = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return Stream(dataset, column, description, count or None)


class StreamedImages(torch.utils.data.IterableDataset):
    """Micro-batches of random crops of one process; each worker of the loader is a reader of its own.

    A batch is as in `TrainingImages`, but its `epoch` is int64 (batch,), and its `cursor` is (number of its reader in
    the process, that reader's `Cursor` after the batch). An image that cannot be read is left out.

    Args:
        size: (height, width) of the crops, in pixels.
        micro_batches: the numbers of the process' micro-batches in the run, from the first to read to the last.
        cursors: the position of each of its readers at the start; one cursor if the loader has no workers.
        min_scale: smallest share of an image's area in a crop.
        flips: shares of the images that `flip` names.
    """

    def __init__(
        self,
        stream: Stream,
        size: tuple[int, int],
        plan: Plan,
        rank: int,
        micro_batches: range,
        cursors: list[Cursor],
        min_scale: float = MIN_SCALE,
        flips: Flips = FLIPS,
    ):
        self.stream, self.size, self.plan, self.rank = stream, size, plan, rank
        self.micro_batches, self.cursors = micro_batches, cursors
        self.min_scale, self.flips = min_scale, flips

    def __iter__(self) -> Iterator[dict]:
        info = torch.utils.data.get_worker_info()
        if info is not None:
            fsspec.asyn.reset_lock()  # or a forked process would wait for its parent's lock
        turn, readers = info.id if info else 0, len(self.cursors)
        mine = (self.micro_batches.start + turn) % readers  # the loader always begins with its first worker
        reader = self.rank * readers + mine
        rows = self.stream.walk(self.plan.seed, reader, self.plan.processes * readers, self.cursors[mine])
        for _ in self.micro_batches[turn::readers]:
            yield self._micro_batch(rows, mine)

    def _micro_batch(self, rows: Iterator[Row], reader: int) -> dict:
        positions: list[tuple[int, int]] = []  # (index, epoch) of every crop
        crops: list[torch.Tensor] = []
        refusals: dict[int, str] = {}
        while len(crops) < self.plan.batch_size:
            row = next(rows)
            try:
                least = least_side(self.size, self.min_scale)
                pixels = read_pixels(row.source, row.name, least, self.stream.reading)
            except UnreadableImage as error:
                if row.index in refusals:  # an epoch later: this reader has no readable image
                    raise
                refusals[row.index] = str(error)
                continue
            crops.append(random_crop(pixels, self.plan.seed, row.epoch, row.index, self.size, self.min_scale))
            positions.append((row.index, row.epoch))
        index, epoch = torch.tensor(positions).unbind(1)
        return {
            "pixel_values": stacked(crops),
            "flip": random_flips(self.plan.seed, epoch, index, self.flips),
            "index": index,
            "epoch": epoch,
            "refusals": refusals,
            "cursor": (reader, row.cursor),
        }


def streaming_loader(
    stream: Stream,
    size: tuple[int, int],
    plan: Plan,
    rank: int,
    steps: range,
    cursors: list[Cursor],
    num_workers: int,
    pin_memory: bool = False,
    min_scale: float = MIN_SCALE,
    flips: Flips = FLIPS,
) -> Iterator[dict]:
    """Micro-batches of one process for `steps`; updates `cursors`, which a checkpoint saves, after each of them."""
    micro_batches = range(steps.start * plan.accumulation, steps.stop * plan.accumulation)
    loader = DataLoader(
        StreamedImages(stream, size, plan, rank, micro_batches, list(cursors), min_scale, flips),
        batch_size=None,  # an element is a whole micro-batch
        num_workers=num_workers,
        worker_init_fn=ignore_signals if num_workers else None,
        pin_memory=pin_memory,
    )
    for batch in loader:
        reader, cursors[reader] = batch.pop("cursor")
        yield batch
