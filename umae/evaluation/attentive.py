"""The attentive probe: a learned query pools the patch tokens of a frozen encoder, a linear layer classifies them.

The head is that of AIM (El-Nouby et al. 2024; apple/ml-aim, `AttentionPoolingClassifier`): batch norm of the tokens
without a learned scale, keys and values without biases, one learned query. Shapes: N images, T tokens per image, D the
width of a token, C classes, R heads trained side by side.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from umae.evaluation.linear import EPSILON, best_head, check_labels, split_off
from umae.progress_bar import progress_bar
from umae.speed import has_float64, has_room
from umae.training.schedules import learning_rate_at

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
WEIGHT_DECAY = 0.1
EPOCHS = 50
BATCH_SIZE = 1024
QUERY_STD = 0.02
PARAMETER_NAMES = ("query", "key", "value", "weight", "bias")
ATTENTIVE_PROTOCOL = {
    "features": "patch tokens of the unmasked image after the encoder's norm, kept in float16",
    "head": "one learned query, as many attention heads as the encoder's, keys and values without biases, then linear "
    "(AIM, El-Nouby et al. 2024)",
    "standardisation": f"per feature, mean and variance of all training tokens, epsilon {EPSILON:g}",
    "optimiser": f"AdamW, weight decay {WEIGHT_DECAY}, learning rate by half a cosine to 0",
    "epochs": EPOCHS,
    "batch_size": f"{BATCH_SIZE}, or a sixteenth of the training images if that is less",
    "learning_rates": list(LEARNING_RATES),
    "selection": "as for the cached linear heads",
    "augmentation": "none",
}


@dataclass(frozen=True)
class AttentiveHead:
    """A classifier of patch tokens.

    Args:
        parameters: by the names in PARAMETER_NAMES: (1, D), (1, D, D), (1, D, D), (1, C, D), (1, C).
        mean, scale: (D,), the standardisation of the tokens.
        num_attention_heads: heads that the query is split into.
        chosen: the learning rate chosen on held-out training images, and its accuracy on them, in [0, 1].
    """

    parameters: dict[str, torch.Tensor]
    mean: torch.Tensor
    scale: torch.Tensor
    num_attention_heads: int
    chosen: dict[str, float]

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """(N, T, D) -> (N, C), the logits on the head's device; with `rows` only of these images."""
        rows = torch.arange(len(tokens)) if rows is None else rows
        settings = (self.mean, self.scale, self.num_attention_heads)
        logits = []
        with progress_bar(total=len(rows), desc="evaluating an attentive head", unit="image", leave=False) as bar:
            for block in rows.split(BATCH_SIZE):
                logits.append(attend(self.parameters, _like(self.mean, tokens[block]), *settings)[:, 0])
                bar.update(len(block))
        return torch.cat(logits)


def attend(
    parameters: dict[str, torch.Tensor],
    tokens: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    num_attention_heads: int,
) -> torch.Tensor:
    """The logits of R heads: (N, T, D) -> (N, R, C).

    Neither keys nor values of the tokens are computed: a score is `q . (K x) = (K' q) . x`; the value map is linear, as
    is the pooling, so it is applied to the pooled token; the mean of the standardisation shifts all scores of an image
    equally, so it is subtracted after the pooling. The function of the parameters is the same, with a tenth of the
    operations.
    """
    count, heads = len(parameters["query"]), num_attention_heads
    query = parameters["query"].unflatten(1, (heads, -1))  # (R, heads, D / heads)
    key, value = (parameters[name].unflatten(1, (heads, -1)) for name in ("key", "value"))  # (R, heads, D / heads, D)
    directions = torch.einsum("rhd,rhdw->rhw", query, key) * scale / math.sqrt(query.shape[-1])
    weights = (tokens @ directions.flatten(0, 1).T).softmax(dim=1)  # (N, T, R * heads)
    pooled = (weights.transpose(1, 2) @ tokens - mean) * scale  # (N, R * heads, D)
    values = torch.einsum("nrhw,rhdw->nrhd", pooled.unflatten(1, (count, heads)), value).flatten(2)  # (N, R, D)
    return torch.einsum("nrd,rcd->nrc", values, parameters["weight"]) + parameters["bias"]


def train_attentive_head(
    tokens: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    num_attention_heads: int,
    seed: int,
    device: torch.device,
) -> AttentiveHead:
    """A head trained on all images with the learning rate that is best on held-out ones.

    The same arguments give bit-identical results on the same device.

    Args:
        tokens: (N, T, D), on any device; moved to `device` batch by batch, or at once where it has room for them.
        labels: int64 (N,), in [0, C).
        num_classes: C.
        seed: of the held-out images, the initial weights and the order of the images.

    Raises:
        ValueError: fewer than 2 classes or images, labels outside of [0, C), or tokens that are not finite.
    """
    check_labels(tokens, labels, num_classes)
    generator = torch.Generator().manual_seed(seed)
    held_out, rest = split_off(len(labels), generator)
    tokens = tokens.to(device) if has_room(device, tokens.nbytes) else tokens
    settings = (*_moments(tokens, device), num_attention_heads)
    train = partial(_train, tokens, labels.to(device), num_classes, *settings, generator=generator)
    heads = train(rows=rest, learning_rates=LEARNING_RATES, description="choosing an attentive head")
    logits = torch.stack([AttentiveHead(head, *settings, {})(tokens, held_out) for head in heads])
    best, top1 = best_head(logits, labels[held_out].to(device))
    rate = LEARNING_RATES[best]
    (head,) = train(rows=torch.arange(len(labels)), learning_rates=[rate], description="training the attentive head")
    return AttentiveHead(head, *settings, {"learning_rate": rate, "validation_top1": top1})


def _moments(tokens: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (D,) of all tokens, and the factor (D,) that scales them to a variance of 1."""
    adding = device if has_float64(device) else torch.device("cpu")
    sums = torch.zeros(2, tokens.shape[-1], dtype=torch.float64, device=adding)
    with progress_bar(total=len(tokens), desc="moments of the tokens", unit="image", leave=False) as bar:
        for block in tokens.split(BATCH_SIZE):
            block = block.to(adding).double()
            sums += torch.stack([block.sum(dim=(0, 1)), block.square().sum(dim=(0, 1))])
            bar.update(len(block))
    if not sums.isfinite().all():
        raise ValueError("the encoder's tokens exceed float16's range, +-65,504; leave out the attentive head")
    mean, square = sums / (tokens.shape[0] * tokens.shape[1])
    factor = ((square - mean.square()).clamp(min=0) + EPSILON).rsqrt()
    return mean.float().to(device), factor.float().to(device)


def _like(tensor: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens with the device and dtype of a tensor; moved first, while they have half the bytes."""
    return tokens.to(tensor.device, non_blocking=True).to(tensor.dtype)


def _initial_parameters(num_classes: int, width: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Initial parameters of a head; those of the layers are initialised as in `nn.Linear`."""

    def linear(*shape: int) -> torch.Tensor:
        return torch.empty(1, *shape).uniform_(-(width**-0.5), width**-0.5, generator=generator)

    query = QUERY_STD * torch.randn(1, width, generator=generator)
    tensors = query, linear(width, width), linear(width, width), linear(num_classes, width), linear(num_classes)
    return dict(zip(PARAMETER_NAMES, tensors, strict=True))


def _train(
    tokens: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    mean: torch.Tensor,
    scale: torch.Tensor,
    num_attention_heads: int,
    rows: torch.Tensor,
    learning_rates: Sequence[float],
    description: str,
    generator: torch.Generator,
) -> list[dict[str, torch.Tensor]]:
    """One head for each learning rate, from the same initial weights, on the images `rows` in the same order."""
    device, initial = mean.device, _initial_parameters(num_classes, tokens.shape[-1], generator)
    heads = []
    for _ in learning_rates:
        heads.append({name: nn.Parameter(tensor.to(mean, copy=True)) for name, tensor in initial.items()})
    groups = [{"params": list(head.values()), "lr": rate} for head, rate in zip(heads, learning_rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    batch_size = min(BATCH_SIZE, max(len(rows) // 16, 1))
    total = EPOCHS * math.ceil(len(rows) / batch_size)
    step = 0
    with progress_bar(total=total, desc=description, unit="step") as bar:
        for _ in range(EPOCHS):
            for batch in rows[torch.randperm(len(rows), generator=generator)].split(batch_size):
                inputs = _like(mean, tokens[batch.to(tokens.device)])
                stacked = {name: torch.cat([head[name] for head in heads]) for name in PARAMETER_NAMES}
                logits = attend(stacked, inputs, mean, scale, num_attention_heads)  # (N, R, C)
                targets = labels[batch.to(device)].repeat_interleave(len(heads))
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets) * len(heads)  # the sum over the heads
                for group, rate in zip(optimizer.param_groups, learning_rates, strict=True):
                    group["lr"] = learning_rate_at(step, total, 0, rate)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                bar.update()
    return [{name: parameter.detach() for name, parameter in head.items()} for head in heads]
