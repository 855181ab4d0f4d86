"""One optimiser step, on plain arguments."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn

from umae import seeding
from umae.transforms import horizontal_flip, normalize

# What a step returns, in this order.
LOGGED = ("loss", "reconstruction_loss", "uniformity_loss", "grad_norm")


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[dict],
    failed: torch.Tensor,
    *,
    num_patches: int,
    seed: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> torch.Tensor:
    """Forward and backward over the micro-batches, then one step of the optimiser. Never waits for the device.

    Args:
        model, optimizer: as prepared by the accelerator; a fused optimiser.
        micro_batches: as `training_loader` yields them, one for each accumulated backward pass.
        failed: scalar float32 on the device, 0 while every loss and gradient was finite; set to 1, for good, at the
            first that is not. From then on the optimiser leaves the weights as they are. Gradients are averaged over
            the processes before they are looked at, so that all of them agree.
        num_patches: patches of a picture.
        seed: of the run; flips and masks are keyed by (seed, epoch, index).
        mean, std: of the pictures' normalisation, one number for each channel.

    Returns:
        float32 (4,) on the device: the values named in `LOGGED`, averaged over the micro-batches of this process.
    """
    losses = []
    for batch in micro_batches:
        with accelerator.accumulate(model):
            pixel_values, noise = device_inputs(batch, accelerator.device, num_patches, seed, mean, std)
            output = model(pixel_values, noise=noise)
            accelerator.backward(output.loss)
            losses.append(torch.stack([output.loss.detach(), output.reconstruction_loss, output.uniformity_loss]))
            if accelerator.sync_gradients:
                accelerator.unscale_gradients(optimizer)
                grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
                values = torch.cat([torch.stack(losses).float().mean(dim=0), grad_norm.float()[None]])
                remember_failure(accelerator, optimizer, values, failed)
            optimizer.step()
            optimizer.zero_grad()
    return values


def remember_failure(accelerator, optimizer, values: torch.Tensor, failed: torch.Tensor) -> None:
    """Set `failed` if a value is not finite, and have the fused optimiser skip every step from then on."""
    if accelerator.scaler is not None:  # fp16: a gradient that overflows is expected, and the scaler skips that step
        values = values[:3]
    failed.clamp_(min=(~torch.isfinite(values).all()).float())
    if accelerator.scaler is None:
        optimizer.optimizer.found_inf = failed


def device_inputs(
    batch: dict, device: torch.device, num_patches: int, seed: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A micro-batch of uint8 crops -> flipped and normalised float32 pictures, and the noise that masks them."""
    index, epoch = batch["index"].to(device, non_blocking=True), batch["epoch"]
    pixel_values = normalize(batch["pixel_values"].to(device, non_blocking=True), mean, std)
    flip = seeding.uniform(seed, seeding.FLIP, epoch, index, 1)[:, 0] < 0.5
    return horizontal_flip(pixel_values, flip), seeding.uniform(seed, seeding.MASK, epoch, index, num_patches)
