"""What a model reconstructs, as pixels."""

from collections.abc import Sequence

import numpy as np
import torch

from configuration_umae import UMAEConfig
from modeling_umae import UMAEForPreTrainingOutput, patchify, unpatchify

SHOWN = 8  # images side by side


def reconstructions(
    output: UMAEForPreTrainingOutput,
    pixel_values: torch.Tensor,
    config: UMAEConfig,
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, np.ndarray]:
    """What a model saw of images and made of it, by name: uint8 (images, height, width, channels) each.

    Args:
        output: the model's, with logits, for these images.
        pixel_values: (images, channels, height, width), normalised by `mean` and `std`.

    Returns:
        `original`; `visible`, the hidden patches grey; `predicted`, all that the model predicts; `pasted`, the
        predictions where patches were hidden.
    """
    patch, grid = config.patch_height_width, config.grid
    true = patchify(pixel_values, patch)
    predicted = output.logits.to(true.dtype)
    if config.norm_pix_loss:  # the prediction has no level and contrast of its own: give it the true patch's
        predicted = predicted * (true.var(-1, keepdim=True) + 1e-6) ** 0.5 + true.mean(-1, keepdim=True)
    hidden = output.mask[..., None].bool()
    rows = {
        "original": true,
        "visible": torch.where(hidden, torch.zeros_like(true), true),  # zero is the mean colour
        "predicted": predicted,
        "pasted": torch.where(hidden, predicted, true),
    }
    return {name: to_pixels(unpatchify(row, patch, grid), mean, std) for name, row in rows.items()}


def to_pixels(pixel_values: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undo the normalisation: (images, channels, height, width) -> uint8 (images, height, width, channels)."""
    mean, std = (torch.tensor(values, device=pixel_values.device)[:, None, None] for values in (mean, std))
    return ((pixel_values * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
