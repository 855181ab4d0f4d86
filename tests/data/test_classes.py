"""Labelled images in two splits, from data sets whose test split keeps its labels to itself."""

import re

import datasets
import pytest
from PIL import Image
from training_runs import folder_of_parquet

from umae.data.classes import class_names, load_labelled, multi_hot
from umae.data.images import held_out_splits, load_images

HIDDEN = "comes without labels (no column of them, or -1 in every row)"


def test_a_test_split_without_labels_gives_way_to_the_labelled_validation_split_and_that_is_said(tmp_path):
    name, said = folder_of_parquet(tmp_path, train=[0, 1, 1], validation=[1, 0], test=[-1, -1]), []
    train, test, names = load_labelled(name, None, "train", None, log=said.append)
    assert (len(train), test.labels().tolist(), names) == (3, [1, 0], ["a", "b"])
    assert said == [f"{tmp_path.name} (test) {HIDDEN}; {tmp_path.name} (validation) is used instead"]


def test_a_labelled_test_split_is_used_without_a_word(tmp_path):
    name, said = folder_of_parquet(tmp_path, train=[0, 1, 1], validation=[1, 0], test=[0, 1]), []
    assert load_labelled(name, None, "train", None, log=said.append)[1].labels().tolist() == [0, 1] and not said


@pytest.mark.parametrize("asked", ["test", None])
def test_no_labels_to_evaluate_with_are_refused_with_the_splits_that_there_are(tmp_path, asked):
    others = {"validation": [1, 0]} if asked else {}
    name = folder_of_parquet(tmp_path, train=[0, 1, 1], test=[None, -1], **others)
    splits = ", ".join(["train", *others, "test"])
    message = f"(test) {HIDDEN}; name a split with labels as test_split; there are {splits}"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_labelled(name, None, "train", asked)


def test_a_classifier_without_labels_is_refused():
    with pytest.raises(
        ValueError, match="label_column_name none leaves no labels, and a classifier is trained on them"
    ):
        load_labelled("digits", None, "train", None, label_column="none")


def test_what_is_trained_on_is_not_held_out():
    assert held_out_splits("digits", None, "train") == ["test"]
    assert held_out_splits("digits", None, "train+test[:10%]") == []
    assert held_out_splits("digits", None, "latest") == ["test"]


def test_a_share_of_the_images_is_held_out_the_same_one_everywhere(tmp_path):
    train, test, names = load_labelled("digits", None, "train", None, heldout="5%")
    assert (len(train), len(test)) == (1366, 72) and len(names) == 10
    assert test.description == "5% of digits (train)" and train.description == "digits (train) without 5%"
    whole = load_images("digits")
    pixels = sorted(pixels.numpy().tobytes() for pixels in whole.read_pixels(list(range(len(whole)))))
    parts = [part.read_pixels(list(range(len(part)))) for part in (train, test)]
    assert sorted(pixels.numpy().tobytes() for part in parts for pixels in part) == pixels, "each on one side"
    again = whole.hold_out(0.05)[1]
    assert again.labels().tolist() == test.labels().tolist() and len(set(test.labels().tolist())) == 10


@pytest.mark.parametrize(
    ("heldout", "test_split", "message"),
    [
        ("5", None, "heldout 5: expected a share of the images such as 5%"),
        ("a bit", None, "heldout a bit: expected a share"),
        ("0.01%", None, "heldout 0.0001 of 1438 images is 0 images; expected some, and not all"),
        ("5%", "test", "heldout 5% and test_split test: evaluate on one of them"),
    ],
)
def test_a_share_that_cannot_be_held_out_is_refused(heldout, test_split, message):
    with pytest.raises(ValueError, match=message):
        load_labelled("digits", None, "train", test_split, heldout=heldout)


def folder_of_lists(folder, feature=None, **rows_of_splits) -> str:
    for split, rows in rows_of_splits.items():
        table = datasets.Dataset.from_dict(
            {"image": [Image.new("RGB", (9, 9), (i, 99, 199)) for i in range(len(rows))], "labels": rows}
        ).cast_column("image", datasets.Image())
        table = table if feature is None else table.cast_column("labels", feature)
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


NAMED = datasets.List(datasets.ClassLabel(names=["b", "a", "c"]))


@pytest.mark.parametrize(
    ("feature", "train", "test", "names", "hot"),
    [
        (None, [["b", "c"], [], ["a"]], [["c", "a"], []], ["a", "b", "c"], [[1, 0, 1], [0, 0, 0]]),
        (None, [[0, 3], [], [1]], [[3, 1], []], ["0", "1", "2", "3"], [[0, 1, 0, 1], [0, 0, 0, 0]]),
        (NAMED, [[0, 1], [], [1]], [[2, 0], []], ["b", "a", "c"], [[1, 0, 1], [0, 0, 0]]),
        (datasets.LargeList(datasets.Value("string")), [["b"], ["a"]], [["b"], ["b"]], ["a", "b"], [[0, 1], [0, 1]]),
    ],
    ids=["names", "numbers", "class labels", "large lists"],
)
def test_lists_of_classes_have_a_one_for_each_class_of_the_image(tmp_path, feature, train, test, names, hot):
    name = folder_of_lists(tmp_path, feature, train=train, test=test)
    trained, tested, found = load_labelled(name, None, "train", None, multi_label=True)
    assert found == names and multi_hot(tested, found).int().tolist() == hot
    assert len(multi_hot(trained, found)) == len(train) and trained.multi_label


def test_a_test_split_of_empty_lists_gives_way_to_one_with_classes(tmp_path):
    name, said = folder_of_lists(tmp_path, NAMED, train=[[0], [1]], validation=[[1], []], test=[[], []]), []
    _, test, _ = load_labelled(name, None, "train", None, log=said.append, multi_label=True)
    assert test.label_lists() == [[1], []] and len(said) == 1


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([[0, 1, 0, 1]], [[1]], "holds [0, 1, 0, 1]; expected the classes of the image in a list, each once"),
        ([[0.5], [1.0]], [[1.0]], "holds [0.5]; expected"),
        ([[0], None], [[0]], "holds None; expected"),
        ([[-1, 2]], [[0]], "holds [-1, 2]; expected"),
        ([["a", None]], [["a"]], "holds ['a', None]; expected"),
        ([[0], [1]], [[0, 2]], "test (train) has classes that train (train) does not have, such as 2; every class"),
        (
            [["a"], ["b"]],
            [["c"]],
            "test (train) has classes that train (train) does not have, such as 'c'; every class",
        ),
        ([["a"], ["b"]], [[1]], "name classes differently, such as 'a' and 1; give both splits names, or both numbers"),
        ([[0], [1]], [0, 1], "train (train) has lists of classes and test (train) one class in every row"),
        ([0, 1], [[0], [1]], "test (train) has lists of classes and train (train) one class in every row"),
    ],
    ids=str,
)
def test_labels_that_are_not_the_classes_of_an_image_are_refused(tmp_path, train, test, message):
    splits = []
    for split, rows in {"train": train, "test": test}.items():  # a folder each, as their labels are of different types
        (tmp_path / split).mkdir()
        splits.append(load_images(folder_of_lists(tmp_path / split, None, train=rows)))
    with pytest.raises(ValueError, match=re.escape(message)):
        class_names(*splits)


def test_only_fine_tuning_takes_lists_of_classes(tmp_path):
    name = folder_of_lists(tmp_path, None, train=[[0], [1]], test=[[0], [1]])
    with pytest.raises(ValueError, match=r"'labels' holds lists of classes, which only fine-tuning learns; expected"):
        load_labelled(name, None, "train", None)
