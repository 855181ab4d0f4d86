"""The losses of a fine-tuning step."""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import nn

from umae import seeding
from umae.data.augmentation import MIX_NUMBERS, Strengths, mix_pairs
from umae.data.inputs import normalize, on_device
from umae.training.loop import Losses

# What a step logs, in this order; the loop adds the norm of the gradient.
VALUES = ("loss", "grad_norm")


def classification_losses(
    accelerator: Accelerator,
    model: nn.Module,
    micro_batches: Sequence[dict],
    step: int,
    *,
    targets: Callable[[torch.Tensor], torch.Tensor],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    seed: int,
    strengths: Strengths,
    mean: Sequence[float],
    std: Sequence[float],
) -> Losses:
    """The loss of every micro-batch, one after the other.

    Args:
        model: as prepared by the accelerator.
        micro_batches: as `training_loader` yields them, one for each accumulated backward pass.
        step: the optimiser steps before this one.
        targets: indices of training images, int64 (batch,) on the device -> float (batch, classes), to be mixed.
        loss: (logits, mixed targets) -> scalar.
        seed: of the run; mixing is keyed by (seed, epoch, index), drop path by (seed, step, micro-batch, rank).
    """
    for i, batch in enumerate(micro_batches):
        pixel_values, mixed = mixed_inputs(batch, accelerator.device, targets, seed, strengths, mean, std)
        seeding.seed_forward(seed, step, i, accelerator.process_index)
        value = loss(model(pixel_values).logits.float(), mixed)
        yield value, value.detach()[None]


def mixed_inputs(
    batch: dict,
    device: torch.device,
    targets: Callable[[torch.Tensor], torch.Tensor],
    seed: int,
    strengths: Strengths,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """A micro-batch of uint8 crops -> normalised and mixed images, and their targets (batch, classes)."""
    pixel_values = normalize(on_device(batch["pixel_values"], device), mean, std)
    unmixed = targets(on_device(batch["index"], device))
    if not strengths.mixes:
        return pixel_values, unmixed
    numbers = seeding.uniform(seed, seeding.MIX, batch["epoch"], batch["index"][::2], MIX_NUMBERS)
    return mix_pairs(pixel_values, unmixed, on_device(numbers, device), strengths.mixup, strengths.cutmix)
