"""Labelled images in two splits, one to train on and one to evaluate by, and the classes that they share."""

from collections.abc import Callable, Sequence

from umae.data.images import NO_LABELS, Images, held_out_splits, load_images, split_names
from umae.data.streaming import Stream

UNLABELLED = "comes without labels (no column of them, or -1 in every row)"


def load_labelled(
    name: str,
    config_name: str | None,
    train_split: str,
    test_split: str | None,
    image_column: str | None = None,
    label_column: str | None = None,
    log: Callable[[str], None] = print,
) -> tuple[Images, Images, list[str]]:
    """The images to train on, those to evaluate by, and the names of the classes, see `load_images`.

    Args:
        test_split: None for `test` or `validation`, the first of them that has labels.
        log: prints a line, if `test` has none.

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
    train.labels()  # a refusal that names the missing labels rather than a missing split
    if test_split == train_split:
        raise ValueError(f"train_split and test_split are both {test_split}; a classifier is evaluated on others")
    splits = [test_split] if test_split else held_out_splits(name, config_name, train_split)
    known = ", ".join(split_names(name, config_name))
    if not splits:
        raise ValueError(f"there is no split test or validation; name one of {known} with test_split")
    test = load_first_labelled(load, splits, log)
    if not test.has_labels:
        raise ValueError(f"{test.description} {UNLABELLED}; name a split with labels as test_split; there are {known}")
    return train, test, class_names(train, test)


def load_first_labelled(
    load: Callable[[str], Images | Stream], splits: Sequence[str], log: Callable[[str], None]
) -> Images | Stream:
    """Of some splits the first that has labels, with a word on those before it; if none has any, simply the first."""
    unlabelled = []
    for split in splits:
        images = load(split)
        if images.has_labels:
            for other in unlabelled:
                log(f"{other.description} {UNLABELLED}; {images.description} is used instead")
            return images
        unlabelled.append(images)
    return unlabelled[0]


def class_names(train: Images, test: Images) -> list[str]:
    """The names of the classes, their numbers if they have none. Raises `ValueError` if the splits' labels differ."""
    found, highest_test = train.labels().unique().tolist(), int(test.labels().max())
    highest, names = found[-1], train.label_names
    if names != test.label_names:
        raise ValueError(
            f"{train.description} and {test.description} do not have the same classes: {_listed(names)} and "
            f"{_listed(test.label_names)}; give both splits the same sub-folders or class names"
        )
    names = names or [str(label) for label in range(highest + 1)]
    if max(highest, highest_test) >= len(names):
        raise ValueError(
            f"{test.description} has labels up to {highest_test}, {train.description} up to {highest} of {len(names)} "
            f"classes; a class can be evaluated only if it was trained on"
        )
    if len(found) < 2:
        raise ValueError(f"{train.description} has the class {names[highest]} only; expected at least 2 classes")
    return names


def _listed(names: list[str] | None) -> str:
    return "plain numbers" if names is None else f"{len(names)} names ({', '.join(names[:20])})"
