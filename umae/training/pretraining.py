"""One optimiser step, on plain arguments."""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from modeling_umae import feature_second_moment
from umae import seeding
from umae.data.inputs import device_inputs
from umae.training.failures import remember_failure

# What a step returns, in this order.
LOGGED = ("loss", "reconstruction_loss", "uniformity_loss", "feature_norm", "grad_norm")


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
