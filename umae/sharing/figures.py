"""Figures of runs and features. Every function returns a PIL image."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import normalize

from modeling_umae import UMAEModel
from umae.evaluation.collapse import effective_rank
from umae.evaluation.reconstruction import to_pixels
from umae.sharing.comparison import OF_THE_TERM, Group

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#000000",
    "#56b4e9",
)  # Okabe and Ito's colour-blind-safe ones

FEATURES = {"cls": "class token", "mean": "mean of the patches"}

SIDE, SPACE, MARGIN = 128, 8, 28  # pixels: of an image in a figure, about, between two images, and for a row's name


def strips(rows: dict[str, np.ndarray]) -> Image.Image:
    """Rows of images with their names beside them, each row uint8 (images, height, width, 3)."""
    height, width = next(iter(rows.values())).shape[1:3]
    scale = SIDE / max(height, width)
    scale = max(1, round(scale)) if scale > 0.5 else scale  # whole pixels, where there are not many of them
    size, resample = (round(width * scale), round(height * scale)), Image.Resampling.NEAREST
    if scale < 1:
        resample = Image.Resampling.LANCZOS
    columns, font = max(map(len, rows.values())), ImageFont.load_default(SIDE // 9)
    right, down = size[0] + SPACE, max(size[1], SIDE) + SPACE  # from one image to the next
    figure = Image.new("RGB", (MARGIN + columns * right, SPACE + len(rows) * down), "white")
    for row, (name, images) in enumerate(rows.items()):
        label = Image.new("L", (down, MARGIN))
        ImageDraw.Draw(label).text((down / 2, MARGIN / 2), name, fill=255, font=font, anchor="mm")
        figure.paste("black", (0, row * down + SPACE // 2), label.rotate(90, expand=True))
        for column, image in enumerate(images):
            place = (MARGIN + column * right, SPACE + row * down + (down - SPACE - size[1]) // 2)
            figure.paste(Image.fromarray(image).resize(size, resample), place)
    return figure


def spectrum(runs: dict[str, dict[str, Sequence[float]]]) -> Image.Image:
    """Singular values of the features on a log scale: of the class token and of the mean of the patch tokens.

    Args:
        runs: by run name, `{"cls": singular values, "mean": singular values}`, descending.
    """
    figure = Figure(figsize=(8, 3), dpi=100)
    figure.subplots_adjust(left=0.085, right=0.99, bottom=0.17, top=0.9, wspace=0.05)
    for axis, (pooling, title) in zip(figure.subplots(1, 2, sharey=True), FEATURES.items(), strict=True):
        for position, (name, spectra) in enumerate(runs.items()):
            values = spectra[pooling]
            rank = effective_rank(torch.diag(torch.tensor(values)))
            label = f"{name}: effective rank {rank:.1f} of {len(values)}".removeprefix(": ")
            largest = values[0] or 1.0
            axis.plot(range(1, len(values) + 1), [value / largest for value in values], label=label, **_line(position))
        axis.set(yscale="log", ylim=(1e-4, 1.5), xlabel="singular value")
        axis.minorticks_off()
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower left")
    figure.axes[0].set_ylabel("share of the largest")
    return rendered(figure)


CURVES = {
    "reconstruction_loss": "reconstruction loss",
    "heldout_reconstruction_loss": "reconstruction loss, held-out images",
    "participation_ratio": "dimensions filled in training",
    "effective_rank_cls": "effective rank, class token",
    "effective_rank_mean": "effective rank, mean of the patches",
    "online_top1": "online linear classifier, accuracy",
    "online_knn_top1": "online k-NN, accuracy",
}


def training_curves(runs: dict[str, Sequence[dict[str, Any]]]) -> Image.Image:
    """The CURVES that the runs' `metrics.jsonl` hold, over the steps; `runs` are its lines by run name."""
    logged = {name for lines in runs.values() for line in lines for name in line}
    panels = {name: title for name, title in CURVES.items() if name in logged}
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(8, 2.4 * rows), dpi=100)
    # In shares of the figure's size; matplotlib's own layouts draw everything twice
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.2 / rows, top=1 - 0.1 / rows, wspace=0.2, hspace=0.5)
    axes = figure.subplots(rows, 2, squeeze=False).flat
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (metric, title) in zip(axes, panels.items(), strict=False):
        for position, (name, lines) in enumerate(runs.items()):
            points = [(line["step"], line[metric]) for line in lines if metric in line]
            steps, values = ([point[column] for point in points] for column in (0, 1))
            axis.plot(steps, values, label=name, **_line(position), marker="." if len(points) < 20 else None)
        axis.set(xlabel="step")
        axis.ticklabel_format(useOffset=False)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if len(runs) > 1:
            axis.legend(fontsize=8)
    return rendered(figure)


def over_weights(groups: Sequence[Group], metrics: Sequence[str]) -> Image.Image:
    """Metrics over the weight of the term, a panel each; every run a point. Lines go through the means over those seeds
    that all points of the line have: of runs that share their initial weights, images, crops and masks.

    Args:
        groups: whose settings have an `uniformity_weight`. Those of weight 0 are where every line begins.
        metrics: to show. Names that differ in the feature alone, `linear/top1/cls` and `linear/top1/mean`, share a
            panel.
    """
    weights = sorted({group.settings["uniformity_weight"] for group in groups})
    variants = dict.fromkeys(variant_of(group) for group in groups if group.settings["uniformity_weight"])
    panels: dict[str, list[str]] = {}
    for metric in metrics:
        panels.setdefault(_of_feature(metric)[0], []).append(metric)
    rows = math.ceil(len(panels) / 2)
    height = 2.6 * rows
    figure = Figure(figsize=(8, height), dpi=100)
    axes = figure.subplots(rows, 2, squeeze=False).flat
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[max(0, len(panels) - 2) : len(panels)]:  # the lowest of each column
        axis.set_xlabel("weight of the term", fontsize=8)
    for axis, (panel, names) in zip(axes, panels.items(), strict=False):
        for position, variant in enumerate(variants or [""]):
            of_variant = [group for group in groups if variant_of(group) in ("", variant)]
            for metric in names:
                feature = _of_feature(metric)[1]
                measured = [group for group in of_variant if metric in group.values]
                if not measured:
                    continue
                places = [weights.index(group.settings["uniformity_weight"]) for group in measured]
                seeds = set.intersection(
                    *({result.seed for result in group.results if metric in result.values} for group in measured)
                )
                line = sorted(zip(places, (group.mean(metric, seeds or None) for group in measured), strict=True))
                style = {"color": COLOURS[position], "linestyle": "--" if feature == "mean" else "-"}
                label = ", ".join(filter(None, (FEATURES.get(feature), variant)))
                axis.plot(*zip(*line, strict=True), **style, label=label)
                for place, group in zip(places, measured, strict=True):
                    values = group.values[metric]
                    colour = COLOURS[position] if group.settings["uniformity_weight"] else "dimgrey"  # of every line
                    axis.plot([place] * len(values), values, ".", color=colour)
        tilt = 0 if len(weights) <= 7 else 25
        axis.set_xticks(range(len(weights)), [f"{weight:g}" for weight in weights], rotation=tilt)
        axis.set_title(title_of(panel), fontsize=10)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    handles = {
        label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    of_features = {label: handle for label, handle in handles.items() if label.startswith(tuple(FEATURES.values()))}
    handles = of_features or handles  # a metric without a feature has the line of its term on the class token
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="upper center", ncols=2, frameon=False)
    legend = 0.2 * math.ceil(len(handles) / 2) + 0.38  # inches, with the first panels' titles
    figure.subplots_adjust(
        left=0.075, right=0.985, bottom=0.65 / height, top=1 - legend / height, wspace=0.2, hspace=0.5
    )
    return rendered(figure)


def variant_of(group: Group) -> str:
    """What of a group's settings is not its weight, in words; empty for weight 0, where the term's do not matter."""
    of_the_term = {"pooling": "cls"} | {name: value for name, value in group.settings.items() if name in OF_THE_TERM}
    others = [f"{name} {value}" for name, value in group.settings.items() if name not in OF_THE_TERM]
    weight, pooling = of_the_term.pop("uniformity_weight"), of_the_term.pop("pooling")
    if not weight:
        return ", ".join(others)
    words = [str(value).replace("_", " ") for value in of_the_term.values()]
    return ", ".join([f"term on the {FEATURES[pooling]}", *words, *others])


METRICS = {
    "top1": "",
    "mean_class_top1": "mean per class",
    "knn20_top1": "20-NN",
    "effective_rank": "effective rank",
}


def title_of(metric: str) -> str:
    """`linear/knn20_top1/cls` -> `linear, 20-NN, class token`."""
    return ", ".join(
        filter(None, ((METRICS | FEATURES).get(part, part.replace("_", " ")) for part in metric.split("/")))
    )


def _of_feature(metric: str) -> tuple[str, str]:
    """`linear/top1/cls` -> (`linear/top1`, `cls`)."""
    stem, _, feature = metric.rpartition("/")
    return (stem, feature) if feature in FEATURES else (metric, "")


def nearest_neighbours(images: np.ndarray, features: torch.Tensor, queries: Sequence[int]) -> Image.Image:
    """Query images, and below each its five nearest neighbours by the cosine of the features.

    Args:
        images: uint8 (N, height, width, channels).
        features: (N, D).
        queries: indices of the query images.
    """
    directions = normalize(features, dim=1)
    cosines = directions[list(queries)] @ directions.T
    cosines[range(len(queries)), list(queries)] = -torch.inf
    nearest = cosines.topk(min(5, len(features) - 1), dim=1).indices.T
    names = ("nearest", "2nd", "3rd", "4th", "5th")
    rows = {"image": images[list(queries)]}
    rows |= {name: images[positions.numpy()] for name, positions in zip(names, nearest, strict=False)}
    return strips(rows)


@torch.no_grad()
def class_attention(
    encoder: UMAEModel, pixel_values: torch.Tensor, mean: Sequence[float], std: Sequence[float]
) -> Image.Image:
    """Attention maps: of the class token to every patch in the last layer, averaged over the heads.

    Args:
        encoder: in evaluation mode, with `attn_implementation="eager"`.
        pixel_values: (images, channels, height, width), normalised by `mean` and `std`.
    """
    attention = encoder(pixel_values, output_attentions=True).attentions[-1].float().mean(dim=1)[:, 0, 1:]
    attention = attention / attention.amax(dim=1, keepdim=True)
    patch_height, patch_width = encoder.config.patch_height_width
    maps = attention.unflatten(1, (-1, pixel_values.shape[3] // patch_width)).cpu().numpy()
    pixels = (colormaps["cividis"](maps)[..., :3] * 255).round().astype(np.uint8)  # readable when colour-blind
    pixels = pixels.repeat(patch_height, axis=1).repeat(patch_width, axis=2)
    return strips({"image": to_pixels(pixel_values, mean, std), "attention": pixels})


def _line(position: int) -> dict[str, Any]:
    """Line style of the run at this position."""
    return {
        "color": COLOURS[position % len(COLOURS)],
        # Dashes over a wider solid line: curves that coincide stay visible
        "linestyle": ("-", "--", ":", "-.")[position % 4],
        "linewidth": 2.5 if position % 4 == 0 else 1.8,
    }


def data_url(image: Image.Image) -> str:
    """An image as a `data:` URL, for pages that need no other file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def rendered(figure: Figure) -> Image.Image:
    """A figure as an image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
