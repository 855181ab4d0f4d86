"""Labelled images in two splits, for training and evaluation, and the names of their classes."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from umae.data.images import NO_LABELS, Images, held_out_splits, load_images, split_names
from umae.data.streaming import Stream

AnyImages = TypeVar("AnyImages", bound=Images | Stream)
UNLABELLED = "comes without labels (no column of them, or -1 in every row)"


def load_labelled(
    name: str,
    config_name: str | None,
    train_split: str,
    test_split: str | None,
    image_column: str | None = None,
    label_column: str | None = None,
    log: Callable[[str], None] = print,
    heldout: str | None = None,
    multi_label: bool = False,
) -> tuple[Images, Images, list[str]]:
    """The images for training, the images for evaluation, and the names of the classes, see `load_images`.

    Args:
        test_split: by default `test` or `validation`, the first of them that has labels.
        log: called with one line if `test` has no labels.
        heldout: the share of the training images to evaluate on instead of another split, see `parse_share`.
        multi_label: accept images with lists of classes, too.

    Raises:
        ValueError: a split is missing, both are the same, or their labels are missing or differ.
    """

    if label_column == NO_LABELS:
        raise ValueError(
            f"label_column_name {NO_LABELS} leaves no labels, and a classifier is trained on them; leave it out, or "
            f"name a column"
        )

    def load(split: str) -> Images:
        return load_images(name, config_name, split, image_column, label_column)

    train = load(train_split)
    # An error about labels comes before one about a missing split
    train.label_lists() if multi_label and train.multi_label else train.labels()
    if heldout is not None:
        if test_split is not None:
            raise ValueError(f"heldout {heldout} and test_split {test_split}: evaluate on one of them")
        train, test = train.hold_out(parse_share(heldout))
        return train, test, class_names(train, test)
    if test_split == train_split:
        raise ValueError(f"train_split and test_split are both {test_split}; use another split for evaluation")
    splits = [test_split] if test_split else held_out_splits(name, config_name, train_split)
    known = ", ".join(split_names(name, config_name))
    if not splits:
        raise ValueError(
            f"there is no split test or validation; give heldout 5% to evaluate on a share of the images, or name one "
            f"of {known} with test_split"
        )
    test = load_first_labelled(load, splits, log)
    if not test.has_labels:
        raise ValueError(f"{test.description} {UNLABELLED}; name a split with labels as test_split; there are {known}")
    return train, test, class_names(train, test)


def parse_share(text: str) -> float:
    """`5%` or `0.05` -> 0.05; raises `ValueError` unless it is above 0 and below 1."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ValueError(f"heldout {text}: expected a share of the images such as 5%")
    return share


def load_first_labelled(
    load: Callable[[str], AnyImages], splits: Sequence[str], log: Callable[[str], None]
) -> AnyImages:
    """The first split that has labels, or else the first of all; logs each split that was skipped."""
    unlabelled: list[AnyImages] = []
    for split in splits:
        images = load(split)
        if images.has_labels:
            for skipped in unlabelled:
                log(f"{skipped.description} {UNLABELLED}; {images.description} is used instead")
            return images
        unlabelled.append(images)
    return unlabelled[0]


def class_names(train: Images, test: Images) -> list[str]:
    """The names of the classes, by default their numbers. Raises `ValueError` if the classes of the splits differ."""
    names = train.label_names
    if train.multi_label != test.multi_label:
        lists, others = (train, test) if train.multi_label else (test, train)
        raise ValueError(
            f"{lists.description} has lists of classes and {others.description} one class in every row; give both "
            f"splits the same kind of labels"
        )
    if names != test.label_names:
        raise ValueError(
            f"{train.description} and {test.description} do not have the same classes: {_listed(names)} and "
            f"{_listed(test.label_names)}; give both splits the same sub-folders or class names"
        )
    if train.multi_label:
        if names is None:
            return _names_in_lists(train, test)
        for images in (train, test):
            images.label_lists()  # raises where it is not as it should be
        return names
    train_labels, highest_test = train.labels().unique().tolist(), int(test.labels().max())
    highest = train_labels[-1]
    names = names or [str(label) for label in range(highest + 1)]
    if max(highest, highest_test) >= len(names):
        raise ValueError(
            f"{test.description} has labels up to {highest_test}, {train.description} up to {highest} of {len(names)} "
            f"classes; every class of the test split must be in the training split"
        )
    if len(train_labels) < 2:
        raise ValueError(f"{train.description} has the class {names[highest]} only; expected at least 2 classes")
    return names


def _names_in_lists(train: Images, test: Images) -> list[str]:
    """The classes in lists, sorted; numbers from 0 on. Raises `ValueError` for one that is in the test split only."""
    trained, tested = ({label for row in images.label_lists() for label in row} for images in (train, test))
    if len({type(label) for label in trained | tested}) == 2:
        raise ValueError(
            f"{train.description} and {test.description} name classes differently, such as {min(trained)!r} and "
            f"{min(tested)!r}; give both splits names, or both numbers"
        )
    known = set(range(max(trained) + 1)) if isinstance(min(trained), int) else trained
    if unknown := sorted(tested - known):
        raise ValueError(
            f"{test.description} has classes that {train.description} does not have, such as "
            f"{', '.join(map(repr, unknown[:3]))}; every class of the test split must be in the training split"
        )
    return [str(name) for name in sorted(known)]


def multi_hot(images: Images, names: list[str]) -> torch.Tensor:
    """Lists of classes as bool (N, C), true where the image has the class.

    Args:
        names: of the classes, as `class_names` returns them.
    """
    position = {name: label for label, name in enumerate(names)}
    labels = torch.zeros(len(images), len(names), dtype=torch.bool)
    for row, classes in zip(labels, images.label_lists(), strict=True):
        row[[position[label] if isinstance(label, str) else label for label in classes]] = True
    return labels


def _listed(names: list[str] | None) -> str:
    return "plain numbers" if names is None else f"{len(names)} names ({', '.join(names[:20])})"
