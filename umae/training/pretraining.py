"""The losses of a pre-training step."""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import nn

from configuration_umae import UMAEConfig
from modeling_umae import feature_second_moment
from umae import seeding
from umae.data.inputs import device_inputs
from umae.training.loop import Losses

# What a step with the uniformity term logs, in this order; the loop adds the norm of the gradient.
VALUES = ("loss", "reconstruction_loss", "uniformity_loss", "feature_norm", "grad_norm")


def values_of(config: UMAEConfig) -> tuple[str, ...]:
    """What a step logs: VALUES, with `coding_rate_loss` after `uniformity_loss` if that is the regularizer."""
    return VALUES if config.regularizer == "uniformity" else (*VALUES[:3], "coding_rate_loss", *VALUES[3:])


def pretraining_losses(
    accelerator: Accelerator,
    model: nn.Module,
    micro_batches: Sequence[dict],
    step: int,
    *,
    num_patches: int,
    seed: int,
    mean: Sequence[float],
    std: Sequence[float],
    exact_uniformity: bool = False,
    observe: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> Losses:
    """The loss of every micro-batch, one after the other, with all but the last of `values_of`.

    Args:
        model: as prepared by the accelerator.
        micro_batches: as `training_loader` yields them, one for each accumulated backward pass.
        step: the optimiser steps before this one.
        num_patches: patches of an image.
        seed: of the run; flips and masks are keyed by (seed, epoch, index).
        mean, std: of the images' normalisation, one number for each channel.
        exact_uniformity: the regularizer is that of all micro-batches together, for one more pass through the
            encoder, rather than the mean of theirs.
        observe: gets the features (batch, D) of every micro-batch, without a gradient, and the indices of its images.
    """

    def forward(micro_batch: int, **kwargs):
        """The same crops, masks and dropout whenever a micro-batch is used."""
        seeding.seed_forward(seed, step, micro_batch, accelerator.process_index)
        batch = micro_batches[micro_batch]
        pixel_values, noise = device_inputs(batch, accelerator.device, num_patches, seed, mean, std)
        return model(pixel_values, noise=noise, **kwargs)

    second_moment = None
    if exact_uniformity and len(micro_batches) > 1:
        with torch.no_grad():
            passes = (forward(i, features_only=True) for i in range(len(micro_batches)))
            second_moment = sum(feature_second_moment(output.features) for output in passes) / len(micro_batches)
            second_moment = accelerator.reduce(second_moment, "mean")
    for i, batch in enumerate(micro_batches):
        output = forward(i, second_moment=second_moment)
        feature_norm = output.features.detach().float().norm(dim=-1).mean()
        if observe is not None:
            observe(output.features.detach(), batch["index"])
        losses = (output.loss, output.reconstruction_loss, output.uniformity_loss, output.coding_rate_loss)
        values = torch.stack([value for value in (*losses, feature_norm) if value is not None])
        yield output.loss, values.detach()
