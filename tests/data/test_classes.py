"""Labelled images in two splits, from data sets whose test split keeps its labels to itself."""

import re

import pytest
from training_runs import folder_of_parquet

from umae.data.classes import load_labelled
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
