"""Linear probing and k-NN classification: pure functions of feature matrices.

Shapes: N images, D the width of their features, C classes, H heads, V views (augmentations) of every image. Everything
runs on the device of the features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from umae.progress_bar import progress_bar
from umae.training.schedules import learning_rate_at

LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
WEIGHT_DECAYS = (0.0, 1e-4, 1e-3)
EPOCHS = 100
BATCH_SIZE = 1024
MOMENTUM = 0.9
INIT_STD = 0.01
EPSILON = 1e-6  # of the standardisation, as in MAE's probe
HELD_OUT = 0.1  # share of the training images on which learning rate and weight decay are chosen
BLOCK = 2**26  # cosines that k-NN holds in memory at once, 256 MB

# The cached linear protocol, for reports
LINEAR_PROTOCOL = {
    "standardisation": f"per feature, mean and variance of the training set, epsilon {EPSILON:g}",
    "optimiser": f"SGD, momentum {MOMENTUM}, learning rate by half a cosine to 0",
    "initialisation": f"weights normal with standard deviation {INIT_STD}, biases 0",
    "epochs": EPOCHS,
    "batch_size": f"{BATCH_SIZE}, or a sixteenth of the training images if that is less",
    "learning_rates": list(LEARNING_RATES),
    "weight_decays": list(WEIGHT_DECAYS),
    "selection": f"best top-1 on {HELD_OUT:.0%} of the training images, held out at random (of equal ones the lowest "
    "cross entropy); then trained again with that learning rate and weight decay on all training images",
}


@dataclass(frozen=True)
class LinearHead:
    """A linear classifier of raw features: `features @ weight.T + bias` are the logits.

    Args:
        weight: (C, D), the standardisation of the features folded in.
        bias: (C,).
        chosen: the settings chosen on held-out training images, and their accuracy on them, in [0, 1].
    """

    weight: torch.Tensor
    bias: torch.Tensor
    chosen: dict[str, float]

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, C), the logits."""
        return features @ self.weight.T + self.bias


def train_linear_heads(
    features: dict[str, torch.Tensor],
    labels: torch.Tensor,
    num_classes: int,
    seed: int,
    device: torch.device | None = None,
) -> dict[str, LinearHead]:
    """A linear classifier of each feature (`cls`, `mean`, ...), with the best learning rate and weight decay.

    For each feature, one head per learning rate and weight decay is trained on 90 % of the images, all heads at once
    (as in DINOv2's evaluation, Oquab et al. 2023). The setting that is best on the other 10 % is then trained on all
    images. The same arguments give bit-identical results on the same device, and a feature's head does not depend on
    what other features there are.

    Args:
        features: (V, N, D) by name: of the images, and of V - 1 augmentations of them, used in turn from epoch to
            epoch. Held-out images are evaluated without augmentation.
        labels: int64 (N,), in [0, num_classes).
        num_classes: C.
        seed: of the held-out images, the initial weights and the order of the images.
        device: to compute on, one feature after the other, as each may fill its memory; by default that of each.

    Raises:
        ValueError: fewer than 2 classes or images, labels outside of [0, C), features that are not finite.
    """
    for views in features.values():
        for view in views:
            _check(view, labels, num_classes)
    heads = {}
    for name, views in features.items():
        views = views.to(device or views.device)
        heads[name] = _train_linear_head(views, labels.to(views.device), num_classes, seed, name)
    return heads


def _train_linear_head(views: torch.Tensor, labels: torch.Tensor, num_classes: int, seed: int, name: str) -> LinearHead:
    generator = torch.Generator().manual_seed(seed)
    held_out, rest = (rows.to(labels.device) for rows in split_off(len(labels), generator))
    grid = [(rate, decay) for rate in LEARNING_RATES for decay in WEIGHT_DECAYS]
    weights, biases = train_heads(
        views[:, rest], labels[rest], num_classes, grid, generator, f"choosing a linear head, {name}"
    )
    logits = views[0, held_out] @ weights.transpose(1, 2) + biases[:, None]  # (H, held out, C)
    best, top1 = best_head(logits, labels[held_out])
    weights, biases = train_heads(
        views, labels, num_classes, grid[best : best + 1], generator, f"training a linear head, {name}"
    )
    chosen = {"learning_rate": grid[best][0], "weight_decay": grid[best][1], "validation_top1": top1}
    return LinearHead(weights[0], biases[0], chosen)


def train_heads(
    views: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    settings: Sequence[tuple[float, float]],
    generator: torch.Generator,
    description: str = "training linear heads",
) -> tuple[torch.Tensor, torch.Tensor]:
    """H heads on one feature, trained side by side: weights (H, C, D) and biases (H, C).

    Args:
        views: (V, N, D); every epoch uses one of the V views.
        settings: learning rate and weight decay of each head.
        generator: draws the initial weights, the same for all heads, and the order of the images.
        description: of the progress bar.
    """
    (num_views, count, width), num_heads = views.shape, len(settings)
    device, dtype = views.device, views.dtype
    variance, mean = torch.var_mean(views, dim=(0, 1), correction=0)
    scale = (variance + EPSILON).rsqrt()

    weight = INIT_STD * torch.randn(width, num_classes, generator=generator)
    weight = weight.to(device, dtype).repeat(1, num_heads)  # (D, H * C)
    bias = torch.zeros(num_heads * num_classes, device=device, dtype=dtype)
    weight_momentum, bias_momentum = torch.zeros_like(weight), torch.zeros_like(bias)
    rates, decays = torch.tensor(settings, device=device, dtype=dtype).repeat_interleave(num_classes, 0).unbind(-1)
    batch_size = min(BATCH_SIZE, max(count // 16, 1))
    steps = EPOCHS * math.ceil(count / batch_size)
    step, bar = 0, progress_bar(total=steps, desc=description, unit="step")
    for epoch in range(EPOCHS):
        for batch in torch.randperm(count, generator=generator).to(device).split(batch_size):
            inputs = (views[epoch % num_views, batch] - mean) * scale  # (B, D)
            logits = torch.addmm(bias, inputs, weight).unflatten(1, (num_heads, num_classes))  # (B, H, C)
            error = cross_entropy_gradient(logits, labels[batch, None]).flatten(1)  # (B, H * C)
            weight_momentum.mul_(MOMENTUM).addmm_(inputs.T, error).addcmul_(decays, weight)
            bias_momentum.mul_(MOMENTUM).add_(error.sum(dim=0))
            rate = rates * learning_rate_at(step, steps, 0, 1.0)
            weight -= rate * weight_momentum
            bias -= rate * bias_momentum
            step += 1
            bar.update()
    bar.close()
    weight = weight.unflatten(1, (num_heads, num_classes)).permute(1, 2, 0) * scale  # for raw features
    return weight, bias.view(num_heads, num_classes) - (weight * mean).sum(dim=-1)


def cross_entropy_gradient(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Gradient of the mean cross entropy with respect to the logits: `(softmax(logits) - one_hot(labels)) / images`.

    Args:
        logits: (..., C).
        labels: int64, (images, ...), broadcastable to the logits' shape without C.
    """
    error = logits.softmax(dim=-1)
    index = labels.expand(error.shape[:-1])[..., None]
    return error.scatter_add_(-1, index, torch.full_like(error[..., :1], -1)) / len(labels)


def split_off(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random indices int64 of the held-out images, a share `HELD_OUT` but at least one, and of the others."""
    order = torch.randperm(count, generator=generator)
    held_out, rest = order.tensor_split([max(round(HELD_OUT * count), 1)])
    return held_out, rest


def best_head(logits: torch.Tensor, labels: torch.Tensor) -> tuple[int, float]:
    """(H, N, C) -> index of the head with the best top-1 (ties: the lowest cross entropy), and its top-1."""
    top1 = (logits.argmax(dim=-1) == labels).float().mean(dim=1)  # (H,)
    likelihood = logits.log_softmax(dim=-1).gather(2, labels.expand(len(logits), -1)[..., None]).mean(dim=(1, 2))
    best = max(range(len(logits)), key=lambda head: (top1[head].item(), likelihood[head].item()))
    return best, top1[best].item()


def low_shot(labels: torch.Tensor, share: str, seed: int) -> torch.Tensor:
    """Indices, int64 and sorted, of a random part of the training images, drawn from every class.

    Args:
        labels: int64 (N,).
        share: a percentage of every class such as `1%` (at least one image), or a number of images per class, `5`.

    Raises:
        ValueError: `share` is neither.
    """
    number = share.removesuffix("%")
    try:
        value = float(number) if share.endswith("%") else int(number)
    except ValueError:
        value = 0
    if not 0 < value < (100 if share.endswith("%") else math.inf):
        raise ValueError(
            f"low_shot {share!r}: expected a percentage such as `1%`, or a number of images per class such as `5`"
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    kept = []
    for label in labels.unique().tolist():
        members = order[labels.cpu()[order] == label]
        count = max(1, round(len(members) * value / 100)) if share.endswith("%") else value
        kept.append(members[:count])
    return torch.cat(kept).sort().values


def rank_classes(scores: torch.Tensor, k: int) -> torch.Tensor:
    """(N, C) -> int64 (N, min(k, C)), the k classes with the highest scores, best first; ties: lowest index first."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k]


def knn_classify(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    features: torch.Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    same: torch.Tensor | None = None,
    show_progress: bool = False,
) -> torch.Tensor:
    """Weighted k-NN classification (Wu et al. 2018, section 3.4; DINO's protocol).

    Each of the k training images with the largest cosines votes for its class with weight `exp(cosine / temperature)`.

    Args:
        train_features: (M, D).
        train_labels: int64 (M,), in [0, num_classes).
        features: (N, D), of the images to classify.
        k: number of neighbours; all M if there are fewer.
        same: bool (N, M), True where a training image is the image to classify, and has no vote; None if none is.

    Returns:
        (N, C), the sums of the votes for each class.
    """
    _check(train_features, train_labels, num_classes)
    train_features, features = normalize(train_features, dim=1), normalize(features, dim=1)
    rows, votes = max(BLOCK // len(train_features), 1), []
    with progress_bar(total=len(features), desc="k-NN", unit="image", leave=False, disable=not show_progress) as bar:
        for start in range(0, len(features), rows):
            cosines = features[start : start + rows] @ train_features.T
            if same is not None:
                cosines.masked_fill_(same[start : start + rows], -torch.inf)  # exp(-inf) is no vote
            votes.append(_vote(cosines, train_labels, num_classes, min(k, len(train_features)), temperature))
            bar.update(len(cosines))
    return torch.cat(votes)


def _vote(cosines: torch.Tensor, labels: torch.Tensor, num_classes: int, k: int, temperature: float) -> torch.Tensor:
    """Votes of the k nearest: (N, M) -> (N, C)."""
    similarities, neighbours = cosines.topk(k, dim=1)  # (N, k)
    votes = torch.zeros(len(cosines), num_classes, device=cosines.device)
    return votes.scatter_add_(1, labels[neighbours], (similarities / temperature).exp())


def check_labels(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> None:
    """Raise `ValueError` unless every image has a label in [0, num_classes), with at least 2 images and classes."""
    if labels.shape != features.shape[:1] or len(features) < 2:
        raise ValueError(
            f"features have shape {tuple(features.shape)} and labels {tuple(labels.shape)}; expected one label per "
            f"image, and at least 2 images"
        )
    if num_classes < 2 or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels from {labels.min()} to {labels.max()} for {num_classes} classes; expected at least 2 classes and "
            f"labels from 0 to {num_classes - 1}"
        )


def _check(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> None:
    if features.ndim != 2:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected (N, D)")
    check_labels(features, labels, num_classes)
    if not features.isfinite().all():
        raise ValueError("features contain NaN or infinity; expected finite numbers")
