"""One split of images and labels: from the Hub, a folder of images or of parquet files, or the bundled digits."""

import contextlib
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from image_processing_umae import UnreadableImage
from umae import seeding
from umae.data.decoding import RGB, Reading, read_pixels
from umae.data.folders import DATA, IMAGE_ENDINGS, files_in, holds_images, image_folder, not_read_in

NO_LABELS = "none"  # as label_column: ignore all labels
LISTS = (datasets.List, datasets.LargeList)  # features of columns whose rows are lists
SHOWN_CLASSES = 6


@dataclass(frozen=True)
class Images:
    """One split of a data set whose images are still encoded.

    Args:
        dataset: rows with the undecoded image (`{"bytes", "path"}`) and possibly a label.
        image_column: name of the image's column.
        label_column: name of the column of labels, each a class or a list of classes; None if there is none.
        description: its name in messages, without any local path: `uoft-cs/cifar10 (train)`.
        folder: the folder of the files, for a folder of images.
        not_read: number of its files with endings that are not read: `12 .heic, 3 .cr2`; empty if there are none.
        reading: channels and range of intensities that images are read with.
    """

    dataset: datasets.Dataset
    image_column: str
    label_column: str | None
    description: str
    folder: Path | None = None
    not_read: str = ""
    reading: Reading = RGB

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def num_images(self) -> int:
        return len(self)

    def read_as(self, reading: Reading) -> "Images":
        """The same images, read with other channels or another range."""
        return replace(self, reading=reading)

    def read(self, index: int) -> Image.Image | np.ndarray:
        """The image at `index`, see `read_image`; RGB by default. Raises `UnreadableImage` with the file's name."""
        ((source, name),) = self._sources([index])
        return self.reading.read(source, name)

    def read_pixels(self, indices: list[int], min_side: int | None = None) -> Iterator[torch.Tensor | UnreadableImage]:
        """The images at `indices`, (channels, height, width), uint8 or float32 as `read_image` says; large JPEGs
        possibly smaller (see `umae.data.decoding`).

        Their bytes are fetched together, then decoded one by one. For an image that cannot be read, its
        `UnreadableImage` is yielded, and the next images follow.
        """
        for source, name in self._sources(indices):
            try:
                yield read_pixels(source, name, min_side, self.reading)
            except UnreadableImage as error:
                yield error

    def hold_out(self, share: float) -> tuple["Images", "Images"]:
        """These images without a share of them, and that share: the same ones in every program, chosen at random.

        Raises:
            ValueError: no image would be left on one side.
        """
        count = round(share * len(self))
        if not 0 < count < len(self):
            raise ValueError(f"heldout {share:.4g} of {len(self)} images is {count} images; expected some, and not all")
        chosen = seeding.permutation(0, 0, len(self))[:count].sort().values
        rest = torch.ones(len(self), dtype=torch.bool)
        rest[chosen] = False
        text = f"{share:.4%}".rstrip("0%").rstrip(".") + "%"
        return (
            replace(
                self,
                dataset=self.dataset.select(rest.nonzero()[:, 0].tolist()),
                description=f"{self.description} without {text}",
            ),
            replace(self, dataset=self.dataset.select(chosen.tolist()), description=f"{text} of {self.description}"),
        )

    def sample(self, seed: int, count: int) -> Iterator[tuple[int, Image.Image | np.ndarray]]:
        """(index, image) of at most this many images, see `spread`, without those that cannot be read."""
        return self._readable(self.spread(count, seed))

    def spread(self, count: int, seed: int = 0) -> list[int]:
        """Indices of at most this many images, spread evenly since many data sets are sorted by class, in an order
        that depends on the seed."""
        count = min(count, len(self))
        return [position * len(self) // count for position in seeding.permutation(seed, 0, count).tolist()]

    def encoded(self) -> Iterator[bytes | str]:
        """The bytes or the path of one image after the other."""
        return (source for index in range(len(self)) for source, _ in self._sources([index]))

    def _readable(self, indices: Iterable[int]) -> Iterator[tuple[int, Image.Image | np.ndarray]]:
        for index in indices:
            with contextlib.suppress(UnreadableImage):
                yield index, self.read(index)

    def index_name(self, index: int) -> str:
        """An index as text, for messages."""
        return str(index)

    def fingerprint(self) -> str:
        """16 hex digits, different for other images of the same name and number: a hash of 16 evenly spread images."""
        digest = hashlib.sha256()
        indices = sorted({round(position * (len(self) - 1) / 15) for position in range(16)})
        for source, _ in self._sources(indices):
            with contextlib.suppress(OSError):  # a missing file changes the hash, too
                digest.update(source if isinstance(source, bytes) else Path(source).read_bytes())
            digest.update(b"\0")
        return digest.hexdigest()[:16]

    def check_readable(self) -> None:
        """Raise `ValueError`, with the first three errors, if no image can be read."""
        reasons = []
        for index in range(len(self)):
            (pixels,) = self.read_pixels([index])
            if isinstance(pixels, torch.Tensor):
                return
            reasons.append(str(pixels))
        raise ValueError(f"none of the {len(self)} images of {self.description} can be read: {'; '.join(reasons[:3])}")

    def _sources(self, indices: list[int]) -> Iterator[tuple[bytes | str, str]]:
        """The bytes or the path of each image, and its name in error messages."""
        for index, encoded in zip(indices, self.dataset[indices][self.image_column], strict=True):
            source = encoded["path"] if encoded["bytes"] is None else encoded["bytes"]
            yield source, self._name(index, encoded["path"])

    def name_of(self, index: int) -> str:
        """The image's file, relative to its folder, or its index in the data set (`digits (train)[17]`)."""
        return self._name(index, self.dataset[index][self.image_column]["path"])

    def _name(self, index: int, path: str | None) -> str:
        if self.folder is not None and path is not None:
            return os.path.relpath(path, self.folder)
        return f"{self.description}[{index}]" + (f" {Path(path).name}" if path else "")

    @property
    def label_names(self) -> list[str] | None:
        """The names of the classes, None if the labels are plain numbers or missing."""
        return list(self._classes.names) if isinstance(self._classes, datasets.ClassLabel) else None

    @property
    def multi_label(self) -> bool:
        """Whether the label of an image is a list of classes, possibly none or several, rather than one class."""
        return isinstance(self.dataset.features.get(self.label_column), LISTS)

    @property
    def _classes(self) -> Any:
        """The feature of the label's column, of a class in it if it holds lists."""
        feature = self.dataset.features.get(self.label_column)
        return feature.feature if isinstance(feature, LISTS) else feature

    @property
    def has_labels(self) -> bool:
        """Whether any image has a label: many test splits on the Hub have -1 in every row instead."""
        if self.label_column is None:
            return False
        return any(label not in (None, -1, []) for label in self.dataset[self.label_column][:])

    @property
    def label_summary(self) -> str:
        """The labels and their source as text: `2 classes from sub-folders: cat, dog`."""
        if self.label_column is None:
            return "none"
        source = "sub-folders" if self.folder is not None else f"column {self.label_column!r}"
        names, lists = self.label_names, "lists of " if self.multi_label else ""
        if names is None:
            return f"{lists}{getattr(self._classes, 'dtype', 'nested')} values from {source}"
        first_names = ", ".join(names[:SHOWN_CLASSES]) + (", ..." if len(names) > SHOWN_CLASSES else "")
        return f"{lists}{len(names)} classes from {source}: {first_names}"

    def labels(self) -> torch.Tensor:
        """int64 (N,). Raises `ValueError` if there are no labels, or any is missing, negative, text or a list."""
        labels = self._labels()
        if self.multi_label:
            raise ValueError(
                f"{self.description}: column {self.label_column!r} holds lists of classes, which only fine-tuning "
                f"learns; expected one class in every row; name another with label_column_name"
            )
        wrong = sorted({repr(label) for label in labels if not isinstance(label, int) or label < 0})
        if wrong:
            raise ValueError(
                f"{self.description}: column {self.label_column!r} holds {', '.join(wrong[:5])}"
                + (f" and {len(wrong) - 5} other such values" if len(wrong) > 5 else "")
                + "; expected a class of at least 0 in every row (for text see `class_encode_column` of `datasets`)"
            )
        return torch.tensor(labels, dtype=torch.int64)

    def label_lists(self) -> list[list[Any]]:
        """The classes of every image, all numbers or all names; an empty list for an image without any.

        Raises:
            ValueError: there are no labels, no image has any, or a row is no list of different classes.
        """
        labels = self._labels()
        kind = str if "string" in getattr(self._classes, "dtype", "") else int

        def fits(row: Any) -> bool:
            if not isinstance(row, list) or not all(type(label) is kind for label in row):
                return False
            return len({*row}) == len(row) and (kind is str or min(row, default=0) >= 0)

        if not all(map(fits, labels)):
            wrong = next(row for row in labels if not fits(row))
            raise ValueError(
                f"{self.description}: column {self.label_column!r} holds {str(wrong)[:100]}; expected the classes of "
                f"the image in a list, each once, all names or all numbers of at least 0 (not a vector of zeros and "
                f"ones), and an empty list for an image without any"
            )
        if not any(labels):
            raise ValueError(f"{self.description} has empty lists of classes only; expected a class in some")
        return labels

    def _labels(self) -> list:
        """The column of labels as it is; raises `ValueError` if there is none."""
        if self.label_column is None:
            raise ValueError(
                f"{self.description} has no labels: its columns are {', '.join(self.dataset.column_names)}; "
                f"name one with label_column_name, or give a folder with one sub-folder for each class"
            )
        return self.dataset[self.label_column][:]


def load_images(
    name: str,
    config_name: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
) -> Images:
    """One split of a data set.

    Args:
        name: `digits` (bundled with scikit-learn), a local folder of images (one sub-folder for each class, if there
            are classes), a local folder of parquet or other files that `datasets` reads, or a name on the Hub.
            Sub-folders with the names of splits (`umae.data.folders`) are splits if there are images nowhere else. A
            single such name among others is a class (`bus`, `car`, `train`). Several of them beside others, or any
            beside loose images only, are ambiguous: an error.
        config_name: the Hub data set's configuration.
        split: which split; for `datasets`' own formats also slices such as `train[:10%]`.
        image_column, label_column: by default the only column of the right type; the label column `none` means no
            labels, for any sub-folders and columns.

    Raises:
        ValueError: the data set, split or column does not exist or is ambiguous; the message lists those that exist.
    """
    folder = Path(name)
    if name == "digits":
        return _prepare(_pick(_digits(), split, name), image_column, label_column, f"digits ({split})")
    if folder.is_dir() and holds_images(folder):
        rows = _pick(image_folder(folder), split, name)
        images = _prepare(rows, image_column, label_column, f"folder {folder.resolve().name} ({split})", folder)
        return replace(images, not_read=not_read_in(folder))
    if folder.is_dir() and not_read_in(folder) and not any(path.suffix.lower() in DATA for path in files_in(folder)):
        raise ValueError(
            f"{name}: no images could be loaded; it holds {not_read_in(folder)}, which are not read; expected images "
            f"({', '.join(IMAGE_ENDINGS)}) or parquet files; convert them"
        )
    rows = load_split(name, config_name, split)
    return _prepare(rows, image_column, label_column, describe(name, split))


def describe(name: str, split: str) -> str:
    """A data set's name in messages: its name on the Hub, or of its folder without the path, and the split."""
    return f"{Path(name).resolve().name if Path(name).is_dir() else name} ({split})"


def comes_in_files(name: str) -> bool:
    """Whether a data set is read image by image, not in shards: the digits, a folder of images."""
    return name == "digits" or (Path(name).is_dir() and holds_images(Path(name)))


def split_names(name: str, config_name: str | None = None) -> list[str]:
    """The splits of a data set that `load_images` knows by this name."""
    if name == "digits":
        return list(_digits())
    if Path(name).is_dir() and holds_images(Path(name)):
        return list(image_folder(Path(name)))
    return datasets.get_dataset_split_names(name, config_name)


def held_out_splits(name: str, config_name: str | None, train_split: str) -> list[str]:
    """The splits to evaluate on, the usual one first: `test` and `validation`, if they exist and are not trained on."""
    trained_on = {part.partition("[")[0] for part in train_split.split("+")}  # such as `train+validation[:50%]`
    names = split_names(name, config_name)
    return [split for split in ("test", "validation") if split in names and split not in trained_on]


def load_split(name: str, config_name: str | None, split: str, streaming: bool = False):
    """`datasets.load_dataset`; its errors become a `ValueError` that lists what exists."""
    folder = Path(name)
    if not folder.is_dir() and (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ValueError(f"there is no folder {name}; give an existing folder, a name on the Hub, or `digits`")
    try:
        return datasets.load_dataset(name, config_name, split=split, streaming=streaming)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(f"there is neither a folder nor a data set on the Hub called {name!r} ({error})") from error
    except (datasets.data_files.EmptyDatasetError, ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"{name}: no images could be loaded ({error}); expected a folder with images "
            f"({', '.join(IMAGE_ENDINGS)}) or parquet files, or a name on the Hub"
        ) from error
    except ValueError as error:  # an unknown or empty split or configuration: the message lists those that exist
        raise ValueError(f"{name}, split {split!r}: {error}") from error


@cache  # several splits are loaded in a run
def _digits() -> dict[str, datasets.Dataset]:
    """The 1,797 handwritten digits of 8 x 8 pixels bundled with scikit-learn, every fifth of them in the test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype("uint8")  # 17 greys -> 0..255
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])}
    )
    rows = {}
    for split, wanted in (("train", lambda i: i % 5 != 4), ("test", lambda i: i % 5 == 4)):
        indices = [i for i in range(len(images)) if wanted(i)]
        columns = {
            "image": [{"bytes": _png(images[i]), "path": None} for i in indices],
            "label": [int(digits.target[i]) for i in indices],
        }
        rows[split] = datasets.Dataset.from_dict(columns, features=features)
    return rows


def _png(pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _pick(splits: dict[str, datasets.Dataset], split: str, name: str) -> datasets.Dataset:
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(splits)}")
    return splits[split]


def _prepare(
    rows: datasets.Dataset,
    image_column: str | None,
    label_column: str | None,
    description: str,
    folder: Path | None = None,
) -> Images:
    """The rows as `Images`: with their columns found and the images still encoded."""
    features = rows.features
    if label_column not in (None, NO_LABELS, *features):
        raise ValueError(f"{description} has no column {label_column!r}; it has {', '.join(features)}")
    image_column = find_image_column(features, image_column, description)
    if label_column is None:
        typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        candidates = typed if len(typed) == 1 else [name for name in ("label", "labels") if name in features]
        label_column = candidates[0] if candidates else NO_LABELS
    label_column = None if label_column == NO_LABELS else label_column
    if len(rows) == 0:
        raise ValueError(f"{description} holds no images")
    rows = rows.select_columns([column for column in (image_column, label_column) if column])
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
    return Images(rows, image_column, label_column, description, folder)


def find_image_column(features: Mapping[str, Any], given: str | None, description: str) -> str:
    """The given column, by default the only one of images; raises `ValueError` with the columns that exist."""
    if given is not None:
        if given not in features:
            raise ValueError(f"{description} has no column {given!r}; it has {', '.join(features)}")
        return given
    candidates = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(candidates) != 1:
        count = f"{len(candidates)} image columns" if candidates else "no image column"
        raise ValueError(
            f"{description} has {count} among {', '.join(features)}; name the one to use with image_column_name"
        )
    return candidates[0]
