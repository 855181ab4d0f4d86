"""How far the features of a model have collapsed, on pictures of one's own.

from umae.diagnosis import diagnose

print(diagnose("runs/mine", "my_pictures")["cls"]["effective_rank"])
"""

import dataclasses

import torch

from umae import collapse
from umae.convert import encoder_from_pretrained
from umae.data import Pictures, load_pictures
from umae.features import extract_features, load_processor

MEASURES = {
    "effective_rank": collapse.effective_rank,
    "rankme": collapse.rankme,
    "participation_ratio": collapse.participation_ratio,
    "uniformity": collapse.uniformity,
    "mean_cosine": collapse.mean_cosine,
    "feature_norm": collapse.mean_norm,
    "dead_dimensions": collapse.dead_dimensions,
}


def diagnose(
    model: str, dataset: str | Pictures, split: str = "train", most_pictures: int = 2048, batch_size: int = 64
) -> dict[str, dict[str, float]]:
    """The measures of `umae.collapse` for the class token and for the mean of the patches.

    Args:
        model: a run folder, or any U-MAE, MAE or ViT, see `encoder_from_pretrained`.
        dataset: what `load_pictures` knows by this name, or pictures that it has loaded.
        split: which split, of a name.
        most_pictures: the first so many are enough; those that cannot be read are named and left out.
        batch_size: pictures of a forward pass.

    Returns:
        `{"cls": {...}, "mean": {...}}`, each with the names of MEASURES, of unmasked pictures.

    Raises:
        ValueError: there is no such model or data set, or not one picture can be read.
    """
    encoder, processor = encoder_from_pretrained(model, pooling="mean"), load_processor(model)
    pictures = load_pictures(dataset, split=split) if isinstance(dataset, str) else dataset
    shown = pictures.dataset.select(range(min(most_pictures, len(pictures))))
    pictures = dataclasses.replace(pictures, dataset=shown)
    pictures.check_readable()
    features = extract_features(encoder, pictures, processor, batch_size, skip_unreadable=True)
    return {name: measures(values[values.isfinite().all(dim=1)]) for name, values in features.items()}


def measures(features: torch.Tensor) -> dict[str, float]:
    """All of MEASURES for features (pictures, dimensions)."""
    return {name: measure(features) for name, measure in MEASURES.items()}
