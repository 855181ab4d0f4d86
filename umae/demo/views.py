"""What a model makes of one image, as arrays and figures: reconstructions and attention."""

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from modeling_umae import UMAEForPreTrainingOutput
from umae import seeding
from umae.demo.models import DemoModel
from umae.evaluation.reconstruction import reconstructions
from umae.sharing.figures import rendered

SIDE = 448  # pixels, about, of an image on the page


def random_hidden(grid: tuple[int, int], mask_ratio: float, seed: int) -> np.ndarray:
    """Patches hidden at random, as in training: bool (rows, columns), True where hidden; at least one is visible.

    With the same seed a larger ratio hides the same patches and more.
    """
    count = grid[0] * grid[1]
    noise = seeding.uniform(seed, seeding.MASK, 1, torch.tensor([0]), count)[0]
    hidden = np.ones(count, bool)
    hidden[noise.argsort(stable=True)[: max(1, int(count * (1 - mask_ratio)))].numpy()] = False
    return hidden.reshape(grid)


@torch.inference_mode()
def reconstruct(model: DemoModel, pixel_values: torch.Tensor, hidden: np.ndarray) -> dict[str, np.ndarray]:
    """What the model sees of an image and what it predicts, by name, uint8 (height, width, 3) each.

    Args:
        pixel_values: (1, channels, height, width), as of `DemoModel.prepare`.
        hidden: bool (rows, columns), True where a patch is hidden.

    Returns:
        `visible`, hidden patches in grey; `predicted`, the predictions, visible patches in grey; `pasted`, the
        visible patches and the predictions of the hidden ones; `original`.

    Raises:
        ValueError: the model has no decoder, or no patch is visible.
    """
    if model.pretraining is None:
        raise ValueError(f"{model.name} has no decoder, so it reconstructs nothing; give a pre-trained U-MAE or MAE")
    if hidden.all():
        raise ValueError(f"all {hidden.size} patches are hidden; show at least one")
    pixel_values = pixel_values.to(model.encoder.device)
    noise = torch.from_numpy(hidden).flatten()[None].float().to(pixel_values.device)
    visible = int((~hidden).sum())
    share = max(0.0, 1 - (visible + 0.5) / hidden.size)  # of which `random_masking` keeps exactly the visible ones
    encoded = model.pretraining.vit(pixel_values, noise=noise, mask_ratio=share, return_dict=True)
    logits, _ = model.pretraining.reconstruct(pixel_values, encoded, all_patches=True)
    output = UMAEForPreTrainingOutput(logits=logits, mask=encoded.mask)
    mean, std = model.processor.image_mean, model.processor.image_std
    rows = reconstructions(output, pixel_values, model.config, mean, std)
    return {name: rows[name][0] for name in ("visible", "predicted", "pasted", "original")}


@torch.inference_mode()
def class_attention(model: DemoModel, pixel_values: torch.Tensor) -> np.ndarray:
    """Attention of the class token to every patch in the last layer: float32 (heads, rows, columns).

    The sum over the patches of a head is at most 1; the rest is the class token's attention to itself.
    """
    output = model.encoder(pixel_values.to(model.encoder.device), output_attentions=True)
    return output.attentions[-1][0, :, 0, 1:].unflatten(1, model.config.grid).float().cpu().numpy()


def attention_figure(weights: np.ndarray, title: str) -> Image.Image:
    """One map of `class_attention`, (rows, columns), with its scale in percent of the token's attention."""
    figure = Figure(figsize=(4.6, 3.9), dpi=110)
    axis = figure.add_axes((0.02, 0.03, 0.76, 0.88))  # matplotlib's own layouts draw everything twice
    shown = axis.imshow(100 * weights, cmap="cividis", vmin=0)
    bar = figure.colorbar(shown, cax=figure.add_axes((0.81, 0.06, 0.035, 0.82)))
    bar.set_label("% of the class token's attention", fontsize=10)
    bar.ax.tick_params(labelsize=10)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=11)
    return rendered(figure)


def patch_at(x: float, y: float, grid: tuple[int, int]) -> tuple[int, int]:
    """(row, column) of the patch at a position in an image, right and down in 0..1."""
    rows, columns = grid
    return min(max(int(y * rows), 0), rows - 1), min(max(int(x * columns), 0), columns - 1)


def enlarged(pixels: np.ndarray, side: int = SIDE) -> Image.Image:
    """An image for the page, uint8 (height, width, 3): small ones in whole pixels, so that none are blurred."""
    image, factor = Image.fromarray(pixels), side // max(pixels.shape[:2])
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image


def marked(pixels: np.ndarray, patch: tuple[int, int], grid: tuple[int, int], side: int = SIDE) -> Image.Image:
    """`enlarged`, with a frame around the patch at (row, column)."""
    image = enlarged(pixels, side)
    height, width = image.height / grid[0], image.width / grid[1]
    left, top = round(patch[1] * width), round(patch[0] * height)
    right, bottom = round(left + width) - 1, round(top + height) - 1
    line = max(2, side // 110)
    draw = ImageDraw.Draw(image)  # a white line around an orange one is seen on any image
    draw.rectangle((left - 2 * line, top - 2 * line, right + 2 * line, bottom + 2 * line), outline="white", width=line)
    draw.rectangle((left - line, top - line, right + line, bottom + line), outline="#d55e00", width=line)
    return image
