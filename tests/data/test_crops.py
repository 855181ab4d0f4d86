import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import kstest

from image_processing_umae import open_image
from umae import seeding
from umae.data.crops import CROP_NUMBERS, Flips, crop_box, least_side, random_flips, random_resized_crop
from umae.data.decoding import read_pixels, to_tensor
from umae.data.inputs import IMAGENET_MEAN, IMAGENET_STD, flipped, normalize

SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet_sample"
ALMOST_ONE = 1 - 2**-24  # the largest number that seeding.uniform gives


def numbers_for(*first: float, top: float = 0.0, left: float = 0.0) -> torch.Tensor:
    """Numbers whose first attempts are given; all later attempts ask for the whole area as a square."""
    later = [ALMOST_ONE, 0.5] * 10
    return torch.tensor([*first, *later[len(first) :], top, left])


def image_of(height: int, width: int) -> torch.Tensor:
    return torch.arange(3 * height * width).remainder(251).to(torch.uint8).view(3, height, width)


unit = st.floats(0, ALMOST_ONE, width=32)


@given(
    numbers=st.lists(unit, min_size=CROP_NUMBERS, max_size=CROP_NUMBERS),
    height=st.one_of(st.integers(1, 40), st.integers(1, 5000)),
    width=st.one_of(st.integers(1, 40), st.integers(1, 5000)),
    scale=st.sampled_from([(0.2, 1.0), (0.08, 1.0), (1e-9, 1e-8), (1.0, 1.0)]),
    ratio=st.sampled_from([(3 / 4, 4 / 3), (1.0, 1.0), (3.0, 4.0), (0.1, 0.2)]),
)
def test_the_box_lies_inside_the_image_and_is_never_empty(numbers, height, width, scale, ratio):
    top, left, box_height, box_width = crop_box(torch.tensor(numbers), height, width, scale, ratio)
    assert 0 <= top <= top + box_height - 1 < height
    assert 0 <= left <= left + box_width - 1 < width


def test_the_numbers_say_area_ratio_and_place():
    # Half way between 0.2 and 1 of 100 x 100 is 6000 pixels; half way in the logarithm the box is square: 77 x 77.
    # It has 24 positions along each axis.
    assert crop_box(numbers_for(0.5, 0.5, top=0.25, left=0.75), 100, 100) == (6, 18, 77, 77)
    # The smallest area and the largest ratio: 2000 pixels, 4 wide to 3 high, sqrt(1500) by sqrt(2666.7).
    assert crop_box(numbers_for(0.0, ALMOST_ONE, left=ALMOST_ONE), 100, 100) == (0, 48, 39, 52)


def test_the_first_box_that_fits_is_taken():
    # 40 high and 100 wide. Nine tenths of it as a square would be 60 high; a fifth of it is 28 x 28.
    share = (0.9 - 0.2) / 0.8
    assert crop_box(numbers_for(share, 0.5, share, 0.5, 0.0, 0.5), 40, 100) == (0, 0, 28, 28)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (300, 1000, (0, 300, 300, 400)),  # too wide: all its height, 4 wide to 3 high
        (1000, 300, (300, 0, 400, 300)),  # too high: all its width, 3 wide to 4 high
        (100, 110, (0, 0, 100, 110)),  # of an allowed ratio: all of it
        (2, 4000, (0, 1998, 2, 3)),
        (4000, 1, (1999, 0, 1, 1)),
    ],
)
def test_the_middle_is_taken_where_no_box_fits(height, width, box):
    assert crop_box(numbers_for(), height, width, scale=(1.0, 1.0) if height == 100 else (0.9, 1.0)) == box


def test_area_ratio_and_place_follow_torchvisions_law():
    count, side, scale = 2000, 1000, (0.2, 0.5)  # half of a square fits at every allowed ratio: no attempt is lost
    numbers = torch.rand(count, CROP_NUMBERS, generator=torch.Generator().manual_seed(0))
    top, left, height, width = np.array([crop_box(row, side, side, scale) for row in numbers]).T
    uniform = {
        "share of the area": (height * width / side**2 - 0.2) / 0.3,
        "logarithm of the ratio": np.log(width / height) / np.log(16 / 9) + 0.5,
        "top": (top + 0.5) / (side - height + 1),
        "left": (left + 0.5) / (side - width + 1),
    }
    for name, values in uniform.items():
        assert kstest(values, "uniform").pvalue > 0.01, name
    assert abs(np.corrcoef(list(uniform.values())) - np.eye(4)).max() < 4 / math.sqrt(count)


@pytest.mark.parametrize("count", [CROP_NUMBERS - 1, CROP_NUMBERS + 1])
def test_a_wrong_count_of_numbers_is_refused(count):
    with pytest.raises(ValueError, match=f"{count} numbers for a crop; expected CROP_NUMBERS = 22"):
        crop_box(torch.zeros(count), 10, 10)


def test_a_box_of_the_wanted_size_keeps_its_pixels_in_memory_of_its_own():
    image = image_of(100, 100)
    crop = random_resized_crop(image, numbers_for(0.5, 0.5, top=0.25, left=0.75), (77, 77))
    assert torch.equal(crop, image[:, 6:83, 18:95])
    whole = random_resized_crop(image, numbers_for(ALMOST_ONE, 0.5), (100, 100))
    assert torch.equal(whole, image) and whole.data_ptr() != image.data_ptr()


@pytest.mark.parametrize("size", [(8, 12), (300, 5), (2, 1)])
def test_every_image_becomes_a_contiguous_uint8_crop_of_the_size(size):
    for shape in ((1, 1), (3, 500), (500, 3), (40, 30)):
        image = image_of(*shape)
        crop = random_resized_crop(image, numbers_for(), size)
        assert crop.dtype == torch.uint8 and crop.shape == (3, *size) and crop.is_contiguous()
        channels_last = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        channels_last_crop = random_resized_crop(channels_last, numbers_for(), size)
        assert channels_last_crop.is_contiguous() and torch.equal(channels_last_crop, crop)


def test_the_scale_bounds_the_share_of_the_area():
    image = image_of(100, 100)
    crop = random_resized_crop(image, numbers_for(0.0, 0.5), (28, 28), scale=(0.08, 1.0))  # 800 pixels: 28 x 28
    assert torch.equal(crop, image[:, :28, :28])


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no ImageNet sample in ../shared/data")
def test_crops_agree_with_pillows_bicubic():
    generator = torch.Generator().manual_seed(0)
    for path in sorted(SAMPLE.glob("*.JPEG"))[::20]:
        for contrast in (0.5, 1.0):
            image = open_image(path).point(lambda value, c=contrast: round(128 + c * (value - 128)))
            numbers = torch.rand(CROP_NUMBERS, generator=generator)
            top, left, height, width = crop_box(numbers, image.height, image.width)
            box = image.crop((left, top, left + width, top + height))
            expected = np.asarray(box.resize((192, 224), Image.Resampling.BICUBIC)).astype(int)
            crop = random_resized_crop(to_tensor(image), numbers, (224, 192)).permute(1, 2, 0).numpy()
            difference = np.abs(crop - expected)
            # Where a hard edge overshoots 0 or 255, Pillow clips between its two passes; at half contrast none does.
            assert difference.max() <= (2 if contrast == 0.5 else 16)
            assert (difference > 2).mean() < 0.005
            assert difference.mean() < 0.5


def test_the_least_side_is_one_and_a_half_times_what_the_smallest_crop_needs():
    _, _, height, width = crop_box(numbers_for(0.0, 0.0), 10_000, 10_000)  # a fifth of the area, 3 wide to 4 high
    assert least_side((100, 224)) == math.ceil(1.5 * 224 * 10_000 / min(height, width))


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no ImageNet sample in ../shared/data")
def test_crops_of_reduced_jpegs_differ_by_less_than_a_level():
    size, differences = (32, 32), []
    for seed, path in enumerate(sorted(SAMPLE.glob("*.JPEG"))[::4]):
        whole, reduced = (read_pixels(path, min_side=side) for side in (None, least_side(size)))
        scale = round(whole.shape[1] / reduced.shape[1])
        if scale > 1:
            numbers = torch.rand(CROP_NUMBERS, generator=torch.Generator().manual_seed(seed))
            top, left, height, width = (scale * number for number in crop_box(numbers, *reduced.shape[1:]))
            box = whole[None, :, top : top + height, left : left + width]
            expected = torch.nn.functional.interpolate(box, size, mode="bicubic", antialias=True)[0]
            crop = random_resized_crop(reduced, numbers, size)
            differences.append((crop.float() - expected.float()).abs().mean().item())
    assert len(differences) > 40 and np.mean(differences) < 1


def test_only_the_chosen_images_are_mirrored():
    pixel_values = torch.arange(4 * 2 * 2 * 3).view(4, 2, 2, 3)
    flip = torch.tensor([[False, False], [True, False], [False, True], [True, True]])
    after = flipped(pixel_values, flip)
    assert after[1, 0].tolist() == [[14, 13, 12], [17, 16, 15]]
    assert after[2, 0].tolist() == [[27, 28, 29], [24, 25, 26]]
    for image, before, dimensions in zip(after, pixel_values, ([], [-1], [-2], [-1, -2]), strict=True):
        assert torch.equal(image, before.flip(dimensions))


def test_shares_of_the_images_are_mirrored_and_left_and_right_as_ever():
    index = torch.arange(4000)
    flips = random_flips(3, 1, index, Flips(0.5, 0.25))
    assert flips.float().mean(0).tolist() == pytest.approx([0.5, 0.25], abs=0.03)
    assert torch.equal(flips[:, 0], seeding.uniform(3, seeding.FLIP, 1, index, 1)[:, 0] < 0.5)
    assert abs(torch.corrcoef(flips.T.float())[0, 1]) < 0.05, "one says nothing of the other"
    assert not random_flips(3, 1, index, Flips(0.0, 0.0)).any() and random_flips(3, 1, index, Flips(1.0, 1.0)).all()


def test_normalize_is_the_formula_in_float32():
    pixel_values = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    mean, std = np.array(IMAGENET_MEAN)[:, None, None], np.array(IMAGENET_STD)[:, None, None]
    expected = (pixel_values.numpy() / 255 - mean) / std  # in float64
    values = normalize(pixel_values, IMAGENET_MEAN, IMAGENET_STD)
    assert values.dtype == torch.float32
    np.testing.assert_allclose(values, expected, atol=1e-6)
    assert pixel_values[0, 0, 15, 15] == 255  # the input stays


def test_normalize_refuses_another_number_of_channels():
    with pytest.raises(ValueError, match="3 channels, but 1 means and 1 deviations"):
        normalize(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), (0.5,), (0.5,))


def test_imagenet_statistics_are_those_of_rgb():
    assert IMAGENET_MEAN == (0.485, 0.456, 0.406) and IMAGENET_STD == (0.229, 0.224, 0.225)
