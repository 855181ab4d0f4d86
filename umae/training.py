"""One optimiser step, on plain arguments."""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from modeling_umae import feature_second_moment
from umae import seeding
from umae.transforms import horizontal_flip, normalize

# What a step returns, in this order.
LOGGED = ("loss", "reconstruction_loss", "uniformity_loss", "feature_norm", "grad_norm")

MOST_OVERFLOWS = 20  # gradients in a row that are not finite, in fp16, whose scale is then beyond help


def no_failure(device: torch.device, values: int = len(LOGGED)) -> torch.Tensor:
    """What a step notes its first failure in, on this process, see `remember_failure`.

    float32 (2 + values,): the step's number (0: none), gradients in a row that were not finite, and a flag for each of
    the logged values, of `train_step` by default.
    """
    return torch.zeros(2 + values, device=device)


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
    exact_uniformity: bool = False,
    observe: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Forward and backward over the micro-batches, then one step of the optimiser. Never waits for the device.

    Args:
        model, optimizer: as prepared by the accelerator; a fused optimiser.
        micro_batches: as `training_loader` yields them, one for each accumulated backward pass.
        failed: as `no_failure` made it; changed, for good, by the first loss or gradient that is not finite. From then
            on, whichever process it was on, the weights of all of them stay as they are. (In fp16 a gradient may
            overflow, and leaves out that step; MOST_OVERFLOWS in a row are a failure.)
        step: the optimiser steps before this one.
        num_patches: patches of a picture.
        seed: of the run; flips and masks are keyed by (seed, epoch, index).
        mean, std: of the pictures' normalisation, one number for each channel.
        exact_uniformity: the uniformity term is that of all micro-batches together, for one more pass through the
            encoder, rather than the mean of theirs.
        observe: is shown the features (batch, D) of every micro-batch, without a gradient, and its pictures' indices.

    Returns:
        float32 (5,) on the device: the values named in `LOGGED`, averaged over the micro-batches of this process.
    """

    def forward(micro_batch: int, **kwargs):
        """Twice the same crops, masks and dropout where a micro-batch is seen twice."""
        seeding.seed_forward(seed, step, micro_batch, accelerator.process_index)
        batch = micro_batches[micro_batch]
        pixel_values, noise = device_inputs(batch, accelerator.device, num_patches, seed, mean, std)
        return model(pixel_values, noise=noise, **kwargs)

    losses, second_moment = [], None
    if exact_uniformity and len(micro_batches) > 1:
        with torch.no_grad():
            passes = (forward(i, features_only=True) for i in range(len(micro_batches)))
            second_moment = sum(feature_second_moment(output.features) for output in passes) / len(micro_batches)
            second_moment = accelerator.reduce(second_moment, "mean")
    for i in range(len(micro_batches)):
        with accelerator.accumulate(model):
            output = forward(i, second_moment=second_moment)
            feature_norm = output.features.detach().float().norm(dim=-1).mean()
            losses.append(
                torch.stack([output.loss, output.reconstruction_loss, output.uniformity_loss, feature_norm]).detach()
            )
            if observe is not None:
                observe(output.features.detach(), micro_batches[i]["index"])
            sound = torch.isfinite(losses[-1]).all() & (failed[0] == 0)
            # What fails on one process becomes a failure of all, by their common gradient, in this and all later steps
            accelerator.backward(output.loss * torch.where(sound, 1.0, torch.nan))
            if accelerator.sync_gradients:
                accelerator.unscale_gradients(optimizer)
                grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
                grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm  # under FSDP2
                values = torch.cat([torch.stack(losses).float().mean(dim=0), grad_norm.float()[None]])
                remember_failure(accelerator, optimizer, values, step, failed)
            optimizer.step()
            optimizer.zero_grad()
    return values


def remember_failure(accelerator, optimizer, values: torch.Tensor, step: int, failed: torch.Tensor) -> None:
    """Note in `failed` the first value that is not finite; from then on the fused optimiser skips every step.

    Args:
        values: float32, the logged values of this step, the gradient's norm last.
        step: the optimiser steps before this one.
    """
    bad = (~torch.isfinite(values)).float()
    failed[1] = (failed[1] + 1) * bad[-1]
    bad[-1] = failed[1] >= (1 if accelerator.scaler is None else MOST_OVERFLOWS)
    now = torch.cat([bad.new_full((1,), step + 1), failed[1:2], bad])
    failed.copy_(torch.where((failed[0] == 0) & bad.any(), now, failed))
    if accelerator.scaler is None:  # else the scaler itself skips steps whose gradients are not finite
        optimizer.optimizer.found_inf = (failed[0] > 0).float()


def device_inputs(
    batch: dict, device: torch.device, num_patches: int, seed: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A micro-batch of uint8 crops -> flipped and normalised float32 pictures, and the noise that masks them."""
    index, epoch = on_device(batch["index"], device), on_device(batch["epoch"], device)
    pixel_values = flipped_and_normalized(batch, device, seed, mean, std)
    return pixel_values, seeding.uniform(seed, seeding.MASK, epoch, index, num_patches)


def flipped_and_normalized(
    batch: dict, device: torch.device, seed: int, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """A micro-batch of uint8 crops -> float32 pictures, half of them mirrored."""
    index, epoch = on_device(batch["index"], device), on_device(batch["epoch"], device)
    pixel_values = normalize(on_device(batch["pixel_values"], device), mean, std)
    return horizontal_flip(pixel_values, seeding.uniform(seed, seeding.FLIP, epoch, index, 1)[:, 0] < 0.5)


def on_device(value: torch.Tensor | int, device: torch.device) -> torch.Tensor | int:
    """A tensor, where it is wanted, without waiting for it; a number, as it is."""
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
