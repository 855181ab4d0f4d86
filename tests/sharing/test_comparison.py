"""Groups, deviations and paired differences of runs."""

import json
import statistics

import pytest
from scipy.stats import ttest_rel

from umae.sharing.comparison import Result, compare, metrics_of_evaluation, metrics_of_run, summary


def result(seed, value, metric="linear/top1/cls", **settings):
    return Result(f"{settings},{seed}", settings, seed, {metric: value})


WITHOUT, WITH = [50.1, 51.7, 49.9, 50.6], [52.0, 52.9, 52.2, 51.1]


def groups_of_four_seeds():
    rows = [result(seed, value, uniformity_weight=0.0) for seed, value in enumerate(WITHOUT)]
    rows += [result(seed, value, uniformity_weight=0.01) for seed, value in reversed(list(enumerate(WITH)))]
    return compare(rows)


def test_means_and_deviations_are_over_the_seeds():
    without, with_term = groups_of_four_seeds()
    assert (without.seeds, with_term.seeds) == ([0, 1, 2, 3],) * 2
    assert without.mean("linear/top1/cls") == pytest.approx(statistics.mean(WITHOUT))
    assert with_term.deviation("linear/top1/cls") == pytest.approx(statistics.stdev(WITH))


def test_differences_are_paired_by_seed_with_student_s_interval():
    without, with_term = groups_of_four_seeds()
    difference = with_term.differences["linear/top1/cls"]
    low, high = ttest_rel(WITH, WITHOUT).confidence_interval(0.95)
    assert difference.mean - difference.interval == pytest.approx(low)
    assert difference.mean + difference.interval == pytest.approx(high)
    assert difference.pairs == 4
    assert not without.differences


def test_one_pair_has_a_difference_without_an_interval():
    _, group = compare([result(0, 50.0, uniformity_weight=0), result(0, 51.0, uniformity_weight=0.1)])
    difference = group.differences["linear/top1/cls"]
    assert (difference.mean, difference.interval, difference.pairs) == (1.0, None, 1)


def test_a_run_is_compared_with_the_one_that_differs_in_the_term_alone():
    rows = [
        result(0, 50.0, uniformity_weight=0, num_train_epochs=20),
        result(0, 60.0, uniformity_weight=0, num_train_epochs=100),
        result(0, 52.0, uniformity_weight=0.1, pooling="mean", num_train_epochs=20),
        result(0, 65.0, uniformity_weight=0.1, pooling="mean", num_train_epochs=100),
        result(1, 70.0, uniformity_weight=0.1, pooling="mean", num_train_epochs=100),  # without a partner
    ]
    differences = [group.differences.get("linear/top1/cls") for group in compare(rows)]
    assert [difference and (difference.mean, difference.pairs) for difference in differences] == [
        None,
        None,
        (2.0, 1),
        (5.0, 1),
    ]


def test_another_question_has_another_baseline():
    rows = [
        result(0, 50.0, model_name_or_path=None, dataset_name="cells"),
        result(0, 58.0, model_name_or_path="runs/a", dataset_name="cells"),
        result(0, 30.0, model_name_or_path=None, dataset_name="roads"),
        result(0, 31.0, model_name_or_path="runs/a", dataset_name="roads"),
    ]
    differences = [group.differences for group in compare(rows, {"model_name_or_path": None})]
    assert [difference and difference["linear/top1/cls"].mean for difference in differences] == [{}, 8.0, {}, 1.0]


def test_what_only_some_seeds_have_is_the_mean_of_those():
    rows = [result(0, 50.0, uniformity_weight=0), result(1, 9.0, "mae/top1/cls", uniformity_weight=0)]
    (group,) = compare(rows)
    metrics = summary(group)["metrics"]
    assert metrics["linear/top1/cls"] == {"mean": 50.0, "deviation": None, "runs": 1}
    assert metrics["mae/top1/cls"]["mean"] == 9.0


def test_metrics_of_a_probe_are_named_by_head_and_feature():
    accuracies = {"top1": 50.0, "top5": None}
    features = {
        name: {**accuracies, "knn20_top1": 40.0, "effective_rank": 9.5} for name in ("cls", "mean", "layer2_cls")
    }
    report = {
        **features,
        "attentive": {"top1": 60.0, "top5": 90.0},
        "low_shot": {"1%": {"cls": {"pictures": 5, "top1": 20.0, "top5": None}}},
        "protocol": {"linear_protocol": "cached"},
    }
    assert metrics_of_evaluation("linear", report) == {
        "linear/top1/cls": 50.0,
        "linear/knn20_top1/cls": 40.0,
        "linear/effective_rank/cls": 9.5,
        "linear/top1/mean": 50.0,
        "linear/knn20_top1/mean": 40.0,
        "linear/effective_rank/mean": 9.5,
        "linear/top1/layer2_cls": 50.0,
        "linear/knn20_top1/layer2_cls": 40.0,
        "linear/effective_rank/layer2_cls": 9.5,
        "linear/attentive/top1": 60.0,
        "linear/attentive/top5": 90.0,
        "linear/1% of the labels/top1/cls": 20.0,
    }
    of_mae = metrics_of_evaluation("mae", {"cls": features["cls"], "protocol": {"linear_protocol": "mae"}})
    assert of_mae == {"mae/top1/cls": 50.0}  # neighbours and ranks are those of protocol cached
    of_finetuning = metrics_of_evaluation("finetuned", {"top1": 70.0, "top5": 95.0, "protocol": {}})
    assert of_finetuning == {"finetuned/top1": 70.0, "finetuned/top5": 95.0}


def test_metrics_of_a_run_are_the_newest(tmp_path):
    lines = [
        {"step": 1, "reconstruction_loss": 1.0, "uniformity_loss": 0.9, "effective_rank_cls": 3.0},
        {"step": 2, "reconstruction_loss": 0.5, "uniformity_loss": 0.8},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert metrics_of_run(tmp_path) == {
        "pretraining/reconstruction_loss": 0.5,
        "pretraining/uniformity_loss": 0.8,
        "pretraining/effective_rank/cls": 3.0,
    }
