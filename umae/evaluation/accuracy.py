"""The classes that a classifier sees in images, and how many of them are right."""

import math
import statistics
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor

from umae.data.batches import EvaluationImages, ignore_signals
from umae.data.images import Images

# Names of the measures in files -> in print: of images with one class each, and with any number
ONE_CLASS = {"top1": "top-1", "mean_class_top1": "mean per-class top-1", "top5": "top-5"}
SEVERAL_CLASSES = {"mAP": "mAP", "f1_micro": "micro F1", "f1_macro": "macro F1"}


def topk_accuracy(guesses: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Top-1 accuracy, its mean over the classes and, with at least five guesses per image, top-5: fractions in [0, 1].

    In `mean_class_top1`, the mean per-class accuracy or balanced accuracy, a class counts the same whether it has many
    images or few.

    Args:
        guesses: int64 (N, guesses), class indices, best first; -1 for no class.
        labels: int64 (N,), at least 0.
    """
    hits = (guesses.cpu() == labels.cpu()[:, None]).double()  # (N, guesses)
    sizes = labels.cpu().bincount()  # (classes,)
    of_classes = labels.cpu().bincount(weights=hits[:, 0])[sizes > 0] / sizes[sizes > 0]
    accuracies = {"top1": hits[:, 0].mean().item(), "mean_class_top1": of_classes.mean().item()}
    if hits.shape[1] >= 5:
        accuracies["top5"] = hits[:, :5].amax(dim=1).mean().item()
    return accuracies


def multi_label_scores(probabilities: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Mean average precision and F1 for images with any number of classes, as fractions in [0, 1].

    `mAP` and `f1_macro` are means over the classes that some image has, `f1_micro` counts all classes of all images
    alike. F1 is that of the classes with a probability of more than 0.5.

    Args:
        probabilities: float (N, C); NaN for images that cannot be read, which get the opposite of their labels.
        labels: bool (N, C), true where the image has the class; at least one does.
    """
    from sklearn.metrics import average_precision_score  # takes a second

    labels, probabilities = labels.cpu(), probabilities.cpu()
    scores = torch.where(probabilities.isnan(), (~labels).float(), probabilities)  # (N, C)
    predicted, occurs = scores > 0.5, labels.any(dim=0)
    columns = zip(labels.T[occurs].numpy(), scores.T[occurs].numpy(), strict=True)
    hits, sizes = (labels & predicted).sum(dim=0), labels.sum(dim=0) + predicted.sum(dim=0)  # (C,)
    return {
        "mAP": statistics.fmean(average_precision_score(*column) for column in columns),
        "f1_micro": (2 * hits.sum() / sizes.sum()).item(),
        "f1_macro": (2 * hits / sizes)[occurs].double().mean().item(),
    }


def percent(fraction: float | None) -> float | None:
    """A fraction in [0, 1] as percent, rounded to 2 decimals; None stays None."""
    return None if fraction is None else round(100 * fraction, 2)


def guess(
    model: nn.Module,
    images: Images,
    processor: BaseImageProcessor,
    batch_size: int,
    num_workers: int,
    num_classes: int,
    accelerator: Accelerator,
    labels: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """The most likely classes of every image, each image evaluated exactly once; every process must call this.

    Args:
        model: as prepared by the accelerator, in training mode; left in that mode.
        batch_size: images per batch and process.
        labels: int64 (N,), for the losses.

    Returns:
        On every process: int64 (N, min(5, num_classes)), class indices, best first, -1 for an image that cannot be
        read; the cross entropies, float64 (N,), NaN for those and without labels; and the error messages of those
        images.
    """
    best = min(5, num_classes)

    def measure(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        guesses, losses = logits.topk(best, dim=1).indices, torch.full((len(logits),), torch.nan, device=logits.device)
        if labels is not None:
            losses = cross_entropy(logits, labels.to(logits.device)[index], reduction="none")
        return torch.cat([guesses.float(), losses[:, None]], dim=1)  # there are no 2**24 classes

    measured, errors = _over_images(model, images, processor, batch_size, num_workers, accelerator, measure, best + 1)
    return measured[:, :best].nan_to_num(-1).long(), measured[:, best].double(), errors


def class_logits(
    model: nn.Module,
    images: Images,
    processor: BaseImageProcessor,
    batch_size: int,
    num_workers: int,
    num_classes: int,
    accelerator: Accelerator,
) -> tuple[torch.Tensor, list[str]]:
    """The logits of every image; otherwise as `guess`.

    Returns:
        On every process: float32 (N, num_classes), NaN for an image that cannot be read; and the error messages of
        those images.
    """
    return _over_images(
        model, images, processor, batch_size, num_workers, accelerator, lambda logits, index: logits, num_classes
    )


@torch.no_grad()
def _over_images(
    model: nn.Module,
    images: Images,
    processor: BaseImageProcessor,
    batch_size: int,
    num_workers: int,
    accelerator: Accelerator,
    measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    columns: int,
) -> tuple[torch.Tensor, list[str]]:
    """What `measure` makes of the logits and the indices of a batch's images: float32 (N, columns), on every process.

    NaN for images that cannot be read, whose error messages are returned, too.
    """
    count, processes = len(images), accelerator.num_processes
    batch_size = min(batch_size, math.ceil(count / processes))
    rounds = math.ceil(count / (batch_size * processes))
    # Every process has the same number of batches: the first images repeat at the end, and are cut off below
    positions = (torch.arange(rounds * processes * batch_size) % count).view(rounds, processes, batch_size)
    loader = DataLoader(
        EvaluationImages(images, processor),
        sampler=positions[:, accelerator.process_index].tolist(),
        batch_size=None,  # an element of the sampler is a whole batch
        num_workers=num_workers,
        worker_init_fn=ignore_signals if num_workers else None,
        pin_memory=accelerator.device.type == "cuda",
    )
    measured: list[torch.Tensor] = []
    errors: set[str] = set()
    model.eval()
    for batch in loader:
        of_batch = torch.full((batch_size, columns), torch.nan, device=accelerator.device)
        errors |= set(batch["errors"])
        pixel_values, rows = batch["pixel_values"], batch["rows"].to(accelerator.device)
        if pixel_values is None:  # under FSDP2 the other processes would wait for one that does not call the model
            config = accelerator.unwrap_model(model).config
            pixel_values = torch.zeros(1, config.num_channels, *config.image_height_width)
        logits = model(pixel_values.to(accelerator.device, non_blocking=True)).logits.float()
        of_batch[rows] = measure(logits[: len(rows)], batch["index"].to(accelerator.device))
        measured.append(accelerator.gather(of_batch))  # in the order of the processes, as `positions`
    model.train()
    return torch.cat(measured)[:count].cpu(), sorted(set(gather_object(list(errors))))
