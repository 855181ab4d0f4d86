"""Features of a folder of images, computed once and kept: nearest neighbours, and similar patches."""

import hashlib
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.functional import normalize

from umae.data.images import Images
from umae.demo.models import DemoModel
from umae.evaluation.features import extract_features, weights_hash
from umae.files import read_tensors, write_tensors

BATCH = 64  # images of a forward pass, or whose patches are compared at a time


@dataclass(frozen=True)
class Index:
    """The features of N readable images.

    Args:
        images: all images, also those that cannot be read.
        rows: int64 (N,), where the N are in `images`.
        features: `{"cls": (N, D), "mean": (N, D)}`, float32.
        patches: (N, patches, D), float16, of length 1.
    """

    images: Images
    rows: torch.Tensor
    features: dict[str, torch.Tensor]
    patches: torch.Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def names(self) -> list[str]:
        """Of the N images."""
        return [self.images.name_of(row) for row in self.rows.tolist()]

    def labels(self) -> list[str] | None:
        """The names of the N images' classes; None if the images have none, or not all of them."""
        if self.images.label_column is None:
            return None
        names = self.images.label_names
        with suppress(ValueError):
            labels = self.images.labels()[self.rows].tolist()
            return [names[label] if names else str(label) for label in labels]
        return None


def at_most(images: Images, count: int) -> Images:
    """At most this many of the images, spread evenly, in their order."""
    return replace(images, dataset=images.dataset.select(sorted(images.spread(count))))


def load_index(model: DemoModel, images: Images, folder: Path) -> Index:
    """The features of images, from a file in `folder` if they are there.

    The file is made again when the weights, the preprocessing or an image differ. Of image files, size and time of
    modification are compared, of others the content.

    Raises:
        ValueError: no image can be read, or the disk has no room for the features.
    """
    identity = {
        "weights": weights_hash(model.encoder),
        "preprocessing": model.processor.to_json_string(),
        "images": state_of(images),
    }
    where = str(images.folder.resolve()) if images.folder else images.description
    name = hashlib.sha256(f"{identity['weights']} {identity['preprocessing']} {where}".encode()).hexdigest()[:16]
    file = folder / f"{name}.safetensors"
    tensors = None
    if file.exists():
        with suppress(ValueError):  # of other images, or damaged
            tensors = read_tensors(file, identity)
    if tensors is None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = _encoded(model, images, folder)
        write_tensors(file, tensors, identity)
    features = {name: tensors[name] for name in ("cls", "mean")}
    return Index(images, tensors["rows"], features, tensors["patches"])


def _encoded(model: DemoModel, images: Images, scratch: Path) -> dict[str, torch.Tensor]:
    features = extract_features(model.encoder, images, model.processor, BATCH, skip_unreadable=True, tokens_in=scratch)
    rows = features["cls"].isfinite().all(dim=1).nonzero()[:, 0]
    if not len(rows):
        raise ValueError(f"none of the {len(images)} images of {images.description} can be read")
    patches = features.pop("tokens")
    for batch in patches.split(BATCH):
        batch.copy_(normalize(batch.float(), dim=-1))
    if len(rows) < len(images):
        features, patches = {name: values[rows] for name, values in features.items()}, patches[rows]
    return {"rows": rows, **features, "patches": patches}


def state_of(images: Images) -> str:
    """A hash that is another one when an image is added, removed or changed."""
    digest = hashlib.sha256()
    for source in images.encoded():
        if isinstance(source, bytes):
            digest.update(hashlib.sha256(source).digest())
            continue
        path = Path(source)
        with suppress(OSError):  # a missing file changes the hash, too
            state = path.stat()
            digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns}".encode())
        digest.update(b"\0")
    return digest.hexdigest()


def nearest(
    features: torch.Tensor, query: torch.Tensor, count: int, exclude: int | None = None
) -> list[tuple[int, float]]:
    """The images whose features have the largest cosine with the query's: (position, cosine), the largest first.

    Args:
        features: (N, D).
        query: (D,).
        exclude: position of an image to leave out, such as the query itself.
    """
    cosines = normalize(features, dim=1) @ normalize(query, dim=0)
    return _largest(cosines, count, exclude)


def similar_patches(
    patches: torch.Tensor, query: torch.Tensor, count: int, exclude: int | None = None
) -> list[tuple[int, int, float]]:
    """The images with the patches most similar to one: (position, patch, cosine), one patch of each image.

    Args:
        patches: (N, patches, D) of length 1.
        query: (D,), a patch.
        exclude: position of an image to leave out, such as the query itself.
    """
    query = normalize(query, dim=0)
    best = [(batch.float() @ query).max(dim=1) for batch in patches.split(BATCH)]
    cosines, places = torch.cat([part.values for part in best]), torch.cat([part.indices for part in best])
    return [(row, int(places[row]), cosine) for row, cosine in _largest(cosines, count, exclude)]


def _largest(cosines: torch.Tensor, count: int, exclude: int | None) -> list[tuple[int, float]]:
    if exclude is not None:
        cosines = cosines.clone()
        cosines[exclude] = -math.inf
    best = cosines.topk(min(count, len(cosines) - (exclude is not None)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def same_class(features: torch.Tensor, labels: Sequence[str]) -> float:
    """Share of the images, in 0..1, whose nearest neighbour among the others has the same label."""
    directions, hits = normalize(features, dim=1), 0
    for start in range(0, len(directions), BATCH):
        cosines = directions[start : start + BATCH] @ directions.T
        own = torch.arange(len(cosines))
        cosines[own, start + own] = -math.inf
        hits += sum(labels[start + row] == labels[other] for row, other in enumerate(cosines.argmax(1).tolist()))
    return hits / len(directions)
