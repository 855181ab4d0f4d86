"""The losses of a fine-tuning step."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn

from umae import seeding
from umae.data.augmentation import MIX_NUMBERS, Strengths, mix_pairs, soft_targets
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
    labels: torch.Tensor,
    seed: int,
    num_classes: int,
    strengths: Strengths,
    mean: Sequence[float],
    std: Sequence[float],
) -> Losses:
    """The cross entropy of every micro-batch, one after the other.

    Args:
        model: as prepared by the accelerator.
        micro_batches: as `training_loader` yields them, one for each accumulated backward pass.
        step: the optimiser steps before this one.
        labels: int64 (N,), of all training images, on the device.
        seed: of the run; mixing is keyed by (seed, epoch, index), drop path by (seed, step, micro-batch, rank).
    """
    for i, batch in enumerate(micro_batches):
        pixel_values, targets = mixed_inputs(batch, accelerator.device, labels, seed, num_classes, strengths, mean, std)
        seeding.seed_forward(seed, step, i, accelerator.process_index)
        loss = nn.functional.cross_entropy(model(pixel_values).logits.float(), targets)
        yield loss, loss.detach()[None]


def mixed_inputs(
    batch: dict,
    device: torch.device,
    labels: torch.Tensor,
    seed: int,
    num_classes: int,
    strengths: Strengths,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """A micro-batch of uint8 crops -> normalised and mixed images, and their targets (batch, classes)."""
    pixel_values = normalize(on_device(batch["pixel_values"], device), mean, std)
    targets = soft_targets(labels[on_device(batch["index"], device)], num_classes, strengths.label_smoothing)
    if not strengths.mixes:
        return pixel_values, targets
    numbers = seeding.uniform(seed, seeding.MIX, batch["epoch"], batch["index"][::2], MIX_NUMBERS)
    return mix_pairs(pixel_values, targets, on_device(numbers, device), strengths.mixup, strengths.cutmix)
