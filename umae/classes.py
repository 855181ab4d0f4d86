"""Labelled pictures in two splits, one to train on and one to judge by, and the classes that they share."""

from umae.data import Pictures, load_pictures, split_names


def load_labelled(
    name: str,
    config_name: str | None,
    train_split: str,
    test_split: str | None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> tuple[Pictures, Pictures, list[str]]:
    """The pictures to train on, those to judge by, and the names of the classes, see `load_pictures`.

    Args:
        test_split: None for `test`, or else `validation`.

    Raises:
        ValueError: a split is missing, both are the same, or their labels are missing or differ.
    """
    train = load_pictures(name, config_name, train_split, image_column, label_column)
    train.labels()  # a refusal that names the missing labels rather than a missing split
    test_split = test_split or _find_test_split(split_names(name, config_name))
    if test_split == train_split:
        raise ValueError(f"--train_split and --test_split are both {test_split}; a classifier is judged on others")
    test = load_pictures(name, config_name, test_split, image_column, label_column)
    return train, test, class_names(train, test)


def _find_test_split(splits: list[str]) -> str:
    for name in ("test", "validation"):
        if name in splits:
            return name
    raise ValueError(f"there is no split test or validation; name one of {', '.join(splits)} with --test_split")


def class_names(train: Pictures, test: Pictures) -> list[str]:
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
            f"classes; a class can be judged only if it was trained on"
        )
    if len(found) < 2:
        raise ValueError(f"{train.description} has the class {names[highest]} only; expected at least 2 classes")
    return names


def _listed(names: list[str] | None) -> str:
    return "plain numbers" if names is None else f"{len(names)} names ({', '.join(names[:20])})"
