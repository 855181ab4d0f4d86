import socket

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from umae.evaluation import collapse
from umae.evaluation.metrics import Alignment, Collapse, TopKAccuracy


@pytest.fixture
def accuracy(tmp_path, monkeypatch):
    """The metric in an empty working directory, its cache elsewhere, where no connection can be opened."""

    def refuse(*args):
        raise AssertionError("a metric opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return TopKAccuracy(cache_dir=tmp_path / "cache")


def test_accuracy_is_the_share_of_labels_among_the_first_guesses(accuracy):
    predictions = [[3, 1, 2, 0, 4], [1, 3, 2, 0, 4], [0, 1, 2, 4, 3], [0, 1, 2, 4, 5]]
    assert accuracy.compute(predictions=predictions, references=[3, 3, 3, 3]) == {
        "top1": 0.25, "mean_class_top1": 0.25, "top5": 0.75,
    }  # fmt: skip


def test_guesses_after_the_fifth_do_not_count(accuracy):
    values = accuracy.compute(predictions=[[0, 1, 2, 3, 4, 5], [5, 1, 2, 3, 4, 0]], references=[5, 0])
    assert values == {"top1": 0.0, "mean_class_top1": 0.0, "top5": 0.0}


def test_there_is_no_top5_of_fewer_guesses(accuracy):
    values = accuracy.compute(predictions=[[0, 1, 2, 3], [1, 0, 2, 3]], references=[0, 0])
    assert values == {"top1": 0.5, "mean_class_top1": 0.5}


def test_scores_ranked_by_torch_agree_with_scikit_learn(accuracy):
    scores = torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(20, (500,), generator=torch.Generator().manual_seed(1))
    values = accuracy.compute(predictions=scores.topk(5).indices, references=labels)
    for k in (1, 5):
        assert values[f"top{k}"] == pytest.approx(top_k_accuracy_score(labels, scores, k=k))


def test_rare_classes_count_as_much_as_others_in_the_mean_over_classes(accuracy):
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 90 + [1] * 8 + [3] * 2)
    guesses = labels.where(torch.rand(100, generator=generator) < 0.7, labels.flip(0))
    values = accuracy.compute(predictions=guesses[:, None], references=labels)  # no image is of class 2
    assert values["mean_class_top1"] == pytest.approx(balanced_accuracy_score(labels, guesses))
    assert values["mean_class_top1"] < values["top1"] - 0.05
    always = accuracy.compute(predictions=[[0]] * 100, references=labels)
    assert always == {"top1": 0.9, "mean_class_top1": pytest.approx(1 / 3)}


def test_batches_added_one_by_one_count_as_one(accuracy):
    predictions = np.random.default_rng(0).permuted(np.tile(np.arange(6), (30, 1)), axis=1)
    references = np.arange(30) % 6
    for start in range(0, 30, 8):
        accuracy.add_batch(predictions=predictions[start : start + 8], references=references[start : start + 8])
    values = accuracy.compute()
    assert values["top1"] == pytest.approx((predictions[:, 0] == references).mean())
    assert values == accuracy.compute(predictions=predictions, references=references)  # and none are left over


def test_nothing_is_left_in_the_working_directory_and_no_data_in_the_cache(accuracy, tmp_path):
    accuracy.compute(predictions=[[0]], references=[0])
    assert list((tmp_path / "work").iterdir()) == []
    assert list((tmp_path / "cache").rglob("*.arrow")) == []


@pytest.mark.parametrize("predictions", [[[0.2, 0.7, 0.1]], [[0.0, float("nan"), 1.0]]])
def test_scores_instead_of_ranks_are_refused(accuracy, predictions):
    with pytest.raises(ValueError, match=r"expected class indices \(images, guesses\), best first"):
        accuracy.compute(predictions=predictions, references=[1])


@pytest.mark.parametrize(
    ("predictions", "references"),
    [([0, 1], [0, 1]), ([[0, 1], [1, 0]], [0]), ([[0, 1], [1]], [0, 1]), ([], [])],
)
def test_shapes_that_do_not_match_are_refused(accuracy, predictions, references):
    with pytest.raises(ValueError, match=r"redictions|inhomogeneous"):
        accuracy.compute(predictions=predictions, references=references)


def test_the_collapse_metrics_are_the_measures_of_the_matrix(accuracy, tmp_path):
    features, others = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
    measures = Collapse(cache_dir=tmp_path / "cache").compute(predictions=features)
    assert measures == {name: pytest.approx(measure(features), rel=1e-9) for name, measure in collapse.MEASURES.items()}
    aligned = Alignment(cache_dir=tmp_path / "cache").compute(predictions=features, references=others)
    assert aligned == {"alignment": pytest.approx(collapse.alignment(features, others), rel=1e-12)}
    metric = Collapse(cache_dir=tmp_path / "cache")
    for batch in features.split(16):
        metric.add_batch(predictions=batch)
    assert metric.compute()["effective_rank"] == pytest.approx(collapse.effective_rank(features), rel=1e-9)


def test_the_collapse_metrics_refuse_what_is_not_finite(accuracy, tmp_path):
    with pytest.raises(ValueError, match="1 of 4 features are NaN or infinite"):
        Collapse(cache_dir=tmp_path / "cache").compute(predictions=[[1.0, 2.0], [float("nan"), 1.0]])
