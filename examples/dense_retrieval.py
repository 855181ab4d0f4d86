"""Where is the same thing in other images? Retrieval of a part of an image, with frozen features and no training.

    python examples/dense_retrieval.py runs/mine my_images query.jpg --at 0.4 0.6 --output found.png

The patch at a place of the query is compared with every patch of every image, by the cosine of their features. The
result shows the query, its place marked, and the images with the most similar patches, brighter where they are more
similar. `--size` reads the images at a size of one's own, for finer maps than those of training.
"""

import argparse
import sys

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from image_processing_umae import UnreadableImage, open_image
from umae.convert import encoder_from_pretrained
from umae.data.images import load_images
from umae.data.inputs import load_processor

SHOWN = 5


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="run folder, or name on the Hub")
    parser.add_argument("images", help="folder of images to search in, or another data set")
    parser.add_argument("query", help="image file")
    parser.add_argument(
        "--at", nargs=2, type=float, default=(0.5, 0.5), help="place in the query: right, down, in 0..1"
    )
    parser.add_argument("--size", type=int, help="side in pixels at which images are read (default: the model's)")
    parser.add_argument("--layer", type=int, help="after which layer (default: the last)")
    parser.add_argument("--output", default="found.png", help="image to write (default found.png)")
    args = parser.parse_args(argv)
    try:
        figure = search(args.model, args.images, args.query, args.at, args.size, args.layer)
    except ValueError as error:
        raise SystemExit(f"dense_retrieval: {error}") from error
    figure.savefig(args.output, dpi=100)
    print(args.output)


@torch.inference_mode()
def search(
    model: str, dataset: str, query: str, at: tuple[float, float], size: int | None = None, layer: int | None = None
) -> Figure:
    """The query and the SHOWN images whose most similar patch is most similar to the one at `at`."""
    if not all(0 <= position < 1 for position in at):
        raise ValueError(f"--at {at[0]:g} {at[1]:g} lies outside of the image; expected two numbers from 0 up to 1")
    encoder = encoder_from_pretrained(model)
    processor = load_processor(model, encoder.config.image_height_width)
    size = size or min(encoder.config.image_height_width)
    prepared = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    layers = None if layer is None else (layer,)

    def maps(image: Image.Image) -> tuple[np.ndarray, torch.Tensor]:
        """The pixels that the encoder sees, and its features, (D, rows, columns), of length 1."""
        pixels = processor(image, do_rescale=False, do_normalize=False, **prepared)["pixel_values"][0]
        pixel_values = processor(image, return_tensors="pt", **prepared)["pixel_values"]
        (found,) = encoder.feature_maps(pixel_values, layers, interpolate_pos_encoding=True)
        return np.asarray(pixels).transpose(1, 2, 0).astype(np.uint8), normalize(found[0], dim=0)

    shown, features = maps(open_image(query, query))
    rows, columns = features.shape[1:]
    part = features[:, int(at[1] * rows), int(at[0] * columns)]
    images, found = load_images(dataset), []
    for index in tqdm(range(len(images)), desc=images.description, unit="image"):
        try:
            pixels, features = maps(images.read(index))
        except UnreadableImage as error:
            tqdm.write(f"skipped: {error}")
            continue
        similar = torch.einsum("d,drc->rc", part, features)
        found.append((similar.max().item(), index, pixels, similar.numpy()))
        found = sorted(found, key=lambda one: -one[0])[:SHOWN]

    figure = Figure(figsize=(2.2 * (1 + len(found)), 2.5), layout="constrained")
    axes = figure.subplots(1, 1 + len(found), squeeze=False)[0]
    axes[0].imshow(shown)
    axes[0].plot(at[0] * size, at[1] * size, "o", markersize=9, markerfacecolor="none", markeredgecolor="#d55e00")
    axes[0].set_title("query", fontsize=9)
    for axis, (cosine, index, pixels, similar) in zip(axes[1:], found, strict=True):
        axis.imshow(pixels)
        axis.imshow(similar, cmap="cividis", alpha=0.6, extent=(0, size, size, 0), interpolation="nearest")
        axis.set_title(f"{images.name_of(index)[-18:]}, {cosine:.2f}", fontsize=8)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    return figure


if __name__ == "__main__":
    main(sys.argv[1:])
