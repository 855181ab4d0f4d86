"""What features are worth for classification: linear heads and k nearest neighbours, pure functions of matrices.

N is a number of images, D the width of their features, C the number of classes, H the number of heads. Everything
runs where the features are.
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
HELD_OUT = 0.1  # share of the training images that chooses learning rate and weight decay
BLOCK = 2**26  # cosines that k-NN holds at once, 256 MB

# The cached linear protocol in words and numbers, for reports.
LINEAR_PROTOCOL = {
    "standardisation": f"per feature, mean and variance of the training set, epsilon {EPSILON:g}",
    "optimiser": f"SGD, momentum {MOMENTUM}, learning rate by half a cosine to 0",
    "initialisation": f"weights normal with standard deviation {INIT_STD}, biases 0",
    "epochs": EPOCHS,
    "batch_size": f"{BATCH_SIZE}, or a sixteenth of the training images if that is less",
    "learning_rates": list(LEARNING_RATES),
    "weight_decays": list(WEIGHT_DECAYS),
    "selection": f"best top-1 on {HELD_OUT:.0%} of the training images, held out at random (of equal ones the lowest "
    "cross entropy); then trained anew with that learning rate and weight decay on all training images",
}


@dataclass(frozen=True)
class LinearHead:
    """A linear classifier of raw features: `features @ weight.T + bias` are the logits.

    Args:
        weight: (C, D), the standardisation of the features folded in.
        bias: (C,).
        chosen: what was chosen by accuracy on images held out of the training set, and that accuracy, in [0, 1].
    """

    weight: torch.Tensor
    bias: torch.Tensor
    chosen: dict[str, float]

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, C), the logits."""
        return features @ self.weight.T + self.bias


def train_linear_heads(
    features: dict[str, torch.Tensor], labels: torch.Tensor, num_classes: int, seed: int
) -> dict[str, LinearHead]:
    """A linear classifier for each kind of feature, with what is best for a part of the images.

    One head for each kind of feature, learning rate and weight decay is trained on 90 % of the images, all heads at
    once (as in DINOv2's evaluation, Oquab et al. 2023); for each kind, what is best on the other 10 % says how a head
    is then trained on all. The same arguments give the same bits on the same device.

    Args:
        features: (V, N, D) for each kind, by its name: of the images, and of V - 1 augmentations of them, which take
            turns from epoch to epoch. What is held out is evaluated by the first.
        labels: int64 (N,), in [0, num_classes).
        num_classes: C.
        seed: of the held-out part, the initial weights and the order of the images.

    Raises:
        ValueError: fewer than 2 classes or images, labels outside of the classes, features that are not finite.
    """
    kinds = list(features.values())
    for kind in kinds:
        for view in kind:
            _check(view, labels, num_classes)
    generator = torch.Generator().manual_seed(seed)
    held_out, rest = (rows.to(labels.device) for rows in split_off(len(labels), generator))
    grid = [(rate, decay) for rate in LEARNING_RATES for decay in WEIGHT_DECAYS]
    weights, biases = train_heads(
        [kind[:, rest] for kind in kinds], labels[rest], num_classes, [grid] * len(kinds), generator,
        description="choosing linear heads",
    )  # fmt: skip
    chosen = []
    for kind, weight, bias in zip(kinds, weights, biases, strict=True):
        logits = kind[0, held_out] @ weight.transpose(1, 2) + bias[:, None]  # (H, held out, C)
        best, top1 = best_head(logits, labels[held_out])
        chosen.append({"learning_rate": grid[best][0], "weight_decay": grid[best][1], "validation_top1": top1})
    settings = [[(one["learning_rate"], one["weight_decay"])] for one in chosen]
    weights, biases = train_heads(kinds, labels, num_classes, settings, generator)
    heads = zip(weights[:, 0], biases[:, 0], chosen, strict=True)
    return {name: LinearHead(*head) for name, head in zip(features, heads, strict=True)}


def train_heads(
    features: Sequence[torch.Tensor],
    labels: torch.Tensor,
    num_classes: int,
    settings: Sequence[Sequence[tuple[float, float]]],
    generator: torch.Generator,
    description: str = "training linear heads",
) -> tuple[torch.Tensor, torch.Tensor]:
    """H heads on each of F kinds of feature, all side by side: weights (F, H, C, D) and biases (F, H, C).

    Args:
        features: F tensors (V, N, D); an epoch is of one of the V.
        settings: of every kind, (learning rate, weight decay) of each of its H heads.
        generator: draws the initial weights, the same for all heads, and the order of the images.
        description: of the progress bar.
    """
    (views, count, width), kinds, heads = features[0].shape, len(features), len(settings[0])
    device, dtype = features[0].device, features[0].dtype
    moments = [torch.var_mean(kind, dim=(0, 1), correction=0) for kind in features]
    scale = torch.stack([(variance + EPSILON).rsqrt() for variance, _ in moments])[:, None]  # (F, 1, D)
    mean = torch.stack([mean for _, mean in moments])[:, None]

    weight = INIT_STD * torch.randn(width, num_classes, generator=generator)
    weight = weight.to(device, dtype).repeat(kinds, 1, heads)  # (F, D, H * C)
    bias = torch.zeros(kinds, 1, heads * num_classes, device=device, dtype=dtype)
    weight_momentum, bias_momentum = torch.zeros_like(weight), torch.zeros_like(bias)
    rates, decays = torch.tensor(settings, device=device, dtype=dtype).repeat_interleave(num_classes, 1).unbind(-1)
    rates, decays = rates[:, None], decays[:, None]  # (F, 1, H * C)
    batch_size = min(BATCH_SIZE, max(count // 16, 1))
    steps = EPOCHS * math.ceil(count / batch_size)
    step, bar = 0, progress_bar(total=steps, desc=description, unit="step")
    for epoch in range(EPOCHS):
        for batch in torch.randperm(count, generator=generator).to(device).split(batch_size):
            inputs = (torch.stack([kind[epoch % views, batch] for kind in features]) - mean) * scale  # (F, B, D)
            logits = torch.baddbmm(bias, inputs, weight).unflatten(2, (heads, num_classes))  # (F, B, H, C)
            error = cross_entropy_gradient(logits, labels[batch, None]).flatten(2)  # (F, B, H * C)
            weight_momentum.mul_(MOMENTUM).baddbmm_(inputs.transpose(1, 2), error).addcmul_(decays, weight)
            bias_momentum.mul_(MOMENTUM).add_(error.sum(dim=1, keepdim=True))
            rate = rates * learning_rate_at(step, steps, 0, 1.0)
            weight -= rate * weight_momentum
            bias -= rate * bias_momentum
            step += 1
            bar.update()
    bar.close()
    weight = weight.unflatten(2, (heads, num_classes)).permute(0, 2, 3, 1) * scale[:, None]  # for raw features
    return weight, bias.view(kinds, heads, num_classes) - (weight * mean[:, None]).sum(dim=-1)


def cross_entropy_gradient(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The gradient of the mean cross entropy for its logits: `(softmax(logits) - one_hot(labels)) / images`.

    Args:
        logits: (..., C).
        labels: int64, images along its first dimension; broadcast to the shape of the logits without C.
    """
    error = logits.softmax(dim=-1)
    index = labels.expand(error.shape[:-1])[..., None]
    return error.scatter_add_(-1, index, torch.full_like(error[..., :1], -1)) / len(labels)


def split_off(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The images that choose among heads, `HELD_OUT` of them at random and at least one, and the others."""
    order = torch.randperm(count, generator=generator)
    return order.tensor_split([max(round(HELD_OUT * count), 1)])


def best_head(logits: torch.Tensor, labels: torch.Tensor) -> tuple[int, float]:
    """(H, N, C) -> the head with the best top-1, of equal ones that with the lowest cross entropy; its top-1."""
    top1 = (logits.argmax(dim=-1) == labels).float().mean(dim=1)  # (H,)
    likelihood = logits.log_softmax(dim=-1).gather(2, labels.expand(len(logits), -1)[..., None]).mean(dim=(1, 2))
    best = max(range(len(logits)), key=lambda head: (top1[head].item(), likelihood[head].item()))
    return best, top1[best].item()


def low_shot(labels: torch.Tensor, share: str, seed: int) -> torch.Tensor:
    """Which images stay of a training set that is made small: int64, sorted, as many of every class as possible.

    Args:
        labels: int64 (N,).
        share: of every class, `1%` (at least one image) or a number of images, `5`.

    Raises:
        ValueError: it is neither.
    """
    number = share.removesuffix("%")
    try:
        value = float(number) if share.endswith("%") else int(number)
    except ValueError:
        value = 0
    if not 0 < value < (100 if share.endswith("%") else math.inf):
        raise ValueError(f"{share!r} is no part of a training set; expected `1%` or a number of images per class, `5`")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    kept = []
    for label in labels.unique().tolist():
        members = order[labels.cpu()[order] == label]
        count = max(1, round(len(members) * value / 100)) if share.endswith("%") else value
        kept.append(members[:count])
    return torch.cat(kept).sort().values


def rank_classes(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The k best classes of every image, best first: (N, C) -> int64 (N, min(k, C)); of equal scores the first."""
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
    """Weighted k nearest neighbours (Wu et al. 2018, section 3.4; DINO's protocol).

    Each of the k training images with the largest cosine votes for its class with weight `exp(cosine / temperature)`.

    Args:
        train_features: (M, D).
        train_labels: int64 (M,), in [0, num_classes).
        features: (N, D), of the images to classify.
        k: neighbours; all of them if there are fewer.
        same: bool (N, M), True where a training image is the one to classify, and has no vote; None for none.

    Returns:
        (N, C), the sums of the votes.
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
    """(N, M) -> (N, C)."""
    nearest, neighbours = cosines.topk(k, dim=1)  # (N, k)
    votes = torch.zeros(len(cosines), num_classes, device=cosines.device)
    return votes.scatter_add_(1, labels[neighbours], (nearest / temperature).exp())


def check_labels(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> None:
    """Raise `ValueError` unless there is a label of the classes for each of at least 2 images."""
    if labels.shape != features.shape[:1] or len(features) < 2:
        raise ValueError(
            f"features are {tuple(features.shape)} and labels {tuple(labels.shape)}; expected as many, and 2 at least"
        )
    if num_classes < 2 or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels from {labels.min()} to {labels.max()} for {num_classes} classes; expected at least 2 classes and "
            f"labels from 0 to {num_classes - 1}"
        )


def _check(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> None:
    if features.ndim != 2:
        raise ValueError(f"features are {tuple(features.shape)}; expected (N, D)")
    check_labels(features, labels, num_classes)
    if not features.isfinite().all():
        raise ValueError("features hold NaN or infinity; expected finite numbers")
