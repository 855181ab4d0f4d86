import math

import pytest
import torch
from PIL import Image
from scipy import stats

from umae import seeding
from umae.data.augmentation import (
    AUGMENT_NUMBERS,
    AUGMENTATIONS,
    ERASE_NUMBERS,
    ERASED,
    MIX_NUMBERS,
    Strengths,
    augment,
    beta,
    cut_boxes,
    erased_box,
    mix_pairs,
    rand_augment,
    random_erasing,
    soft_multi_hot,
    soft_targets,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.15)
FILL = (128, 102, 76)


def images(count: int, size: int = 16) -> list[torch.Tensor]:
    numbers = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return list((256 * numbers).to(torch.uint8))


def uniform(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return seeding.uniform(seed, seeding.MIX, 0, torch.arange(count), width)


def changed(crops, epoch, index, **settings):
    return augment(crops, epoch, index, seed=3, strengths=Strengths(**settings), mean=MEAN, std=STD)


def test_an_image_changes_the_same_in_any_batch_and_otherwise_in_every_epoch():
    crops, index = images(24), torch.arange(100, 124)
    whole = changed(crops, 1, index)
    parts = changed(crops[:7], 1, index[:7]) + changed(crops[7:], 1, index[7:])
    assert all(torch.equal(*images) for images in zip(whole, parts, strict=True))
    same = [torch.equal(*images) for images in zip(whole, changed(crops, 2, index), strict=True)]
    assert sum(same) < 8
    assert all(image.shape == (3, 16, 16) and image.dtype == torch.uint8 for image in whole)


def test_everything_turned_off_changes_nothing_and_nothing_is_changed_in_place():
    crops = images(32)
    before = [crop.clone() for crop in crops]
    off = changed(crops, 0, torch.arange(32), horizontal_flip=0, rand_augment=0, random_erasing=0)
    assert all(torch.equal(*images) for images in zip(off, crops, strict=True))
    changed(crops, 0, torch.arange(32), horizontal_flip=1, random_erasing=1)
    assert all(torch.equal(*images) for images in zip(before, crops, strict=True))


def test_each_augmentation_changes_its_share_of_the_images():
    index, crops = torch.arange(2000), images(1) * 2000
    shares = {"horizontal_flip": 0.5, "random_erasing": 0.25, "rand_augment": 9.0}
    for name, share in shares.items():
        off = dict.fromkeys(shares, 0.0)
        after = changed(crops, 0, index, **{**off, name: share})
        found = sum(not torch.equal(image, crops[0]) for image in after) / len(after)
        # Of two operations each is left out half of the time; some leave an image of noise as it is (autocontrast)
        expected = share if name != "rand_augment" else 0.72
        assert abs(found - expected) < 0.04, name


# ------------------------------------------------------------------------------------------------------- RandAugment


@pytest.mark.parametrize(
    ("name", "strength", "before", "after"),
    [
        ("invert", 0.9, 200, 55),
        ("posterize", 0.9, 0b10110101, 0b10000000),  # 4 - int(3.6) = 1 bit
        ("posterize", 0.2, 0b10110101, 0b10110000),
        ("solarize", 0.9, 200, 55),  # above 256 - 230
        ("solarize", 0.9, 20, 20),
        ("solarize_add", 0.9, 100, 199),  # + int(99.0)
        ("solarize_add", 0.9, 128, 128),
        ("brightness", 0.9, 100, 181),  # * (1 + 0.9 * 0.9)
        ("brightness", -0.5, 100, 55),
        ("brightness", -1.0, 100, 10),  # not less than * 0.1
    ],
)
def test_operations_do_to_a_level_what_the_published_policy_says(name, strength, before, after):
    image = AUGMENTATIONS[name](Image.new("RGB", (4, 4), (before,) * 3), strength, FILL)
    assert image.getpixel((1, 1))[0] == after


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_what_comes_in_from_outside_has_the_mean_colour(name):
    for strength in (0.9, -0.9):
        image = AUGMENTATIONS[name](Image.new("RGB", (40, 40)), strength, FILL)
        colours = set(image.get_flattened_data()) if hasattr(image, "get_flattened_data") else set(image.getdata())
        assert FILL in colours and (0, 0, 0) in colours


def test_a_translation_moves_by_its_share_of_the_width_either_way():
    image = Image.new("RGB", (40, 8))
    image.paste((255, 255, 255), (20, 0, 21, 8))
    for strength, column in ((0.5, 11), (-0.5, 29)):  # 0.45 * 0.5 * 40 = 9
        moved = AUGMENTATIONS["translate_x"](image, strength, FILL)
        assert moved.getpixel((column, 4)) == (255, 255, 255) and moved.getpixel((20, 4)) == (0, 0, 0)


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_every_operation_gives_an_rgb_image_of_the_same_size_at_any_strength(name):
    source = Image.fromarray(images(1)[0].permute(1, 2, 0).contiguous().numpy())
    for strength in (-1.0, -0.3, 0.0, 0.3, 1.0):
        image = AUGMENTATIONS[name](source, strength, FILL)
        assert image.size == (16, 16) and image.mode == "RGB"


def test_operations_and_magnitudes_are_drawn_as_the_policy_says(monkeypatch):
    drawn = []

    def note(name):
        return lambda image, strength, fill: drawn.append((name, strength)) or image

    assert len(AUGMENTATIONS) == 15
    for name in AUGMENTATIONS:
        monkeypatch.setitem(AUGMENTATIONS, name, note(name))
    image = images(1)[0]
    for numbers in uniform(3000, AUGMENT_NUMBERS):
        assert torch.equal(rand_augment(image, numbers, 9.0, FILL), image)
    assert abs(len(drawn) - 3000) < 120, "two operations, each half of the time"
    counts = [sum(name == drawn_name for drawn_name, _ in drawn) for name in AUGMENTATIONS]
    assert stats.chisquare(counts).pvalue > 0.001
    strengths = torch.tensor([strength for _, strength in drawn])
    assert abs((strengths > 0).float().mean() - 0.5) < 0.04
    magnitudes = 10 * strengths.abs()
    assert magnitudes.max() <= 10 and abs(magnitudes.median() - 9) < 0.05
    inner = magnitudes[magnitudes < 9]
    assert abs((9 - inner).square().mean().sqrt() - 0.5) < 0.03, "the half that is not cut off at 10"


# ---------------------------------------------------------------------------------------------------- random erasing


def test_erased_boxes_lie_inside_and_have_the_areas_and_shapes_of_the_paper():
    boxes = [erased_box(numbers, 100, 80, 0.25) for numbers in uniform(4000, ERASE_NUMBERS)]
    found = [box for box in boxes if box is not None]
    assert abs(len(found) / 4000 - 0.25) < 0.03
    for top, left, height, width in found:
        assert top >= 0 and left >= 0 and top + height <= 100 and left + width <= 80
        assert ERASED[0] * 0.9 < height * width / 8000 < ERASED[1] * 1.05 and 0.25 < height / width < 4
    assert erased_box(torch.zeros(ERASE_NUMBERS), 100, 80, 0.0) is None


def test_erased_pixels_are_normal_noise_and_all_others_stay():
    image = images(1, 200)[0]
    erased = random_erasing(image, (20, 30, 100, 150), uniform(1, 3 * 100 * 150)[0], MEAN, STD)
    inside = torch.zeros(200, 200, dtype=torch.bool)
    inside[20:120, 30:180] = True
    assert torch.equal(erased[:, ~inside], image[:, ~inside])
    for channel in range(3):
        values = erased[channel][inside] / 255
        assert abs(values.median() - MEAN[channel]) < 0.01
        within = ((values - MEAN[channel]).abs() < STD[channel]).float().mean()
        assert abs(within - 0.683) < 0.02


# --------------------------------------------------------------------------------------------------- mixup and cutmix


@pytest.mark.parametrize("alpha", [0.3, 0.8, 1.0])
def test_lambda_has_the_beta_distribution(alpha):
    drawn = beta(uniform(20_000, 32), alpha)
    assert stats.kstest(drawn.double().numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.001


def mixed(mixup: float, cutmix: float, pairs: int = 200):
    """Pairs of a black and a white image, of the classes 0 and 1."""
    pixel_values = torch.tensor([0.0, 1.0]).repeat(pairs)[:, None, None, None].expand(-1, 3, 8, 8)
    targets = soft_targets(torch.tensor([0, 1]).repeat(pairs), 3, 0.0)
    return mix_pairs(pixel_values, targets, uniform(pairs, MIX_NUMBERS), mixup, cutmix)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_the_target_has_every_class_in_the_share_that_its_image_has_of_the_pixels(mixup, cutmix):
    pixel_values, targets = mixed(mixup, cutmix)
    white = pixel_values.mean(dim=(1, 2, 3))
    assert torch.allclose(targets[:, 1], white, atol=1e-6) and torch.allclose(targets.sum(dim=1), torch.ones(400))
    assert torch.allclose(targets[::2, 1], targets[1::2, 0], atol=1e-6), "both of a pair with one lambda"
    cut = ((pixel_values == 0) | (pixel_values == 1)).flatten(1).all(dim=1).float().mean().item()
    expected = {(0.8, 0.0): 0.0, (0.0, 1.0): 1.0, (0.8, 1.0): 0.5}[mixup, cutmix]
    assert abs(cut - expected) < 0.1 * (0 < expected < 1) + 1e-6


def test_images_are_mixed_with_their_neighbour_only_and_the_mean_of_a_pair_stays():
    pixel_values = torch.arange(8.0)[:, None, None, None].expand(-1, 3, 4, 4)
    targets = soft_targets(torch.arange(8), 8, 0.1)
    after, mixed_targets = mix_pairs(pixel_values, targets, uniform(4, MIX_NUMBERS), 0.8, 1.0)
    pairs = after.unflatten(0, (4, 2))
    assert torch.allclose(pairs.sum(dim=1), pixel_values.unflatten(0, (4, 2)).sum(dim=1), atol=1e-5)
    assert all(2 * i <= pairs[i].min() and pairs[i].max() <= 2 * i + 1 for i in range(4))
    assert torch.allclose(mixed_targets.sum(dim=1), torch.ones(8))


def test_cut_boxes_have_their_share_where_the_image_does_not_end():
    share = torch.tensor([0.25, 0.25, 1.0, 0.0])
    centre = torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.5, 0.5], [0.5, 0.5]])
    assert cut_boxes(share, centre, 16, 16).sum(dim=(1, 2)).tolist() == [64, 16, 256, 0]


def test_smoothed_targets_are_distributions_with_the_label_on_top():
    targets = soft_targets(torch.tensor([2, 0]), 4, 0.1)
    assert torch.allclose(targets[0], torch.tensor([0.025, 0.025, 0.925, 0.025]))
    assert math.isclose(targets[1].sum(), 1.0, rel_tol=1e-6)


def test_the_targets_of_several_classes_are_smoothed_each_for_itself_and_mixed():
    labels = torch.tensor([[True, True, False], [False, False, False]])
    targets = soft_multi_hot(labels, 3, 0.1)
    assert torch.allclose(targets, torch.tensor([[0.95, 0.95, 0.05], [0.05, 0.05, 0.05]]))
    assert torch.equal(soft_multi_hot(labels, 3, 0.0), labels.float())
    pixel_values = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    numbers = torch.rand(1, MIX_NUMBERS, generator=torch.Generator().manual_seed(0))
    mixed, mixed_targets = mix_pairs(pixel_values, targets, numbers, 0.8, 0.0)
    share = 1 - mixed[0].mean()  # of the first image in the first
    assert 0.01 < share < 0.99
    assert torch.allclose(mixed_targets[0], share * targets[0] + (1 - share) * targets[1])
