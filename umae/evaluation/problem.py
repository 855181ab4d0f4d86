"""All that images of one class each and images of any number of classes differ in, to a classifier."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from umae.data.augmentation import soft_multi_hot, soft_targets
from umae.data.classes import multi_hot
from umae.data.images import Images
from umae.evaluation.accuracy import (
    ONE_CLASS,
    SEVERAL_CLASSES,
    class_logits,
    guess,
    multi_label_scores,
    topk_accuracy,
)


@dataclass(frozen=True)
class Problem:
    """What a classifier learns.

    Args:
        problem_type: of its configuration; None for transformers' default, one class for each image.
        metrics: names of the measures in files -> in print.
        labels: (images, names of the classes) -> the label of every image, (N,) or (N, C).
        targets: (labels of a batch, number of classes, label smoothing) -> float (batch, C).
        loss: (logits, targets) -> scalar.
        evaluate: (labels, and as keywords what `guess` takes) -> the metrics in 0..1, the mean loss of images that can
            be read, and the errors of the others.
    """

    problem_type: Literal["multi_label_classification"] | None
    metrics: Mapping[str, str]
    labels: Callable[[Images, list[str]], torch.Tensor]
    targets: Callable[[torch.Tensor, int, float], torch.Tensor]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    evaluate: Callable[..., tuple[dict[str, float], float, list[str]]]


def _top_classes(labels: torch.Tensor, **arguments: Any) -> tuple[dict[str, float], float, list[str]]:
    guesses, losses, errors = guess(**arguments, labels=labels)
    return topk_accuracy(guesses, labels), losses.nanmean().item(), errors


def _every_class(labels: torch.Tensor, **arguments: Any) -> tuple[dict[str, float], float, list[str]]:
    logits, errors = class_logits(**arguments)
    readable = ~logits[:, 0].isnan()
    loss = binary_cross_entropy_with_logits(logits[readable], labels[readable].float())
    return multi_label_scores(logits.sigmoid(), labels), loss.item(), errors


SINGLE_LABEL = Problem(
    problem_type=None,
    metrics=ONE_CLASS,
    labels=lambda images, names: images.labels(),
    targets=soft_targets,
    loss=cross_entropy,
    evaluate=_top_classes,
)
MULTI_LABEL = Problem(
    problem_type="multi_label_classification",
    metrics=SEVERAL_CLASSES,
    labels=multi_hot,
    targets=soft_multi_hot,
    loss=binary_cross_entropy_with_logits,
    evaluate=_every_class,
)
