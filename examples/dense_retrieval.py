"""Dense retrieval: find a part of an image in other images, with frozen features and without training.

    python examples/dense_retrieval.py runs/mine my_images query.jpg --at 0.4 0.6 --output found.png

The patch at a position in the query is compared with every patch of every image, by the cosine of their features. The
figure shows the query with the position marked, and the images with the most similar patches, brighter where they are
more similar. `--size` sets the size at which the images are encoded: a larger one than in training gives finer maps.
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

NUM_RESULTS = 5  # images in the figure


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="run folder, or name on the Hub")
    parser.add_argument("images", help="folder of images to search, or another data set")
    parser.add_argument("query", help="image file")
    parser.add_argument(
        "--at", nargs=2, type=float, default=(0.5, 0.5), help="position in the query: right, down, in 0..1"
    )
    parser.add_argument("--size", type=int, help="side in pixels of the encoded images (default: the model's)")
    parser.add_argument("--layer", type=int, help="use the features after this layer (default: the last)")
    parser.add_argument("--output", default="found.png", help="figure to write (default found.png)")
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
    """A figure of the query and of the NUM_RESULTS images with the patches most similar to the one at `at`."""
    if not all(0 <= position < 1 for position in at):
        raise ValueError(f"--at {at[0]:g} {at[1]:g} lies outside of the image; expected two numbers in [0, 1)")
    encoder = encoder_from_pretrained(model)
    processor = load_processor(model, encoder.config.image_height_width)
    size = size or min(encoder.config.image_height_width)
    prepared = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    layers = None if layer is None else (layer,)

    def maps(image: Image.Image) -> tuple[np.ndarray, torch.Tensor]:
        """The pixels that the encoder sees, (height, width, 3), and its features of length 1, (D, rows, columns)."""
        pixels = processor(image, do_rescale=False, do_normalize=False, **prepared)["pixel_values"][0]
        pixel_values = processor(image, return_tensors="pt", **prepared)["pixel_values"]
        (feature_map,) = encoder.feature_maps(pixel_values, layers, interpolate_pos_encoding=True)
        return np.asarray(pixels).transpose(1, 2, 0).astype(np.uint8), normalize(feature_map[0], dim=0)

    query_pixels, features = maps(open_image(query, query))
    rows, columns = features.shape[1:]
    query_patch = features[:, int(at[1] * rows), int(at[0] * columns)]
    images, results = load_images(dataset), []
    for index in tqdm(range(len(images)), desc=images.description, unit="image"):
        try:
            pixels, features = maps(images.read(index))
        except UnreadableImage as error:
            tqdm.write(f"skipped: {error}")
            continue
        similar = torch.einsum("d,drc->rc", query_patch, features)
        results.append((similar.max().item(), index, pixels, similar.numpy()))
        results = sorted(results, key=lambda result: -result[0])[:NUM_RESULTS]

    figure = Figure(figsize=(2.2 * (1 + len(results)), 2.5), layout="constrained")
    axes = figure.subplots(1, 1 + len(results), squeeze=False)[0]
    axes[0].imshow(query_pixels)
    axes[0].plot(at[0] * size, at[1] * size, "o", markersize=9, markerfacecolor="none", markeredgecolor="#d55e00")
    axes[0].set_title("query", fontsize=9)
    for axis, (cosine, index, pixels, similar) in zip(axes[1:], results, strict=True):
        axis.imshow(pixels)
        axis.imshow(similar, cmap="cividis", alpha=0.6, extent=(0, size, size, 0), interpolation="nearest")
        axis.set_title(f"{images.name_of(index)[-18:]}, {cosine:.2f}", fontsize=8)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    return figure


if __name__ == "__main__":
    main(sys.argv[1:])
