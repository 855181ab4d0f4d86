"""What people would rather look at than read. Every function returns a PIL picture."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from modeling_umae import UMAEForPreTraining, patchify, unpatchify


@torch.no_grad()
def reconstruction_strip(
    model: UMAEForPreTraining,
    pixel_values: torch.Tensor,
    noise: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> Image.Image:
    """Three rows, a column for every picture: original, what the encoder saw, the reconstruction beside what it saw.

    Args:
        model: in evaluation mode.
        pixel_values: (pictures, channels, height, width), normalised by `mean` and `std`.
        noise: (pictures, patches), masks the patches with the largest numbers.
    """
    output = model(pixel_values, noise=noise)
    patch, grid = model.config.patch_height_width, model.config.grid
    true = patchify(pixel_values, patch)
    predicted = output.logits.to(true.dtype)
    if model.config.norm_pix_loss:  # the prediction has no level and contrast of its own: give it the true patch's
        predicted = predicted * (true.var(-1, keepdim=True) + 1e-6) ** 0.5 + true.mean(-1, keepdim=True)
    hidden = output.mask[..., None].bool()
    grey = torch.zeros_like(true)  # the mean colour
    rows = {
        "original": true,
        f"visible, {1 - output.mask.mean():.0%}": torch.where(hidden, grey, true),
        "reconstructed": torch.where(hidden, predicted, true),
    }
    return _tile({name: _to_pixels(unpatchify(row, patch, grid), mean, std) for name, row in rows.items()})


def _to_pixels(pixel_values: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undo the normalisation: (pictures, channels, height, width) -> uint8 (pictures, height, width, channels)."""
    mean, std = (torch.tensor(values, device=pixel_values.device)[:, None, None] for values in (mean, std))
    return ((pixel_values * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _tile(rows: dict[str, np.ndarray]) -> Image.Image:
    columns = len(next(iter(rows.values())))
    figure = Figure(figsize=(1.25 * columns, 1.35 * len(rows)), layout="constrained", dpi=100)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for (name, pictures), line in zip(rows.items(), axes, strict=True):
        for picture, axis in zip(pictures, line, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
