"""What the figures show."""

import numpy as np
import pytest
import torch
from golden_models import fresh_config

from modeling_umae import UMAEForPreTraining, patchify
from umae.evaluation.reconstruction import reconstructions
from umae.sharing import figures, gallery
from umae.sharing.comparison import Result, compare
from umae.sharing.figures import class_attention, nearest_neighbours, spectrum, training_curves

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def colours(image) -> set[tuple[int, int, int]]:
    return set(image.convert("RGB").getdata())


@pytest.fixture
def images():
    """Normalised images, and their uint8 pixels."""
    pixels = torch.randint(256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels / 255 - mean) / std, pixels.permute(0, 2, 3, 1).byte().numpy()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_a_perfect_prediction_is_the_original(images, norm_pix_loss):
    pixel_values, expected = images
    model = UMAEForPreTraining(fresh_config(norm_pix_loss=norm_pix_loss)).eval()
    output = model(pixel_values)
    true = patchify(pixel_values, model.config.patch_height_width)
    if norm_pix_loss:
        true = (true - true.mean(-1, keepdim=True)) / (true.var(-1, keepdim=True) + 1e-6) ** 0.5
    output.logits = true
    rows = reconstructions(output, pixel_values, model.config, MEAN, STD)
    assert list(rows) == ["original", "visible", "predicted", "pasted"]
    for name in ("original", "pasted"):
        assert np.abs(rows[name].astype(int) - expected).max() <= 1, name


def test_visible_patches_stay_and_hidden_ones_are_grey_or_pasted(images):
    pixel_values, expected = images
    model = UMAEForPreTraining(fresh_config()).eval()
    output = model(pixel_values)
    rows = reconstructions(output, pixel_values, model.config, MEAN, STD)
    size, columns = model.config.patch_height_width[0], model.config.grid[1]
    for image, mask in enumerate(output.mask):
        for patch, hidden in enumerate(mask.tolist()):
            top, left = size * (patch // columns), size * (patch % columns)
            box = (image, slice(top, top + size), slice(left, left + size))
            assert (rows["pasted"][box] == (rows["predicted"] if hidden else expected)[box]).all()
            grey, shown = ("visible", "predicted") if hidden else ("predicted", "visible")
            assert (rows[grey][box] == [128, 102, 76]).all() and (rows[shown][box] == rows["pasted"][box]).all()


def test_a_tile_is_read_as_it_was_saved(images, tmp_path):
    _, pixels = images
    rows = dict.fromkeys(("original", "visible", "predicted"), pixels[:, :8]) | {"pasted": 255 - pixels[:, :8]}
    gallery.save_tile(tmp_path, 7, rows)
    read = gallery.read_tile(tmp_path / "reconstructions" / "step-00000007.png", 8, 16)
    assert all((read[name] == rows[name]).all() for name in rows)


def test_the_neighbours_are_those_with_the_largest_cosines(monkeypatch):
    rows = {}
    monkeypatch.setattr(figures, "strips", rows.update)
    values = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), dtype=np.uint8)
    angles = torch.tensor([0.0, 0.1, 0.3, 3.0, 1.0, 0.6, 2.0, -0.2])
    features = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.arange(1, 9)[:, None]
    nearest_neighbours(values, features, [0])
    assert [int(row[0, 0, 0, 0]) for row in rows.values()] == [0, 1, 7, 2, 5, 4]


def test_attention_maps_are_brightest_at_the_largest_attention_weight(monkeypatch, images):
    rows = {}
    monkeypatch.setattr(figures, "strips", rows.update)
    model = UMAEForPreTraining._from_config(fresh_config(), attn_implementation="eager").eval()
    weights = model.vit(images[0], output_attentions=True).attentions[-1].mean(dim=1)[:, 0, 1:]
    class_attention(model.vit, images[0], MEAN, STD)
    brightness = rows["attention"].astype(float).sum(axis=3)  # cividis grows brighter from dark blue to yellow
    size, columns = model.config.patch_height_width[0], model.config.grid[1]
    for image, positions in enumerate(weights.argmax(dim=1).tolist()):
        patch = brightness[image, size * (positions // columns), size * (positions % columns)]
        assert patch == brightness[image].max()
    assert rows["attention"].shape == (3, 16, 16, 3)


def test_every_run_has_a_colour_of_its_own_in_curves_and_spectra():
    runs = {"one": [{"step": 1, "reconstruction_loss": 1.0}, {"step": 2, "reconstruction_loss": 0.5}]}
    runs["two"] = [{**line, "online_top1": 0.3} for line in runs["one"]]
    names = {tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in figures.COLOURS[:2]}
    assert names <= colours(training_curves(runs))
    spectra = {"cls": [3.0, 1.0, 0.1], "mean": [2.0, 1.9, 0.0]}
    image = spectrum({"one": spectra, "two": {**spectra, "cls": [3.0, 2.5, 2.0]}})
    assert names <= colours(image) and image.width <= 800


def test_colours_differ_for_colour_blind_readers():
    """Red-green blindness, the most frequent kind, leaves luminance and the contrast of blue and yellow."""
    for position, colour in enumerate(figures.COLOURS):
        for other in figures.COLOURS[:position]:
            (r, g, b), (r2, g2, b2) = (tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in (colour, other))
            luminance, blue = 0.3 * (r - r2) + 0.6 * (g - g2) + 0.1 * (b - b2), b - b2
            assert abs(luminance) + abs(blue) > 30, (colour, other)


def test_curves_have_no_offset_and_two_that_coincide_are_both_visible(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "rendered", lambda figure: drawn.append(figure))
    lines = [{"step": step, "reconstruction_loss": 0.40001 + step * 1e-7} for step in range(0, 100, 10)]
    figures.training_curves({"a": lines, "b": lines})
    (axis, *_) = drawn[0].axes
    drawn[0].canvas.draw()
    assert axis.yaxis.get_offset_text().get_text() == "" and axis.yaxis.get_major_formatter().get_useOffset() is False
    first, second = axis.get_lines()
    assert first.get_linestyle() != second.get_linestyle() and first.get_linewidth() > second.get_linewidth()


@pytest.mark.parametrize("figure", ["training_curves", "over_weights"])
def test_a_place_without_a_curve_stays_empty(monkeypatch, figure):
    drawn = []
    monkeypatch.setattr(figures, "rendered", lambda figure: drawn.append(figure))
    if figure == "training_curves":
        figures.training_curves({"a": [{"step": 1, "reconstruction_loss": 0.4}]})
    else:
        results = [Result("", {"uniformity_weight": weight}, 0, {"linear/top1/cls": 5.0}) for weight in (0.0, 0.1)]
        figures.over_weights(compare(results), ["linear/top1/cls"])
    assert [(bool(axis.lines), axis.axison) for axis in drawn[0].axes] == [(True, True), (False, False)]


def test_a_line_over_the_weights_has_the_same_seeds_at_every_point(monkeypatch):
    """Seed 1 is far worse, and was not done with weight 0.1; the line must not seem to rise for that."""
    drawn, values = [], {(0.0, 0): 50.0, (0.0, 1): 10.0, (0.1, 0): 49.0}
    monkeypatch.setattr(figures, "rendered", lambda figure: drawn.append(figure))
    results = [
        Result("", {"uniformity_weight": weight}, seed, {"linear/top1/cls": value})
        for (weight, seed), value in values.items()
    ]
    figures.over_weights(compare(results), ["linear/top1/cls"])
    line, *points = drawn[0].axes[0].lines
    assert list(line.get_ydata()) == [50.0, 49.0]
    assert sorted(value for of_group in points for value in of_group.get_ydata()) == [10.0, 49.0, 50.0]
