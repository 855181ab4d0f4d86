"""Folders of images: which files are images, and which sub-folders are splits or classes."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets

# Endings of image files: those that Pillow opens without plugins, and arrays.
IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif",
    ".npy",
)  # fmt: skip

# Endings of other files in folders of images. Files with endings that are in neither list are reported.
OTHER_ENDINGS = (
    ".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".rst", ".xml", ".html", ".yaml", ".yml", ".toml", ".ini", ".log",
    ".db", ".py", ".sh", ".pdf", ".xls", ".xlsx", ".docx",
)  # fmt: skip

# Endings of files from which `datasets` may load images.
DATA = (*IMAGE_ENDINGS, ".parquet", ".arrow", ".tar", ".zip", ".gz", ".tgz", ".csv", ".tsv", ".json", ".jsonl")
KNOWN_ENDINGS = {*IMAGE_ENDINGS, *OTHER_ENDINGS}
SHOWN_ENDINGS = 5

# Names of sub-folders that are splits, not classes, and their splits.
SPLIT_FOLDERS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "validation": "validation", "valid": "validation", "val": "validation",
}  # fmt: skip


def holds_images(folder: Path) -> bool:
    """Whether a folder has image files, at any depth, and no other kind of data set at its top level."""
    for entry in folder.iterdir():
        if entry.suffix in (".parquet", ".arrow", ".tar") or entry.stem == "metadata":
            return False
    return next(image_files(folder), None) is not None


def image_files(folder: Path) -> Iterator[Path]:
    """Image files at any depth, sorted by path, hidden ones left out."""
    return (path for path in files_in(folder) if path.suffix.lower() in IMAGE_ENDINGS)


def files_in(folder: Path) -> Iterator[Path]:
    """All files at any depth, sorted by path, hidden ones left out."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(parent, name)


def not_read_in(folder: Path) -> str:
    """The number of files with each unknown ending, which are not read, as text: `12 .heic, 3 .cr2`."""
    endings = Counter(path.suffix.lower() or "without an ending" for path in files_in(folder))
    counts = [(ending, count) for ending, count in endings.most_common() if ending not in KNOWN_ENDINGS]
    texts = [f"{count:,} {ending}" for ending, count in counts[:SHOWN_ENDINGS]]
    rest = sum(count for _, count in counts[SHOWN_ENDINGS:])
    return ", ".join([*texts, f"{rest:,} others"] if rest else texts)


def image_folder(folder: Path) -> dict[str, datasets.Dataset]:
    """The splits of a folder of images.

    Not by `datasets`' own "imagefolder": that sorts files into splits by words in their names (`test_drive.jpg`) and
    reads brackets in a folder's name as a pattern.
    """
    files = list(image_files(folder))
    parts = [file.relative_to(folder).parts for file in files]
    split_of = _split_folders(parts, folder)
    images_of: dict[str, list[tuple[str, str | None]]] = {}  # split: (path, class) of its images
    for file, path in zip(files, parts, strict=True):
        split, below = (split_of[path[0]], path[1:]) if split_of else ("train", path)
        images_of.setdefault(split, []).append((str(file), below[0] if len(below) > 1 else None))
    rows = {}
    for split, images in images_of.items():
        paths, classes = map(list, zip(*images, strict=True))
        columns, features = {"image": paths}, {"image": datasets.Image(decode=False)}
        if None not in classes and len(set(classes)) > 1:
            columns["label"] = classes
            features["label"] = datasets.ClassLabel(names=sorted(set(classes)))
        rows[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return rows


def _split_folders(parts: list[tuple[str, ...]], folder: Path) -> dict[str, str]:
    """The sub-folders of `folder` that are splits, each with its split; empty if they are classes, or none.

    Args:
        parts: of the path of every image below `folder`.

    Raises:
        ValueError: they are ambiguous (see `umae.data.images.load_images`), or two of them are the same split.
    """
    tops = {path[0] for path in parts if len(path) > 1}
    loose = [path[0] for path in parts if len(path) == 1]
    named = sorted(top for top in tops if top.lower() in SPLIT_FOLDERS)
    others = sorted(tops.difference(named))
    if not named or (others and len(named) == 1):
        return {}
    if others or loose:
        beside = ", ".join(others[:5]) or f"{len(loose)} loose images such as {loose[0]}"
        raise ValueError(
            f"folder {folder}: its sub-folders {', '.join(named)} are named like splits, but {beside} beside them "
            f"belong to no split; move these elsewhere, or rename the sub-folders if they are classes"
        )
    splits: dict[str, str] = {}
    for top in named:
        split = SPLIT_FOLDERS[top.lower()]
        if split in splits.values():
            both = ", ".join(name for name in named if SPLIT_FOLDERS[name.lower()] == split)
            raise ValueError(f"folder {folder}: its sub-folders {both} are both of the split {split}; keep one of them")
        splits[top] = split
    return splits
