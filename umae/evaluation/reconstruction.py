"""Reconstructions of a model, as pixels."""

from collections.abc import Sequence

import numpy as np
import torch

from configuration_umae import UMAEConfig
from modeling_umae import UMAEForPreTrainingOutput, patchify, unpatchify

FIGURE_IMAGES = 8  # images side by side in a figure of reconstructions


def reconstructions(
    output: UMAEForPreTrainingOutput,
    pixel_values: torch.Tensor,
    config: UMAEConfig,
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, np.ndarray]:
    """Images and their reconstructions: uint8 (images, height, width, 3) each, see `to_pixels`.

    Args:
        output: of the model for these images, with logits.
        pixel_values: (images, channels, height, width), normalised by `mean` and `std`.

    Returns:
        By name: `original`; `visible`, hidden patches in grey; `predicted`, the predictions of the hidden
        ones, the others in grey, since nothing trains what is predicted there; `pasted`, both together.
    """
    assert output.logits is not None and output.mask is not None
    patch, grid = config.patch_height_width, config.grid
    true = patchify(pixel_values, patch)
    predicted = output.logits.to(true.dtype)
    if config.norm_pix_loss:  # predictions are of normalised patches: undo it with the true mean and variance
        predicted = predicted * (true.var(-1, keepdim=True) + 1e-6) ** 0.5 + true.mean(-1, keepdim=True)
    hidden = output.mask[..., None].bool()
    grey = torch.zeros_like(true)  # the mean colour
    rows = {
        "original": true,
        "visible": torch.where(hidden, grey, true),
        "predicted": torch.where(hidden, predicted, grey),
        "pasted": torch.where(hidden, predicted, true),
    }
    return {name: to_pixels(unpatchify(row, patch, grid), mean, std) for name, row in rows.items()}


def to_pixels(pixel_values: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undo the normalisation: (images, channels, height, width) -> RGB, uint8 (images, height, width, 3).

    The first three channels are shown as red, green and blue; of one or two channels, the first as grey.
    """
    shown = [0, 1, 2] if pixel_values.shape[1] >= 3 else [0, 0, 0]
    pixel_values = pixel_values[:, shown]
    shift, scale = (
        torch.tensor([values[channel] for channel in shown], device=pixel_values.device)[:, None, None]
        for values in (mean, std)
    )
    return ((pixel_values * scale + shift).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
