"""How far the features of a model have collapsed, measured on any images.

import umae

print(umae.diagnose("runs/mine", "my_images")["cls"]["effective_rank"])
"""

import argparse
import copy
from collections.abc import Sequence

import torch
from accelerate import Accelerator, PartialState

from configuration_umae import UMAEConfig
from modeling_umae import UMAEModel
from umae import seeding
from umae.convert import encoder_from_pretrained
from umae.data.images import Images, load_images
from umae.data.inputs import load_processor
from umae.evaluation.collapse import FeatureStatistics, alignment
from umae.evaluation.features import feature_batches, frozen_features

POOLINGS = ("cls", "mean")
VIEWS = 3  # of an image: unmasked, and under two masks


def diagnose(
    model: str,
    dataset: str | Images,
    split: str = "train",
    most_images: int = 2048,
    batch_size: int = 64,
    untrained: bool = False,
) -> dict[str, dict[str, float]]:
    """The measures of `umae.evaluation.collapse` for the class token and for the mean of the patch tokens.

    Memory does not grow with the number of images. Under a launcher the processes share the images.

    Args:
        model: a run folder, or any U-MAE, MAE or ViT, see `encoder_from_pretrained`.
        dataset: a name as for `load_images`, or images that it has loaded.
        split: which split to load, if `dataset` is a name.
        most_images: how many to encode at most, spread evenly; those that cannot be read are reported and skipped.
        batch_size: images per forward pass.
        untrained: of an encoder like the model's before its first step, for comparison.

    Returns:
        `{"cls": {...}, "mean": {...}}`, each with the keys of `umae.evaluation.collapse.MEASURES`, of the unmasked
        images, and `alignment`, the mean squared distance between two views of an image under different masks.

    Raises:
        ValueError: the model or data set does not exist, or no image can be read.
    """
    encoder = encoder_from_pretrained(model, pooling="mean")
    processor = load_processor(model, encoder.config.image_height_width)
    if untrained:
        encoder = untrained_encoder(encoder.config)
    images = load_images(dataset, split=split) if isinstance(dataset, str) else dataset
    diagnosis, indices = Diagnosis(), images.spread(most_images)
    for views in feature_batches(
        encoder, images, processor, batch_size, 0, Accelerator(), encode_views, 2 * VIEWS, indices,
        skip_unreadable=True,
    ):  # fmt: skip
        for batch in views.split(batch_size):  # the same order of summation on any number of processes
            diagnosis.add(batch)
    if diagnosis.count == 0:
        raise ValueError(f"none of the {len(indices)} images of {images.description} can be read")
    return diagnosis.measures()


def main(argv: Sequence[str]) -> None:
    """Measure how far the features of a model have collapsed, on any images."""
    parser = argparse.ArgumentParser(prog="umae diagnose", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("model", help="folder of a pre-trained model, or its name on the Hub (U-MAE, ViT, ViTMAE)")
    parser.add_argument("dataset", help="folder of images, name on the Hub, or `digits`")
    parser.add_argument("--split", default="train", help="split to measure on (default train)")
    parser.add_argument("--most_images", type=int, default=2048, help="at most this many, spread evenly (default 2048)")
    parser.add_argument("--batch_size", type=int, default=64, help="images per batch (default 64)")
    args = parser.parse_args(argv)
    measures = diagnose(args.model, args.dataset, args.split, args.most_images, args.batch_size)
    before = diagnose(args.model, args.dataset, args.split, args.most_images, args.batch_size, untrained=True)
    columns = measures | {f"{pooling}, untrained": values for pooling, values in before.items()}
    if PartialState().is_main_process:
        print(f"{'':<20}" + "".join(f"{title:>17}" for title in columns))
        for name in measures[POOLINGS[0]]:
            print(f"{name:<20}" + "".join(f"{values[name]:>17.4g}" for values in columns.values()))


def untrained_encoder(config: UMAEConfig) -> UMAEModel:
    """An encoder before its first step, with `pooling="mean"`; leaves the random numbers of the caller as they are."""
    config = copy.deepcopy(config)
    config.pooling = "mean"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UMAEModel._from_config(config)


def encode_views(encoder: UMAEModel, pixel_values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(batch, channels, height, width) -> (batch, 2 * VIEWS, D): `cls` and `mean` of every view."""
    patches = encoder.config.grid[0] * encoder.config.grid[1]
    masks = [seeding.uniform(0, seeding.MASK, view, index, patches) for view in range(1, VIEWS)]
    return torch.cat([frozen_features(encoder, pixel_values, noise=noise) for noise in (None, *masks)], dim=1)


class Diagnosis:
    """What `diagnose` measures, of features that come batch by batch."""

    def __init__(self) -> None:
        self.statistics = {pooling: FeatureStatistics() for pooling in POOLINGS}
        self.distances = dict.fromkeys(POOLINGS, 0.0)

    @property
    def count(self) -> int:
        """Images added so far."""
        return self.statistics["cls"].count

    def add(self, views: torch.Tensor) -> None:
        """Add images: (images, 2 * VIEWS, D) as from `encode_views`; those with NaN are left out."""
        views = views[views.isfinite().all(dim=(1, 2))]
        for column, pooling in enumerate(POOLINGS if len(views) else ()):
            self.statistics[pooling].add(views[:, column])
            self.distances[pooling] += len(views) * alignment(views[:, 2 + column], views[:, 4 + column])

    def measures(self) -> dict[str, dict[str, float]]:
        """`{"cls": {...}, "mean": {...}}`, as `diagnose` returns."""
        return {
            pooling: {**statistics.measures(), "alignment": self.distances[pooling] / self.count}
            for pooling, statistics in self.statistics.items()
        }
