"""What a run is told of its images, or measures: channels, range, mean and deviation."""

import datasets
import numpy as np
import pytest
from PIL import Image

from umae.data.decoding import RGB, Reading
from umae.data.images import load_images
from umae.data.inputs import IMAGENET_MEAN, IMAGENET_STD
from umae.data.intensities import find_inputs, first_image, spread_of
from umae.data.streaming import load_stream

TWELVE = 4095


def found(images, num_channels: int, *arguments, **more):
    return find_inputs(images, first_image(images, num_channels), num_channels, *arguments, **more)


def cells(path, count: int = 12, channels: int = 7, highest: int = TWELVE):
    """A folder of arrays of 16 bits whose channels differ in brightness."""
    path.mkdir()
    arrays = []
    for i in range(count):
        units = np.random.default_rng(i).random((10, 12, channels)) * np.linspace(0.2, 1, channels)
        arrays.append((units * highest).round().astype(np.uint16))
        np.save(path / f"{i:02}.npy", arrays[-1])
    return load_images(str(path)), np.stack(arrays)


def test_by_default_arrays_are_measured_and_photographs_are_normalised_by_imagenet(tmp_path):
    images, arrays = cells(tmp_path / "cells")
    assert first_image(images).channels == 7
    inputs, warning = found(images, 7)
    assert inputs.reading == Reading(7, "full")
    assert np.allclose(inputs.image_mean, arrays.mean((0, 1, 2)) / 65535, rtol=1e-5)
    assert np.allclose(inputs.image_std, arrays.std((0, 1, 2)) / 65535, rtol=1e-5)
    assert warning == f"the values reach {arrays.max():,} of 65,535; with intensity_range set they fill the range"
    photographs = load_images("digits", split="test")
    assert first_image(photographs).channels is None
    inputs, warning = found(photographs, 3)
    assert (inputs.reading, inputs.image_mean, inputs.image_std, warning) == (RGB, IMAGENET_MEAN, IMAGENET_STD, "")
    assert found(photographs, 1)[0].image_mean != IMAGENET_MEAN[:1]


@pytest.mark.parametrize(("highest", "warns"), [(TWELVE, True), (2 * TWELVE, False)])
def test_grey_files_of_twelve_bits_in_sixteen_are_warned_about_as_rgb_too(tmp_path, highest, warns):
    for i in range(4):
        values = np.linspace(0, highest, 100).reshape(10, 10).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / f"{i}.png")
    assert bool(found(load_images(str(tmp_path)), 3)[1]) == warns


def test_ranges_of_the_set_are_those_of_all_channels_and_its_numbers_follow(tmp_path):
    images, arrays = cells(tmp_path / "cells")
    whole = found(images, 7, "set")[0]
    assert whole.reading.intensity_range == (arrays.min(), arrays.max())
    assert np.allclose(whole.image_mean, (arrays.mean((0, 1, 2)) - arrays.min()) / np.ptp(arrays), rtol=1e-4)
    most, _ = found(images, 7, "percentiles")
    low, high = np.percentile(arrays, (0.1, 99.9))
    assert np.allclose(most.reading.intensity_range, (low, high), rtol=1e-5)
    clipped = (arrays.clip(low, high) - low) / (high - low)
    assert np.allclose(most.image_std, clipped.std((0, 1, 2)), rtol=1e-3)
    own = found(images, 7, "image")[0]
    lowest, width = arrays.min((1, 2, 3), keepdims=True), np.ptp(arrays, axis=(1, 2, 3), keepdims=True)
    assert np.allclose(own.image_mean, ((arrays - lowest) / width).mean((0, 1, 2)), rtol=1e-4)


def test_numbers_are_taken_as_text_and_as_sequences(tmp_path):
    images, _ = cells(tmp_path / "cells", channels=2)
    for given in (("-100,900", "0.5,0.25", "0.1,0.2"), ([-100, 900], (0.5, 0.25), [0.1, 0.2])):
        inputs, warning = found(images, 2, *given)
        assert (inputs.reading, warning) == (Reading(2, (-100.0, 900.0)), "")
        assert (inputs.image_mean, inputs.image_std) == ((0.5, 0.25), (0.1, 0.2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), r"^intensity_range 'nothing'; expected full, set, percentiles, image, or numbers"),
        (("5,5",), r"^intensity_range 5,5 is empty"),
        (("9,5",), r"^intensity_range 9,5 is empty"),
        (("1,2,3",), r"^intensity_range \[1.0, 2.0, 3.0\]; expected full, image, or two numbers"),
        (("0,inf",), r"^intensity_range '0,inf'; expected finite numbers"),
        (("full", "0.5,0.5"), r"^image_mean has 2 numbers, and the images 7 channels"),
        (("full", "imagenet"), r"^image_mean has 3 numbers, and the images 7 channels"),
        (("full", "half"), r"^image_mean 'half'; expected imagenet, measure, or numbers"),
        (("full", None, "1,1,1,0,1,1,1"), r"^image_std is 0 in channel 4 of 7; give numbers above 0"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        found(cells(tmp_path / "cells", 2)[0], 7, *arguments)


def test_a_constant_channel_and_a_constant_set_are_refused(tmp_path):
    for i in range(3):
        np.save(
            tmp_path / f"{i}.npy", np.dstack([np.full((6, 6), 7), np.arange(36).reshape(6, 6) + i]).astype(np.uint8)
        )
    images = load_images(str(tmp_path))
    with pytest.raises(ValueError, match=r"^image_std is 0 in channel 1 of 2; give numbers above 0, such as 1 for a"):
        found(images, 2)
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.full((6, 6, 2), 7))
    with pytest.raises(ValueError, match=r"^intensity_range set: the values of .* go from 7 to 7, an empty range"):
        found(images, 2, "set")


def test_a_shape_that_does_not_say_and_images_that_cannot_be_read_are_refused_with_what_to_do(tmp_path):
    np.save(tmp_path / "0.npy", np.zeros((8, 8, 8), np.uint8))
    images = load_images(str(tmp_path))
    with pytest.raises(ValueError, match=r"^folder .* does not say which side is the channels; give num_channels"):
        first_image(images)
    with pytest.raises(ValueError, match=r"^none of the 1 images .* can be read: 0.npy: an array of shape"):
        found(images, 5, "set")
    np.save(tmp_path / "0.npy", np.random.default_rng(0).random((8, 8, 16)))
    assert len(found(images, 16)[0].image_mean) == 16


def test_what_is_measured_is_the_same_every_time_and_of_a_number_of_images_and_values(tmp_path, monkeypatch):
    images, _ = cells(tmp_path / "cells")
    whole = found(images, 7, "percentiles", seed=3)
    assert found(images, 7, "percentiles", seed=3) == whole
    monkeypatch.setattr("umae.data.intensities.MOST_IMAGES", 5)
    assert found(images, 7, "percentiles", seed=3) != whole
    monkeypatch.setattr("umae.data.intensities.MOST_VALUES", 1)
    (first,) = (image for _, image in list(images.read_as(Reading(7, None)).sample(0, 12))[:1])
    spread = spread_of(images.read_as(Reading(7, None)), 0, 12)
    assert (spread.lowest, spread.highest) == (first.min(), first.max())


def test_streams_are_measured_as_folders_are(tmp_path):
    (tmp_path / "stream").mkdir()
    images, _ = cells(tmp_path / "cells")
    files = [(tmp_path / "cells" / f"{i:02}.npy").read_bytes() for i in range(12)]
    rows = [{"bytes": file, "path": None} for file in files]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    datasets.Dataset.from_dict({"image": rows}, features).to_parquet(tmp_path / "stream" / "train.parquet")
    stream = load_stream(str(tmp_path / "stream"), None, "train", None)
    assert first_image(stream).channels == 7
    streamed, _ = found(stream, 7, "set")
    assert streamed.reading == found(images, 7, "set")[0].reading
    assert np.allclose(streamed.image_mean, found(images, 7, "set")[0].image_mean, rtol=1e-5)


def test_four_channels_of_a_tiff_that_pillow_cannot_read_are_warned_about_too(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    values = np.linspace(0, TWELVE, 400).reshape(10, 10, 4).astype(np.uint16)
    tifffile.imwrite(tmp_path / "0.tif", values, photometric="minisblack", planarconfig="contig")
    images = load_images(str(tmp_path))
    assert first_image(images) == (None, False) and "set they fill" in found(images, 4)[1]
