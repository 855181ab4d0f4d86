"""A map of a folder: its images' features in two dimensions."""

import importlib.util
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.cluster import KMeans
from torch.nn.functional import normalize

from umae.sharing.figures import COLOURS, rendered

CLUSTERS = 8
MOST_NAMED = 12  # classes with a colour and a marker of their own
METHODS = ("PCA", "UMAP") if importlib.util.find_spec("umap") else ("PCA",)


def project(features: torch.Tensor, method: str = "PCA") -> tuple[np.ndarray, tuple[str, str]]:
    """The directions of features (N, D) in two dimensions, float (N, 2), and what the two are called.

    Args:
        method: one of METHODS. UMAP is by the package `umap`.
    """
    directions = normalize(features, dim=1)
    if method == "UMAP":
        import umap

        return umap.UMAP(metric="cosine", random_state=0, n_jobs=1).fit_transform(directions.numpy()), (
            "UMAP 1",
            "UMAP 2",
        )
    left, values, _ = torch.linalg.svd(directions - directions.mean(dim=0), full_matrices=False)
    points = np.zeros((len(directions), 2))
    points[:, : len(values)] = (left * values)[:, :2]
    variances = [*values.square().tolist(), 0.0][:2]
    total = values.square().sum().item() or 1.0
    first, second = (f"{variance / total:.0%} of the variance" for variance in variances)
    return points, (f"1st component, {first}", f"2nd component, {second}")


def clusters(features: torch.Tensor, count: int = CLUSTERS) -> list[str]:
    """The cluster of each of N images, by k-means on the directions of their features (N, D): `cluster 1` and so on."""
    directions = normalize(features, dim=1).numpy()
    different = min(count, len(np.unique(directions, axis=0)))
    labels = KMeans(different, random_state=0, n_init=1).fit_predict(directions)
    return [f"cluster {label + 1}" for label in labels]


def map_figure(points: np.ndarray, axes: tuple[str, str], groups: Sequence[str]) -> Image.Image:
    """A point for each image, (N, 2), coloured by the group of the image.

    The MOST_NAMED largest groups are told apart by colour and marker; the others are grey.
    """
    named = [name for name, _ in Counter(groups).most_common(MOST_NAMED)]
    figure = Figure(figsize=(5.6, 5.6), dpi=110, layout="constrained")
    axis = figure.subplots()
    of_group = np.array(groups)
    others = ~np.isin(of_group, named)
    if others.any():
        label = f"{len(set(of_group[others]))} others"
        axis.scatter(points[others, 0], points[others, 1], s=8, color="#bbbbbb", label=label, linewidths=0)
    for position, name in enumerate(sorted(named)):
        axis.scatter(
            points[of_group == name, 0], points[of_group == name, 1], s=16, color=COLOURS[position % len(COLOURS)],
            marker="o^"[position // len(COLOURS) % 2], alpha=0.75, label=name[:24], linewidths=0,
        )  # fmt: skip
    axis.set_xlabel(axes[0], fontsize=10)
    axis.set_ylabel(axes[1], fontsize=10)
    axis.set(xticks=[], yticks=[])
    figure.legend(loc="outside lower center", ncols=3, fontsize=10, frameon=False, markerscale=2, handletextpad=0.2)
    return rendered(figure)
