"""The learning rate as a function of the step, and which parameters decay."""

import math

from torch import nn


def learning_rate_at(step: float, total_steps: float, warmup_steps: float, peak: float, minimum: float = 0.0) -> float:
    """MAE's schedule: linear from 0 to `peak` over the warm-up, then half a cosine down to `minimum`.

    Args:
        step: the optimiser step about to be taken, counted from 0; any unit, the same for all three.

    Source: facebookresearch/mae, `util/lr_sched.py`, which states it in epochs.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return minimum + (peak - minimum) * 0.5 * (1.0 + math.cos(math.pi * progress))


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups for AdamW: trainable tensors of more than one dimension decay, the others do not.

    Class and mask token have three dimensions and therefore decay, as in MAE (timm's `add_weight_decay`).
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
