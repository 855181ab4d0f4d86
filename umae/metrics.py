"""Metrics of the evaluate library as classes: evaluate.load would fetch them from the Hub."""

import datasets
import evaluate
import numpy as np


class TopKAccuracy(evaluate.Metric):
    """Share of pictures whose label is the best guess (top1) or among the five best (top5), as fractions in 0..1.

    `TopKAccuracy().compute(predictions=scores.topk(5).indices, references=labels)` gives `{"top1": ..., "top5": ...}`;
    with fewer than five guesses per picture there is no top5. It takes ranks, not scores, because evaluate turns all
    numbers into Python objects: five guesses for 60,000 pictures take half a second, their 1,000 scores a minute.

    Args of compute:
        predictions: int (pictures, guesses), class indices, best first.
        references: int (pictures,), the labels.

    Raises:
        ValueError: if the shapes do not match, or predictions are not whole numbers.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of pictures whose label is among the k best guesses.",
            citation="",
            inputs_description=self.__doc__,
            features=datasets.Features(
                # Floats, because as int64 scores passed by mistake would be cut off to whole numbers without a word.
                {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[list[float]], references: list[int]) -> dict[str, float]:
        guesses = np.array(predictions)
        if guesses.ndim != 2 or (guesses != np.rint(guesses)).any():
            raise ValueError(
                f"predictions of shape {guesses.shape} beginning with {predictions[:1]}; expected class indices "
                "(pictures, guesses), best first, as scores.topk(5).indices"
            )
        hits = guesses == np.array(references)[:, None]  # (pictures, guesses)
        return {f"top{k}": float(hits[:, :k].any(axis=1).mean()) for k in (1, 5) if k <= hits.shape[1]}
