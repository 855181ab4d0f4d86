"""Metrics for the evaluate library, as classes: `evaluate.load` would download them from the Hub."""

import datasets
import evaluate
import numpy as np
import torch

from umae.evaluation.accuracy import topk_accuracy
from umae.evaluation.collapse import FeatureStatistics, alignment


class TopKAccuracy(evaluate.Metric):
    """Top-1 accuracy, its mean over the classes, and top-5 accuracy as fractions in [0, 1].

    `TopKAccuracy().compute(predictions=scores.topk(5).indices, references=labels)` gives
    `{"top1": ..., "mean_class_top1": ..., "top5": ...}`; with fewer than five guesses per image there is no top5. It
    takes ranked classes, not scores, because evaluate turns all numbers into Python objects: five guesses for 60,000
    images take half a second, their 1,000 scores a minute.

    Args of compute:
        predictions: int (images, guesses), class indices, best first.
        references: int (images,), the labels, at least 0.

    Raises:
        ValueError: the shapes do not match, or predictions are not whole numbers.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of images whose label is among the k best guesses.",
            citation="",
            inputs_description=self.__doc__,
            features=datasets.Features(
                # Floats, because int64 would silently truncate scores that are passed by mistake
                {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[list[float]], references: list[int]) -> dict[str, float]:
        guesses = np.array(predictions)
        if guesses.ndim != 2 or (guesses != np.rint(guesses)).any():
            raise ValueError(
                f"predictions of shape {guesses.shape} beginning with {predictions[:1]}; expected class indices "
                "(images, guesses), best first, as scores.topk(5).indices"
            )
        return topk_accuracy(torch.from_numpy(guesses), torch.tensor(references))


class Collapse(evaluate.Metric):
    """Measures of collapse: all of `umae.evaluation.collapse.MEASURES`.

    `Collapse().compute(predictions=features)` gives `{"effective_rank": ..., "participation_ratio": ..., ...}`.

    Args of compute:
        predictions: float (images, dimensions), the features.

    Raises:
        ValueError: the features are not a matrix of finite numbers.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Effective rank, RankMe, participation ratio, uniformity and more of a matrix of features.",
            citation="",
            inputs_description=self.__doc__,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(self, predictions: list[list[float]]) -> dict[str, float]:
        statistics = FeatureStatistics()
        statistics.add(torch.tensor(predictions, dtype=torch.float64))
        return statistics.measures()


class Alignment(evaluate.Metric):
    """Alignment of the features of two views of each image, see `umae.evaluation.collapse.alignment`.

    `Alignment().compute(predictions=features, references=others)` gives `{"alignment": ...}`, from 0 (the same
    direction) to 4 (opposite directions).

    Args of compute:
        predictions, references: float (images, dimensions), of the same images in the same order.

    Raises:
        ValueError: the features are not two matrices of finite numbers, of the same shape.
    """

    def _info(self) -> evaluate.MetricInfo:
        rows = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description="Mean squared distance between the directions of paired features.",
            citation="",
            inputs_description=self.__doc__,
            features=datasets.Features({"predictions": rows, "references": rows}),
        )

    def _compute(self, predictions: list[list[float]], references: list[list[float]]) -> dict[str, float]:
        first, second = (torch.tensor(rows, dtype=torch.float64) for rows in (predictions, references))
        return {"alignment": alignment(first, second)}
