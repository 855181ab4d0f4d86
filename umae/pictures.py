"""What people would rather look at than read. Every function returns a PIL picture."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from modeling_umae import UMAEForPreTraining, patchify, unpatchify
from umae.collapse import effective_rank, singular_values

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9")  # Okabe and Ito's, for all eyes


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


def spectrum(features: torch.Tensor) -> Image.Image:
    """How evenly features (N, D) fill their dimensions: the singular values of their matrix, on a log scale."""
    values = singular_values(features)
    figure = Figure(figsize=(6, 3.2), layout="constrained", dpi=100)
    axis = figure.subplots()
    axis.plot(range(1, len(values) + 1), [value / (values[0] or 1.0) for value in values], linewidth=2)
    axis.set(yscale="log", ylim=(1e-4, 1.5), xlabel="singular value", ylabel="share of the largest")
    axis.set_title(
        f"features of {len(features)} pictures: effective rank {effective_rank(features):.1f} of {features.shape[1]}",
        fontsize=10,
    )
    axis.grid(alpha=0.3)
    return _rendered(figure)


def training_curves(runs: dict[str, Sequence[dict[str, Any]]]) -> Image.Image:
    """Reconstruction, and the dimensions that the features fill, over the steps of each run's `metrics.jsonl`."""
    figure = Figure(figsize=(8, 2.8), layout="constrained", dpi=100)
    panels = {"reconstruction_loss": "reconstruction loss", "participation_ratio": "dimensions filled"}
    for axis, (value, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for place, (name, lines) in enumerate(runs.items()):
            axis.plot(
                [line["step"] for line in lines], [line[value] for line in lines], linewidth=2, label=name,
                color=COLOURS[place % len(COLOURS)], linestyle=("-", "--", ":")[place // len(COLOURS) % 3],
                marker="." if len(lines) < 20 else None,
            )  # fmt: skip
        axis.set(xlabel="step")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        axis.legend(fontsize=8)
    return _rendered(figure)


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
    return _rendered(figure)


def _rendered(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
