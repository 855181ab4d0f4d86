"""A classifier that is trained as a whole: one step, and its guesses for pictures that it has not seen."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from umae import seeding
from umae.data.augmentation import MIX_NUMBERS, Strengths, mix_pairs, soft_targets
from umae.data.inputs import normalize
from umae.training.failures import remember_failure

# What a step returns, in this order.
LOGGED = ("loss", "grad_norm")


def classification_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[dict],
    failed: torch.Tensor,
    labels: torch.Tensor,
    *,
    step: int,
    seed: int,
    num_classes: int,
    strengths: Strengths,
    mean: Sequence[float],
    std: Sequence[float],
) -> torch.Tensor:
    """Forward and backward over the micro-batches, then one step of the optimiser. Never waits for the device.

    Args:
        model, optimizer: as prepared by the accelerator; a fused optimiser.
        micro_batches: as `training_loader` yields them, one for each accumulated backward pass.
        failed: as `no_failure` made it; see `umae.training.pretraining.train_step`.
        labels: int64 (N,), of all training pictures, on the device.
        step: the optimiser steps before this one.
        seed: of the run; mixing is keyed by (seed, epoch, index), drop path by (seed, step, micro-batch, rank).

    Returns:
        float32 (2,) on the device: the values named in `LOGGED`, averaged over the micro-batches of this process.
    """
    losses = []
    for i, batch in enumerate(micro_batches):
        with accelerator.accumulate(model):
            pixel_values, targets = mixed_inputs(
                batch, accelerator.device, labels, seed, num_classes, strengths, mean, std
            )
            seeding.seed_forward(seed, step, i, accelerator.process_index)
            loss = nn.functional.cross_entropy(model(pixel_values).logits.float(), targets)
            losses.append(loss.detach())
            sound = torch.isfinite(losses[-1]) & (failed[0] == 0)
            # What fails on one process becomes a failure of all, by their common gradient
            accelerator.backward(loss * torch.where(sound, 1.0, torch.nan))
            if accelerator.sync_gradients:
                accelerator.unscale_gradients(optimizer)
                grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
                grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm  # under FSDP2
                values = torch.stack([torch.stack(losses).mean(), grad_norm.float()])
                remember_failure(accelerator, optimizer, values, step, failed)
            optimizer.step()
            optimizer.zero_grad()
    return values


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
    """A micro-batch of uint8 crops -> normalised and mixed pictures, and their targets (batch, classes)."""
    index = batch["index"].to(device, non_blocking=True)
    pixel_values = normalize(batch["pixel_values"].to(device, non_blocking=True), mean, std)
    targets = soft_targets(labels[index], num_classes, strengths.label_smoothing)
    if not strengths.mixes:
        return pixel_values, targets
    numbers = seeding.uniform(seed, seeding.MIX, batch["epoch"], index[::2], MIX_NUMBERS)
    return mix_pairs(pixel_values, targets, numbers, strengths.mixup, strengths.cutmix)
