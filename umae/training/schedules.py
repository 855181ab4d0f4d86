"""The learning rate as a function of the step, and which parameters decay."""

import math
import re
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from configuration_umae import UMAEConfig


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


@dataclass(frozen=True)
class Schedule:
    """Length and height of the learning-rate curve, in optimiser steps.

    Args:
        total_steps: of the run.
        learning_rate: at its peak.
        extended_at: the length that the run had before it was made longer: there a new curve begins, with a warm-up of
            its own. 0 for a run that was not.
    """

    total_steps: int
    warmup_steps: float
    learning_rate: float
    extended_at: int = 0

    def rate(self, step: int, minimum: float = 0.0) -> float:
        """The learning rate of a step, counted from 0."""
        begun = self.extended_at
        return learning_rate_at(step - begun, self.total_steps - begun, self.warmup_steps, self.learning_rate, minimum)


def make_schedule(
    total_steps: int,
    steps_per_epoch: int,
    images_per_step: int,
    base_learning_rate: float,
    warmup_epochs: float | None,
    usual_warmup_steps: float,
    extended_at: int = 0,
) -> Schedule:
    """The curve of a run.

    Args:
        extended_at: see `Schedule`; the warm-up is that of the steps after it.
        base_learning_rate: for 256 images a step; scaled by their number.
        warmup_epochs: None for `usual_warmup_steps`.

    Raises:
        ValueError: the warm-up is longer than the run.
    """
    warmup = usual_warmup_steps if warmup_epochs is None else warmup_epochs * steps_per_epoch
    if warmup > (length := total_steps - extended_at):
        raise ValueError(
            f"warmup_epochs {warmup_epochs:g} is {warmup:g} steps, longer than the whole run of {length}; lower "
            f"it, or leave it out for {usual_warmup_steps:g} steps"
        )
    return Schedule(total_steps, warmup, base_learning_rate * images_per_step / 256, extended_at)


def set_learning_rate(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int, minimum: float = 0.0) -> float:
    """Put the optimiser at the rate of a step, each group times its `lr_scale` if it has one; returns the rate."""
    rate = schedule.rate(step, minimum)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    return rate


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups for AdamW: trainable tensors of more than one dimension decay, the others do not.

    Class and mask token have three dimensions and therefore decay, as in MAE (timm's `add_weight_decay`).
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def layer_decay_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """Parameter groups for AdamW in which every layer learns more slowly than the one above it.

    Each has a `lr_scale`, which `set_learning_rate` multiplies the rate by. With L layers in the encoder it is 1 for
    the head and the norms after the encoder, `layer_decay` to the power of L - i for layer i from 0 on, and to the
    power of L + 1 for the tokens, the position table and the patch embedding. As in MAE's fine-tuning, tensors of one
    dimension, the class token and the position table have no weight decay.

    Args:
        model: a `UMAEForImageClassification`.
        layer_decay: 1 is the same rate everywhere, 0 trains the head alone.

    Source: Bao et al. 2022 (BEiT), appendix; He et al. 2022 (MAE), appendix A.2.
    """
    top = cast(UMAEConfig, model.config).num_hidden_layers + 1
    groups: dict[tuple[int, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inner = re.match(r"vit\.encoder\.layer\.(\d+)\.", name)
        depth = 0 if name.startswith("vit.embeddings.") else int(inner[1]) + 1 if inner else top
        spared = parameter.ndim <= 1 or name.endswith((".cls_token", ".position_embeddings"))
        decay = 0.0 if spared else weight_decay
        group: dict[str, Any] = {"params": [], "weight_decay": decay, "lr_scale": layer_decay ** (top - depth)}
        groups.setdefault((depth, decay), group)["params"].append(parameter)
    return list(groups.values())
