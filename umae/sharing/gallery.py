"""The figures of a run folder: reconstructions, attention maps, spectrum, nearest neighbours, training curves."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from modeling_umae import UMAEForPreTraining
from umae import seeding
from umae.convert import set_pooling
from umae.data.inputs import load_processor
from umae.evaluation.collapse import singular_values
from umae.evaluation.features import frozen_features
from umae.evaluation.reconstruction import FIGURE_IMAGES, reconstructions, to_pixels
from umae.files import write_text
from umae.sharing.cards import read_metrics
from umae.sharing.figures import class_attention, nearest_neighbours, spectrum, strips, training_curves

STEPS_FOLDER = "reconstructions"  # one tile for each evaluation during training
MOST_ROWS = 6  # evaluations shown in `progress.png`
BATCH = 64


def save_tile(folder: Path, step: int, rows: dict[str, np.ndarray]) -> np.ndarray:
    """Save the result of `reconstructions` as one image, and return it: uint8 (height, width, channels)."""
    tile = np.concatenate([np.concatenate(row, axis=1) for row in rows.values()])
    (folder / STEPS_FOLDER).mkdir(exist_ok=True)
    Image.fromarray(tile).save(folder / STEPS_FOLDER / f"step-{step:08}.png")
    return tile


def read_tile(path: Path, height: int, width: int) -> dict[str, np.ndarray]:
    """The rows that `save_tile` saved, for images of this size."""
    tile = np.asarray(Image.open(path))
    rows = tile.reshape(-1, height, tile.shape[1] // width, width, tile.shape[2]).swapaxes(1, 2)
    return dict(zip(("original", "visible", "predicted", "pasted"), rows, strict=True))


@torch.inference_mode()
def draw(
    folder: Path, images: Sequence[tuple[int, Image.Image | np.ndarray]], description: str, device: torch.device
) -> None:
    """Write all figures of a finished run into its folder.

    Args:
        images: (index, image) of the images to encode.
        description: of their data set.
    """
    model = UMAEForPreTraining.from_pretrained(folder, attn_implementation="eager")
    model.to(device).eval()  # type: ignore[arg-type]  # transformers annotates the wrapped `to` without `self`
    processor = load_processor(str(folder))
    mean, std, config = processor.image_mean, processor.image_std, model.config
    pixel_values = torch.cat([processor(images=image, return_tensors="pt")["pixel_values"] for _, image in images])

    index = torch.tensor([index for index, _ in images[:FIGURE_IMAGES]])
    noise = seeding.uniform(0, seeding.MASK, 1, index, config.grid[0] * config.grid[1]).to(device)
    first = pixel_values[:FIGURE_IMAGES].to(device)
    rows = reconstructions(model(first, noise=noise), first, config, mean, std)
    strips(rows).save(folder / "reconstructions.png")
    draw_progress(folder, *config.image_height_width)
    training_curves({"": read_metrics(folder)}).save(folder / "curve.png")

    class_attention(model.vit, first, mean, std).save(folder / "attention.png")
    pooling, encoder = config.pooling, set_pooling(model.vit, "mean")
    features = torch.cat([frozen_features(encoder, batch.to(device)).cpu() for batch in pixel_values.split(BATCH)])
    spectra: dict[str, Sequence[float]] = {
        name: singular_values(features[:, column]) for column, name in enumerate(("cls", "mean"))
    }
    write_text(folder / "spectrum.json", json.dumps({"pictures": f"{len(images)} of {description}", **spectra}))
    spectrum({"": spectra}).save(folder / "spectrum.png")
    pixels = to_pixels(pixel_values, mean, std)
    feature = features[:, ("cls", "mean").index(pooling)]
    nearest_neighbours(pixels, feature, range(min(FIGURE_IMAGES, len(pixels)))).save(folder / "neighbours.png")


def draw_progress(folder: Path, height: int, width: int) -> None:
    """Reconstructions at up to MOST_ROWS evaluations, from the first to the last, below each other."""
    tiles = sorted((folder / STEPS_FOLDER).glob("step-*.png"))
    if not tiles:
        return
    positions = sorted({round(row * (len(tiles) - 1) / (MOST_ROWS - 1)) for row in range(MOST_ROWS)})
    last = read_tile(tiles[-1], height, width)
    rows = {"original": last["original"], "visible": last["visible"]}
    for position in positions:
        step = int(tiles[position].stem.removeprefix("step-"))
        rows[f"step {step:,}"] = read_tile(tiles[position], height, width)["pasted"]
    strips(rows).save(folder / "progress.png")
