"""Labelled images in two splits, for training and evaluation, and the names of their classes."""

from collections.abc import Callable, Sequence
from typing import TypeVar

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
) -> tuple[Images, Images, list[str]]:
    """The images for training, the images for evaluation, and the names of the classes, see `load_images`.

    Args:
        test_split: by default `test` or `validation`, the first of them that has labels.
        log: called with one line if `test` has no labels.
        heldout: the share of the training images to evaluate on instead of another split, see `parse_share`.

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
    if heldout is not None:
        if test_split is not None:
            raise ValueError(f"heldout {heldout} and test_split {test_split}: evaluate on one of them")
        train, test = train.hold_out(parse_share(heldout))
        return train, test, class_names(train, test)
    train.labels()  # an error about missing labels comes before one about a missing split
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
    train_labels, highest_test = train.labels().unique().tolist(), int(test.labels().max())
    highest, names = train_labels[-1], train.label_names
    if names != test.label_names:
        raise ValueError(
            f"{train.description} and {test.description} do not have the same classes: {_listed(names)} and "
            f"{_listed(test.label_names)}; give both splits the same sub-folders or class names"
        )
    names = names or [str(label) for label in range(highest + 1)]
    if max(highest, highest_test) >= len(names):
        raise ValueError(
            f"{test.description} has labels up to {highest_test}, {train.description} up to {highest} of {len(names)} "
            f"classes; every class of the test split must be in the training split"
        )
    if len(train_labels) < 2:
        raise ValueError(f"{train.description} has the class {names[highest]} only; expected at least 2 classes")
    return names


def _listed(names: list[str] | None) -> str:
    return "plain numbers" if names is None else f"{len(names)} names ({', '.join(names[:20])})"
