"""The page: gradio's components around what the other modules compute. It fetches nothing and sends nothing away."""

import html
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from image_processing_umae import UnreadableImage
from umae.demo import maps, views
from umae.demo.index import Index, nearest, same_class, similar_patches
from umae.demo.models import DemoModel
from umae.evaluation.collapse import MEASURES, singular_values
from umae.sharing.figures import FEATURES, spectrum

EXAMPLES = 12  # images to begin with
FOUND = 8  # neighbours, and images with similar patches
SMALL = 160  # pixels, about, of an image among others
SESSIONS = 100  # browser tabs whose image is kept
MEASURED = {
    "effective_rank": "effective rank",
    "participation_ratio": "dimensions that the directions fill (participation ratio)",
    "mean_cosine": "mean cosine of two images",
}

# Of `Blocks.launch`; gradio's own fonts may be fetched from Google
LAUNCH: dict[str, Any] = {
    "share": False,
    "max_file_size": "64mb",
    "allowed_paths": [],
    "run_history": False,
    "enable_monitoring": False,
    "ssr_mode": False,
    "pwa": False,
    "mcp_server": False,
    "footer_links": [],
    "state_session_capacity": SESSIONS,
    # Gradio's grey (and the orange of the selected tab, below) would be too faint on white
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(
        body_text_color_subdued="*neutral_600"
    ),
    "css": """
        .gradio-container {max-width: 1280px !important; margin: auto}
        .clickable img {cursor: crosshair}
        /* Labels and captions beside the images rather than on them */
        label[data-testid="block-label"] {position: static !important; border: 0 !important; box-shadow: none}
        .grid-wrap {min-height: 0 !important; max-height: none !important; padding-top: 0}
        .four .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr)) !important; padding-top: 0}
        .two .grid-container {grid-template-columns: repeat(2, minmax(0, 1fr)) !important; padding-top: 0}
        .thumbnail-item {display: flex !important; flex-direction: column; aspect-ratio: auto !important}
        .gallery-item, .thumbnail-item {height: auto !important; min-height: 0 !important}
        .grid-container {grid-template-rows: none !important; grid-auto-rows: max-content !important}
        .thumbnail-item .caption-label {
            position: static; width: 100%; max-width: 100%; border: 0; text-align: center; white-space: normal
        }
        .thumbnail-item img {height: auto !important}
        .tab-container > .selected {color: #c2410c}
        .dark .tab-container > .selected {color: #f97316}
        :focus-visible {outline: 3px solid #0b57d0 !important; outline-offset: -3px}
        .dark :focus-visible {outline-color: #8ab4f8 !important}
        input:focus-visible {outline-offset: 1px}
        .measures :is(th, td):not(:first-child) {white-space: nowrap}
        .tabs, .tab-wrapper, .tab-container {min-width: 0 !important}
        @media (max-width: 600px) {
            .found .grid-container {grid-template-columns: repeat(2, minmax(0, 1fr)) !important}
            .tab-container > button {padding: 0 8px}
        }
    """,
}

_NUMBERS = itertools.count()
Event = tuple[Callable, list[Any], list[Any]]  # a function, its inputs and its outputs


@dataclass(frozen=True, eq=False)
class Query:
    """The image that the page is about.

    Args:
        pixel_values: what every model sees of it, (1, channels, height, width).
        row: where it is in the folder's images; None for an image from elsewhere.
    """

    pixel_values: list[torch.Tensor]
    row: int | None = None


def build(models: Sequence[DemoModel], indexes: Sequence[Index] = ()) -> gr.Blocks:
    """The page of one or two models; `launch(**LAUNCH)` shows it.

    Args:
        indexes: of the same images by every model; without, there are no neighbours and no map.
    """
    examples = _of_folder(models, indexes[0]) if indexes else _samples(models)

    def from_file(path: str | None) -> Query:
        assert path is not None
        with _refusals():
            return Query([model.read(path, Path(path).name) for model in models])

    def from_examples(event: gr.SelectData) -> Query:
        return examples[event.index]

    # Uploads and answers are files in a temporary folder; those older than an hour are deleted
    with gr.Blocks(title="U-MAE demo", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("\n\n".join(["# U-MAE demo", *map(_description, models)]))
        query = gr.State(None, time_to_live=3600)
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                file = gr.File(label="Image", height=130)
                gallery = gr.Gallery(
                    [views.enlarged(models[0].pixels(example.pixel_values[0]), SMALL) for example in examples],
                    label="Or one of these", elem_classes="four", allow_preview=False, interactive=False, format="png",
                    buttons=[], height="auto",
                )  # fmt: skip
            with gr.Column(scale=3, min_width=320):
                with gr.Tab("Reconstruct"):
                    events = [_reconstruct(models, query)]
                with gr.Tab("Attention"):
                    events.append(_attention(models, query))
                with gr.Tab("Neighbours"):
                    events += _neighbours(models, indexes, query) if indexes else _no_folder("to search")
                with gr.Tab("Map"):
                    if indexes:
                        function, inputs, outputs = _map(models, indexes)
                        page.load(function, inputs, outputs, show_progress="minimal")
                    else:
                        _no_folder("to map")
        choices = [file.upload(from_file, file, query), gallery.select(from_examples, None, query)]
        file.upload(lambda: None, None, file, show_progress="hidden")  # so that another one can be dropped
        if examples:
            choices.append(page.load(lambda: examples[0], None, query))
        for choice in choices:
            for function, inputs, outputs in events:
                choice.success(function, inputs, outputs, show_progress="minimal")
    return page


def _reconstruct(models: Sequence[DemoModel], query: gr.State) -> Event:
    """Controls and images of the tab; the event hides random patches of a new image."""
    hidden = gr.State(None, time_to_live=3600)  # bool (rows, columns) for every model
    with gr.Row():
        ratio = gr.Slider(0, 1, models[0].config.mask_ratio, step=0.01, label="Share of hidden patches")
        seed = gr.Number(0, precision=0, minimum=0, maximum=2**32 - 1, label="Seed of the random patches")
    shown: list[gr.Image] = []
    clickable: list[tuple[DemoModel, gr.Image]] = []
    for model in models:
        _title(models, model)
        if model.pretraining is None:
            gr.Markdown("These weights have no decoder, so they reconstruct nothing.")
            continue
        with gr.Row():
            clickable.append((model, _image("What it sees (click patches)", clickable=True)))
            shown += [clickable[-1][1], *map(_image, ("Its reconstruction", "Both together", "Original"))]
    if any(model.config.norm_pix_loss for model, _ in clickable):
        gr.Markdown(
            "The model predicts every patch without its brightness and contrast (`norm_pix_loss`); here they are taken "
            "from the original."
        )

    def draw(query: Query, masks: list[np.ndarray]) -> list[Any]:
        images: list[Any] = []
        for model, pixel_values, mask in zip(models, query.pixel_values, masks, strict=True):
            if model.pretraining is not None:
                views_of_it = views.reconstruct(model, pixel_values, mask).values()
                images += [_own_file(views.enlarged(pixels)) for pixels in views_of_it]
        return [masks, *images]

    def hide_random(query: Query | None, ratio: float, seed: float | None) -> Any:
        if query is None:
            return gr.skip()
        return draw(query, [views.random_hidden(model.config.grid, ratio, int(seed or 0)) for model in models])

    def hide_or_show(model: DemoModel) -> Callable:
        def clicked(query: Query | None, masks: list[np.ndarray] | None, event: gr.SelectData) -> Any:
            if query is None or masks is None:
                return gr.skip()
            x, y = _place(model, event)
            changed = [mask.copy() for mask in masks]
            for mask, other in zip(changed, models, strict=True):
                patch = views.patch_at(x, y, other.config.grid)
                mask[patch] = not mask[patch]
            with _refusals():
                return draw(query, changed)

        return clicked

    inputs, outputs = [query, ratio, seed], [hidden, *shown]
    for control in (ratio, seed):
        control.change(hide_random, inputs, outputs, show_progress="hidden", trigger_mode="always_last")
    for model, image in clickable:
        image.select(hide_or_show(model), [query, hidden], outputs, show_progress="hidden")
    return hide_random, inputs, outputs


def _attention(models: Sequence[DemoModel], query: gr.State) -> Event:
    heads = min(model.config.num_attention_heads for model in models)
    chosen = gr.Radio(["mean", *map(str, range(1, heads + 1))], value="mean", label="Head of the last layer")
    with gr.Row():
        outputs = [_image("Original")]
        for model in models:
            name = f"{model.name}: attention" if len(models) > 1 else "Attention"
            outputs.append(_figure(f"{name} of the class token to every patch"))

    def attend(query: Query | None, head: str) -> Any:
        if query is None:
            return gr.skip()
        images = [_own_file(views.enlarged(models[0].pixels(query.pixel_values[0])))]
        for model, pixel_values in zip(models, query.pixel_values, strict=True):
            weights = views.class_attention(model, pixel_values)
            shown = weights.mean(axis=0) if head == "mean" else weights[int(head) - 1]
            title = f"{'mean of the heads' if head == 'mean' else f'head {head}'}; to itself {1 - shown.sum():.0%}"
            images.append(_own_file(views.attention_figure(shown, title)))
        return images

    chosen.change(attend, [query, chosen], outputs, show_progress="hidden")
    return attend, [query, chosen], outputs


def _neighbours(models: Sequence[DemoModel], indexes: Sequence[Index], query: gr.State) -> list[Event]:
    thumbnails = [_thumbnails(model, index) for model, index in zip(models, indexes, strict=True)]
    texts = [index.labels() or [name[-20:] for name in index.names()] for index in indexes]
    feature = _feature(models[0])
    with gr.Row():
        images = [_gallery(models, model, "Nearest images of the folder, and the cosine") for model in models]
    gr.Markdown("### A part of the image\nClick a patch to find the most similar patch of every image in the folder.")
    at = gr.State((0.5, 0.5))  # right and down, in 0..1
    columns = "four" if len(models) == 1 else "two"
    with gr.Row():
        clicked = _image("Click a patch", clickable=True, scale=1)
        patches = [_gallery(models, model, "Images with the most similar patches", columns) for model in models]

    def position(index: Index, query: Query) -> int | None:
        found = (index.rows == (-1 if query.row is None else query.row)).nonzero()
        return int(found[0]) if len(found) else None

    def search(query: Query | None, feature: str) -> Any:
        if query is None:
            return gr.skip()
        galleries = []
        for model, index, pixel_values, thumbnail, text in zip(
            models, indexes, query.pixel_values, thumbnails, texts, strict=True
        ):
            features, _ = model.features(pixel_values)
            found = nearest(index.features[feature], features[feature], FOUND, position(index, query))
            galleries.append(
                [
                    (_own_file(views.enlarged(thumbnail(row), SMALL)), f"{text[row]}, {cosine:.2f}")
                    for row, cosine in found
                ]
            )
        return galleries[0] if len(galleries) == 1 else galleries

    def search_patch(query: Query | None, at: tuple[float, float]) -> Any:
        if query is None:
            return gr.skip()
        where = views.patch_at(*at, models[0].config.grid)
        image = views.marked(models[0].pixels(query.pixel_values[0]), where, models[0].config.grid)
        answers: list[Any] = [_own_file(image)]
        for model, index, pixel_values, thumbnail, text in zip(
            models, indexes, query.pixel_values, thumbnails, texts, strict=True
        ):
            grid = model.config.grid
            row, column = views.patch_at(*at, grid)
            _, tokens = model.features(pixel_values)
            found = similar_patches(index.patches, tokens[row * grid[1] + column], FOUND, position(index, query))
            images = [views.marked(thumbnail(row), divmod(patch, grid[1]), grid, SMALL) for row, patch, _ in found]
            captions = [f"{text[row]}, {cosine:.2f}" for row, _, cosine in found]
            answers.append(list(zip(map(_own_file, images), captions, strict=True)))
        return answers

    def click(query: Query | None, event: gr.SelectData) -> Any:
        place = _place(models[0], event)
        return gr.skip() if query is None else [place, *search_patch(query, place)]

    feature.change(search, [query, feature], images, show_progress="hidden")
    clicked.select(click, [query], [at, clicked, *patches], show_progress="hidden")
    return [(search, [query, feature], images), (search_patch, [query, at], [clicked, *patches])]


def _map(models: Sequence[DemoModel], indexes: Sequence[Index]) -> Event:
    labels = [index.labels() for index in indexes]
    by_label = all(label is not None for label in labels)
    with gr.Row():
        feature = _feature(models[0])
        method = gr.Radio(list(maps.METHODS), value="PCA", label="Method", visible=len(maps.METHODS) > 1)
    with gr.Row():
        colours = "by label" if by_label else "by cluster (k-means)"
        shown = [_figure(f"{model.name}: every image of the folder, coloured {colours}") for model in models]
    spectra = _figure("Spectrum of the features: a line that falls steeply shows collapse")
    table = gr.Markdown(elem_classes="measures")
    runs: dict[str, dict[str, Sequence[float]]] = {
        model.name: {name: singular_values(index.features[name]) for name in FEATURES}
        for model, index in zip(models, indexes, strict=True)
    }

    spectrum_of_runs = spectrum(runs)

    @cache
    def drawn(number: int, feature: str, method: str) -> Image.Image:
        features = indexes[number].features[feature]
        points, axes = maps.project(features, method)
        return maps.map_figure(points, axes, labels[number] or maps.clusters(features))

    @cache
    def measured(feature: str) -> str:
        rows = {"": [model.name for model in models], "---": ["---:"] * len(models)}
        for name, text in MEASURED.items():
            rows[text] = [f"{MEASURES[name](index.features[feature]):.3g}" for index in indexes]
        rows["dimensions of the features"] = [str(index.features[feature].shape[1]) for index in indexes]
        if by_label:
            shares = [same_class(i.features[feature], label or []) for i, label in zip(indexes, labels, strict=True)]
            rows["nearest neighbour of the same class"] = [f"{share:.1%}" for share in shares]
        lines = [f"| {name} | {' | '.join(values)} |" for name, values in rows.items()]
        return "\n".join([f"#### {FEATURES[feature].capitalize()} of {len(indexes[0]):,} images", "", *lines])

    def draw(feature: str, method: str) -> list[Any]:
        figures = [*(drawn(number, feature, method) for number in range(len(models))), spectrum_of_runs]
        return [*map(_own_file, figures), measured(feature)]

    inputs, outputs = [feature, method], [*shown, spectra, table]
    for control in inputs:
        control.change(draw, inputs, outputs, show_progress="minimal")
    return draw, inputs, outputs


def _description(model: DemoModel) -> str:
    config = model.config
    millions = sum(parameter.numel() for parameter in model.encoder.parameters()) / 1e6
    height, width = config.image_height_width
    patch = config.patch_height_width
    text = (
        f"**{html.escape(model.name)}**: an encoder of {millions:.1f} million weights, {config.hidden_size} wide, "
        f"{config.num_hidden_layers} layers, for images of {width} × {height} pixels in patches of "
        f"{patch[1]} × {patch[0]}; weight of the uniformity term {config.uniformity_weight:g}."
    )
    if config.num_channels != 3:
        seen = "open TIFF or .npy files of as many; the first three are shown as red, green and blue"
        seen = seen if config.num_channels > 3 else "the first is shown as grey"
        count = "1 channel" if config.num_channels == 1 else f"{config.num_channels} channels"
        text += f" It sees {count}; {seen}."
    return text


def _of_folder(models: Sequence[DemoModel], index: Index) -> list[Query]:
    """Images of the folder, spread evenly."""
    count = min(EXAMPLES, len(index))
    rows = [int(index.rows[position * len(index) // count]) for position in range(count)]
    readers = [index.images.read_as(model.reading) for model in models]
    return [
        Query([model.prepare(images.read(row)) for model, images in zip(models, readers, strict=True)], row)
        for row in rows
    ]


def _samples(models: Sequence[DemoModel]) -> list[Query]:
    """The two photographs of scikit-learn; none for models of other channels."""
    queries = []
    with suppress(UnreadableImage):
        for pixels in load_sample_images().images:
            image = Image.fromarray(pixels)
            queries.append(Query([model.prepare(model.reading.read(image, "sample")) for model in models]))
    return queries


def _thumbnails(model: DemoModel, index: Index) -> Callable[[int], np.ndarray]:
    """What the model sees of the image at a position of the index, uint8 (height, width, 3)."""
    images = index.images.read_as(model.reading)

    @lru_cache(maxsize=512)
    def thumbnail(position: int) -> np.ndarray:
        return model.pixels(model.prepare(images.read(int(index.rows[position]))))

    return thumbnail


def _own_file(image: Image.Image) -> Image.Image:
    """The same pixels and a number: gradio writes equal PNGs to one file, also while a browser reads it."""
    image = image.copy()
    image.info["number"] = str(next(_NUMBERS))
    return image


@contextmanager
def _refusals() -> Iterator[None]:
    """What is wrong with the input is shown on the page; its text may hold a file's name, so it must not be markup."""
    try:
        yield
    except ValueError as error:  # UnreadableImage is one
        raise gr.Error(html.escape(str(error)), print_exception=False, duration=20) from error


def _no_folder(purpose: str) -> list[Event]:
    gr.Markdown(f"No folder of images was given (`images`) {purpose}.")
    return []


def _title(models: Sequence[DemoModel], model: DemoModel) -> None:
    if len(models) > 1:
        gr.Markdown(f"### {html.escape(model.name)}")


def _feature(model: DemoModel) -> gr.Radio:
    return gr.Radio([(text, name) for name, text in FEATURES.items()], value=model.pooling, label="Feature")


def _image(label: str, clickable: bool = False, **options: Any) -> gr.Image:
    return gr.Image(
        label=label, alt_text=label, interactive=False, format="png",
        **{"buttons": [], "min_width": 150, "elem_classes": ["clickable"] if clickable else [], **options},
    )  # fmt: skip


def _figure(label: str) -> gr.Image:
    return _image(label, buttons=["fullscreen"], min_width=280)


def _gallery(models: Sequence[DemoModel], model: DemoModel, label: str, columns: str = "four") -> gr.Gallery:
    with gr.Column(scale=3 - len(models), min_width=280):
        _title(models, model)
        return gr.Gallery(
            label=label, interactive=False, format="png", buttons=[], allow_preview=False,
            height="auto", object_fit="contain", elem_classes=["found", columns],
        )  # fmt: skip


def _place(model: DemoModel, event: gr.SelectData) -> tuple[float, float]:
    """Where an `enlarged` image of the model was clicked: right and down, in 0..1."""
    width, height = views.enlarged(np.zeros((*model.config.image_height_width, 3), np.uint8)).size
    return event.index[0] / width, event.index[1] / height
