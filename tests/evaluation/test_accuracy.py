"""How many of the classes in images a classifier finds, against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score

from umae.evaluation.accuracy import multi_label_scores


def random_case(images=200, classes=7):
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(images, classes, generator=generator) < torch.linspace(0.02, 0.7, classes)
    noise = torch.randn(images, classes, generator=generator)
    return (labels + noise - 0.3).sigmoid(), labels


@pytest.mark.parametrize("classes", [1, 7])
def test_precision_and_f1_are_scikit_learns(classes):
    probabilities, labels = random_case(classes=classes)
    scores, predicted = multi_label_scores(probabilities, labels), (probabilities > 0.5).numpy()
    columns = range(classes)
    precisions = [average_precision_score(labels[:, i].numpy(), probabilities[:, i].numpy()) for i in columns]
    assert scores["mAP"] == pytest.approx(np.mean(precisions), abs=1e-12)
    one_by_one = [f1_score(labels[:, i].numpy(), predicted[:, i]) for i in columns]
    assert scores["f1_macro"] == pytest.approx(np.mean(one_by_one), abs=1e-7)
    micro = f1_score(labels.flatten().numpy(), predicted.flatten())
    assert scores["f1_micro"] == pytest.approx(micro, abs=1e-7)
    if classes > 1:
        assert precisions != pytest.approx([scores["mAP"]] * classes)
        assert scores["mAP"] == pytest.approx(average_precision_score(labels.numpy(), probabilities.numpy()))
        assert micro == pytest.approx(f1_score(labels.numpy(), predicted, average="micro"))


def test_a_class_that_no_image_has_is_left_out_of_the_means_and_its_false_alarms_count_for_micro_f1():
    probabilities, labels = random_case()
    without = multi_label_scores(probabilities, labels)
    more = torch.cat([probabilities, torch.full((200, 1), 0.9)], dim=1)
    with_class = multi_label_scores(more, torch.cat([labels, torch.zeros(200, 1, dtype=torch.bool)], dim=1))
    assert with_class["mAP"] == without["mAP"] and with_class["f1_macro"] == without["f1_macro"]
    assert with_class["f1_micro"] < without["f1_micro"]


def test_an_image_that_cannot_be_read_counts_as_wrong_in_every_class():
    labels = torch.tensor([[True, False], [False, True], [True, True], [False, False]])
    perfect = labels.float() * 0.8 + 0.1
    assert multi_label_scores(perfect, labels) == {"mAP": 1.0, "f1_micro": 1.0, "f1_macro": 1.0}
    perfect[0] = torch.nan  # has the first class, not the second
    scores = multi_label_scores(perfect, labels)
    assert scores["f1_micro"] == pytest.approx(6 / 8)  # 3 right, one missed, one false alarm
    assert scores["mAP"] == pytest.approx(
        ((1 + 2 / 4) / 2 + 2 / 3) / 2
    )  # the two of the second class are equally likely
