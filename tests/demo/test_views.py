"""What the page shows of one image."""

import itertools

import numpy as np
import pytest
import torch
from demo_run import save_run
from PIL import Image

from image_processing_umae import UnreadableImage
from modeling_umae import random_masking
from umae import seeding
from umae.demo import views
from umae.demo.models import load_model

PATCH = 4


@pytest.fixture
def pixel_values():
    return torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def box(row, column):
    return slice(PATCH * row, PATCH * (row + 1)), slice(PATCH * column, PATCH * (column + 1))


def test_the_same_seed_gives_the_same_image_and_another_one_another(model, pixel_values):
    def shown(seed):
        hidden = views.random_hidden((4, 4), 0.75, seed)
        return views.reconstruct(model, pixel_values, hidden)["pasted"]

    assert (shown(1) == shown(1)).all()
    assert (shown(1) != shown(2)).any()


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75, 0.9])
def test_random_patches_are_those_that_training_hides(ratio):
    noise = seeding.uniform(3, seeding.MASK, 1, torch.tensor([0]), 24)
    expected = random_masking(noise, ratio)[1][0].bool().numpy()
    assert (views.random_hidden((4, 6), ratio, 3).flatten() == expected).all()


def test_a_larger_ratio_hides_more_and_never_everything():
    masks = [views.random_hidden((4, 4), ratio, 0) for ratio in (0, 0.25, 0.5, 0.75, 1)]
    assert [int(mask.sum()) for mask in masks] == [0, 4, 8, 12, 15]
    assert all((less <= more).all() for less, more in itertools.pairwise(masks))


def test_pixels_of_a_hidden_patch_change_nothing_and_of_a_visible_one_something(tmp_path, pixel_values):
    # With norm_pix_loss the prediction has no brightness or contrast of its own, and takes them from the image
    model = load_model(str(save_run(tmp_path / "raw", norm_pix_loss=False)))
    hidden = views.random_hidden((4, 4), 0.5, 0)
    hidden[1, 2], hidden[3, 0] = True, False
    before = views.reconstruct(model, pixel_values, hidden)
    for patch, changes in (((1, 2), False), ((3, 0), True)):
        other = pixel_values.clone()
        other[0][(slice(None), *box(*patch))] = 1.5
        after = views.reconstruct(model, other, hidden)
        for name in ("visible", "predicted", "pasted"):
            assert (after[name] != before[name]).any() == changes, (patch, name)
        assert (after["original"] != before["original"]).any()


def test_visible_patches_are_grey_in_the_reconstruction_and_pasted_in_the_other(model, pixel_values):
    hidden = views.random_hidden((4, 4), 0.5, 0)
    rows = views.reconstruct(model, pixel_values, hidden)
    grey = model.pixels(torch.zeros(1, 3, 16, 16))
    for row, column in np.ndindex(4, 4):
        where = box(row, column)
        if hidden[row, column]:
            assert (rows["visible"][where] == grey[where]).all()
            assert (rows["pasted"][where] == rows["predicted"][where]).all()
            assert (rows["pasted"][where] != rows["original"][where]).any()
        else:
            assert (rows["predicted"][where] == grey[where]).all()
            assert (rows["pasted"][where] == rows["original"][where]).all()


def test_all_patches_may_be_visible_but_not_all_hidden(model, pixel_values):
    rows = views.reconstruct(model, pixel_values, np.zeros((4, 4), bool))
    assert (rows["pasted"] == rows["original"]).all()
    with pytest.raises(ValueError, match="all 16 patches are hidden; show at least one"):
        views.reconstruct(model, pixel_values, np.ones((4, 4), bool))


def test_a_model_without_a_decoder_refuses_to_reconstruct(model, pixel_values, tmp_path):
    model.encoder.save_pretrained(tmp_path / "encoder")
    model.processor.save_pretrained(tmp_path / "encoder")
    encoder = load_model(str(tmp_path / "encoder"))
    with pytest.raises(ValueError, match="encoder has no decoder, so it reconstructs nothing"):
        views.reconstruct(encoder, pixel_values, np.zeros((4, 4), bool))
    assert torch.equal(encoder.features(pixel_values)[1], model.features(pixel_values)[1])


def test_attention_weights_are_those_of_the_last_layer(model, pixel_values):
    weights = views.class_attention(model, pixel_values)
    assert weights.shape == (4, 4, 4)
    expected = model.encoder(pixel_values, output_attentions=True).attentions[-1][0, :, 0]
    assert np.allclose(weights.reshape(4, 16), expected[:, 1:].detach())
    to_itself = expected[:, 0].detach().numpy()
    assert np.allclose(weights.sum(axis=(1, 2)) + to_itself, 1)
    assert np.ptp(weights) > 0.01, "else the test sees nothing"


def test_a_position_is_that_of_its_patch():
    assert views.patch_at(0.0, 0.0, (4, 6)) == (0, 0)
    assert views.patch_at(0.99, 0.3, (4, 6)) == (1, 5)
    assert views.patch_at(1.0, 1.0, (4, 6)) == (3, 5)


def test_the_frame_lies_around_its_patch_and_leaves_it_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    plain, framed = (
        np.asarray(image) for image in (views.enlarged(pixels, 160), views.marked(pixels, (1, 2), (4, 4), 160))
    )
    changed = (plain != framed).any(axis=2)
    rows, columns = changed.any(axis=1).nonzero()[0], changed.any(axis=0).nonzero()[0]
    assert not changed[40:80, 80:120].any()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (36, 83, 76, 123)


def test_small_images_are_enlarged_in_whole_pixels_and_large_ones_stay():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    assert (np.asarray(views.enlarged(pixels, 100)) == pixels.repeat(3, 0).repeat(3, 1)).all()
    assert views.enlarged(np.zeros((500, 300, 3), np.uint8), 100).size == (300, 500)


def test_images_are_read_as_training_reads_them(model, tmp_path):
    """Sixteen bits keep their greys, which Pillow's own conversion clips to white; a broken file is named."""
    greys = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(greys).save(tmp_path / "grey.png")
    pixels = model.pixels(model.read(tmp_path / "grey.png", "grey.png"))
    assert np.abs(pixels[..., 0].astype(float) - greys / 257).max() < 1.5
    with pytest.raises(UnreadableImage, match=r"^broken.png: 3 bytes"):
        model.read(b"not", "broken.png")


def test_other_channels_are_read_and_reconstructed(tmp_path):
    from umae.data.decoding import Reading
    from umae.data.inputs import evaluation_processor

    run = save_run(tmp_path / "five", num_channels=5)
    evaluation_processor((16, 16), Reading(5), (0.5,) * 5, (0.5,) * 5).save_pretrained(run)
    model = load_model(str(run))
    values = np.random.default_rng(0).integers(0, 256, (5, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "image.npy", values)
    pixel_values = model.read(tmp_path / "image.npy", "image.npy")
    rows = views.reconstruct(model, pixel_values, views.random_hidden((4, 4), 0.5, 0))
    assert np.abs(rows["original"].astype(int) - values[:3].transpose(1, 2, 0)).max() <= 1
