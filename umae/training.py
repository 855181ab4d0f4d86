"""One optimiser step, on plain arguments."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn

from umae import seeding
from umae.transforms import horizontal_flip, normalize

# What a step returns, in this order.
LOGGED = ("loss", "reconstruction_loss", "uniformity_loss", "feature_norm", "grad_norm")


def no_failure(device: torch.device) -> torch.Tensor:
    """What `train_step` notes its first failure in: float32, the step's number (0: none) and a flag for each of LOGGED.

    The step is the same on all processes; the flags are those of this process.
    """
    return torch.zeros(1 + len(LOGGED), device=device)


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[dict],
    failed: torch.Tensor,
    *,
    step: int,
    num_patches: int,
    seed: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> torch.Tensor:
    """Forward and backward over the micro-batches, then one step of the optimiser. Never waits for the device.

    Args:
        model, optimizer: as prepared by the accelerator; a fused optimiser.
        micro_batches: as `training_loader` yields them, one for each accumulated backward pass.
        failed: as `no_failure` made it; changed, for good, by the first loss or gradient that is not finite, on
            whichever process. From then on the optimiser leaves the weights of all processes as they are.
        step: the optimiser steps before this one.
        num_patches: patches of a picture.
        seed: of the run; flips and masks are keyed by (seed, epoch, index).
        mean, std: of the pictures' normalisation, one number for each channel.

    Returns:
        float32 (5,) on the device: the values named in `LOGGED`, averaged over the micro-batches of this process.
    """
    losses = []
    for batch in micro_batches:
        with accelerator.accumulate(model):
            pixel_values, noise = device_inputs(batch, accelerator.device, num_patches, seed, mean, std)
            output = model(pixel_values, noise=noise)
            accelerator.backward(output.loss)
            feature_norm = output.features.detach().float().norm(dim=-1).mean()
            losses.append(
                torch.stack([output.loss.detach(), output.reconstruction_loss, output.uniformity_loss, feature_norm])
            )
            if accelerator.sync_gradients:
                accelerator.unscale_gradients(optimizer)
                grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
                values = torch.cat([torch.stack(losses).float().mean(dim=0), grad_norm.float()[None]])
                remember_failure(accelerator, optimizer, values, step, failed)
            optimizer.step()
            optimizer.zero_grad()
    return values


def remember_failure(accelerator, optimizer, values: torch.Tensor, step: int, failed: torch.Tensor) -> None:
    """Note in `failed` the first value that is not finite; from then on the fused optimiser skips every step."""
    bad = (~torch.isfinite(values)).float()
    if accelerator.scaler is not None:  # fp16: a gradient that overflows is expected, and the scaler skips that step
        bad[-1] = 0
    anywhere = bad.max()
    if accelerator.num_processes > 1:  # a loss may fail on one process alone; all must freeze at the same step
        anywhere = accelerator.reduce(anywhere, "sum")
    is_first = (failed[0] == 0) & (anywhere > 0)
    failed.copy_(torch.where(is_first, torch.cat([bad.new_full((1,), step + 1), bad]), failed))
    if accelerator.scaler is None:
        optimizer.optimizer.found_inf = (failed[0] > 0).float()


def device_inputs(
    batch: dict, device: torch.device, num_patches: int, seed: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A micro-batch of uint8 crops -> flipped and normalised float32 pictures, and the noise that masks them."""
    index, epoch = batch["index"].to(device, non_blocking=True), batch["epoch"]
    pixel_values = normalize(batch["pixel_values"].to(device, non_blocking=True), mean, std)
    flip = seeding.uniform(seed, seeding.FLIP, epoch, index, 1)[:, 0] < 0.5
    return horizontal_flip(pixel_values, flip), seeding.uniform(seed, seeding.MASK, epoch, index, num_patches)
