"""Results of runs that differ in their settings: means over seeds, and differences to the runs without the term."""

import json
import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from scipy.special import stdtrit  # scipy.stats takes most of a second to import

from umae.evaluation.accuracy import ONE_CLASS, SEVERAL_CLASSES
from umae.sharing.cards import read_metrics

# Of the last line of metrics.jsonl, or of the last that has them; these need no labels
PRETRAINING = (
    "reconstruction_loss", "heldout_reconstruction_loss", "uniformity_loss", "coding_rate_loss",
    "effective_rank_cls", "effective_rank_mean", "alignment_cls", "alignment_mean",
)  # fmt: skip
ACCURACIES = (*ONE_CLASS, *SEVERAL_CLASSES)
OF_FEATURES = ("knn20_top1", "effective_rank")  # the same whatever heads are trained
CONFIDENCE = 0.95
WITHOUT_TERM = {"uniformity_weight": 0}  # the usual baseline
# What a run without the term is the baseline of whatever they are
OF_THE_TERM = ("uniformity_weight", "pooling", "regularizer", "exact_uniformity")


@dataclass(frozen=True)
class Result:
    """What is known of one run.

    Args:
        name: of the run.
        settings: in which the runs differ, without the seed.
        values: by metric, named by `metrics_of_run` and `metrics_of_evaluation`.
    """

    name: str
    settings: Mapping[str, Any]
    seed: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Difference:
    """Of a metric, the mean over pairs of a run and its baseline, which agree in all else and in the seed.

    Args:
        interval: half the width of the 95 % confidence interval by Student's t; None for one pair, which has none.
    """

    mean: float
    interval: float | None
    pairs: int


@dataclass(frozen=True)
class Group:
    """The runs of the same settings.

    Args:
        results: of every run, in the order of their seeds.
        differences: to the baselines, by metric; empty for those themselves, and where there are none.
    """

    results: Sequence[Result]
    differences: Mapping[str, Difference]

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.results[0].settings

    @property
    def seeds(self) -> list[int]:
        return [result.seed for result in self.results]

    @cached_property
    def values(self) -> dict[str, list[float]]:
        """By metric, of every run that has it."""
        metrics = dict.fromkeys(metric for result in self.results for metric in result.values)
        return {metric: [of.values[metric] for of in self.results if metric in of.values] for metric in metrics}

    def mean(self, metric: str, seeds: Collection[int] | None = None) -> float:
        """Over all seeds or some of them."""
        return statistics.mean(
            result.values[metric]
            for result in self.results
            if metric in result.values and (seeds is None or result.seed in seeds)
        )

    def deviation(self, metric: str) -> float | None:
        """Standard deviation of the sample (n - 1); None for one seed."""
        values = self.values[metric]
        return statistics.stdev(values) if len(values) > 1 else None


def metrics_of_run(folder: Path) -> dict[str, float]:
    """The newest values of a run's log by name, such as `pretraining/effective_rank/cls`."""
    lines = read_metrics(folder)
    newest = {name: line[name] for line in lines for name in PRETRAINING if line.get(name) is not None}
    return {f"pretraining/{_with_slash(name)}": newest[name] for name in PRETRAINING if name in newest}


def metrics_of_evaluation(kind: str, report: Mapping[str, Any]) -> dict[str, float]:
    """The accuracies of a probe's or a fine-tuning's report in percent, and ranks, such as `linear/top1/cls`.

    Args:
        kind: the evaluation's name.
    """
    names: tuple[str, ...] = ACCURACIES
    if report["protocol"].get("linear_protocol") != "mae":
        names += OF_FEATURES
    found: dict[str, float | None] = {}
    for metric, feature, result in _results_in(report):
        found |= {
            "/".join(filter(None, (kind, metric, name, feature))): result[name] for name in names if name in result
        }
    return {name: value for name, value in found.items() if value is not None}


def _results_in(report: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(kind of head, feature, its results) of everything in a report; what there is one of has an empty name."""
    if "cls" not in report:
        yield "", "", report
    for feature, result in report.items():
        if feature not in ("protocol", "low_shot", "attentive") and isinstance(result, Mapping):
            yield "", feature, result
    if "attentive" in report:
        yield "attentive", "", report["attentive"]
    for share, features in report.get("low_shot", {}).items():
        for feature, result in features.items():
            yield f"{share} of the labels", feature, result


def _with_slash(name: str) -> str:
    """effective_rank_cls -> effective_rank/cls."""
    stem, _, feature = name.rpartition("_")
    return f"{stem}/{feature}" if feature in ("cls", "mean") else name


def compare(results: Sequence[Result], baseline: Mapping[str, Any] = WITHOUT_TERM) -> list[Group]:
    """The results by settings, in the order of their first runs.

    Args:
        baseline: the settings of the runs that the others are compared with.
    """
    groups: list[list[Result]] = []
    for result in results:
        for group in groups:
            if group[0].settings == result.settings:
                group.append(result)
                break
        else:
            groups.append([result])
    pairs = {_rest(result, baseline): result for result in results if _is_baseline(result, baseline)}
    return [_group(sorted(group, key=lambda result: result.seed), baseline, pairs) for group in groups]


def _group(results: Sequence[Result], baseline: Mapping[str, Any], baselines: Mapping[Any, Result]) -> Group:
    if _is_baseline(results[0], baseline):
        return Group(results, {})
    pairs = [(result, baselines.get(_rest(result, baseline))) for result in results]
    differences: dict[str, list[float]] = {}
    for result, other in pairs:
        for metric, value in result.values.items():
            if other is not None and metric in other.values:
                differences.setdefault(metric, []).append(value - other.values[metric])
    return Group(results, {metric: _difference(of_pairs) for metric, of_pairs in differences.items()})


def _difference(values: Sequence[float]) -> Difference:
    interval = None
    if len(values) > 1:
        quantile = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2))  # of Student's t distribution
        interval = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Difference(statistics.mean(values), interval, len(values))


def _is_baseline(result: Result, baseline: Mapping[str, Any]) -> bool:
    return all(name in result.settings and result.settings[name] == value for name, value in baseline.items())


def _rest(result: Result, baseline: Mapping[str, Any]) -> tuple[str, int]:
    """What a run shares with its baseline, as a key: the other settings and the seed."""
    own = {*baseline, *(OF_THE_TERM if "uniformity_weight" in baseline else ())}
    rest = {name: value for name, value in result.settings.items() if name not in own}
    return json.dumps(rest, sort_keys=True), result.seed


def summary(group: Group) -> dict[str, Any]:
    """A group as JSON has it: `{"settings": ..., "seeds": ..., "metrics": {name: {"mean": ..., ...}}}`."""
    metrics = {}
    for name in group.values:
        metrics[name] = {"mean": group.mean(name), "deviation": group.deviation(name), "runs": len(group.values[name])}
        if (difference := group.differences.get(name)) is not None:
            metrics[name] |= {
                "difference": difference.mean,
                "interval": difference.interval,
                "pairs": difference.pairs,
            }
    return {"settings": dict(group.settings), "seeds": list(group.seeds), "metrics": metrics}
