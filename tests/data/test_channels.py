"""Images of any channels, bits and range: the values that a file has arrive, and what cannot is refused by name."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from image_processing_umae import MAX_PIXELS, UnreadableImage, declared_channels, open_image, read_image
from umae.data.batches import TrainingImages, decode_all
from umae.data.crops import CROP_NUMBERS, random_resized_crop
from umae.data.decoding import Reading, stacked
from umae.data.images import load_images
from umae.data.inputs import normalize

TYPES = {"uint8": 255, "uint16": 65535, "float32": 1}
HEIGHT, WIDTH = 9, 11


def values_of(channels: int, kind: str, seed: int = 0, side: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """(height, width, channels) that go from 0 to the largest value of their type."""
    units = np.random.default_rng(seed).random((*side, channels))
    units.flat[:2] = 0, 1
    return (units * TYPES[kind]).round(0 if kind.startswith("u") else 9).astype(kind)


def npy(array: np.ndarray) -> bytes:
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


def png(array: np.ndarray) -> bytes:
    Image.fromarray(array).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def tiff(array: np.ndarray, **options) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(file := io.BytesIO(), array, photometric="minisblack", **options)
    return file.getvalue()


LAYOUTS = {
    "channels last": lambda array: npy(array),
    "channels first": lambda array: npy(array.transpose(2, 0, 1)),
    "of Fortran": lambda array: npy(np.asfortranarray(array)),
    "of the other byte order": lambda array: npy(array.astype(array.dtype.newbyteorder(">"))),
    "TIFF": lambda array: tiff(array, planarconfig="contig"),
    "TIFF in planes": lambda array: tiff(array.transpose(2, 0, 1), planarconfig="separate"),
    "TIFF, large and packed": lambda array: tiff(array, planarconfig="contig", bigtiff=True, compression="zlib"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("channels", [2, 4, 7])
def test_values_arrive_exactly_and_a_sixteen_bit_value_v_is_v_by_65535(channels, kind, layout):
    array = values_of(channels, kind)
    encoded, expected = LAYOUTS[layout](array), array.transpose(2, 0, 1)
    assert np.array_equal(read_image(encoded, "x", channels, None), expected)
    pixels = read_image(encoded, "x", channels)
    assert pixels.dtype == (np.uint8 if kind == "uint8" else np.float32)
    if kind != "uint8":
        expected = expected.astype(np.float32) / np.float32(TYPES[kind])
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("kind", TYPES)
def test_grey_arrays_and_files_arrive_exactly_as_one_channel_and_as_three_equal_ones(kind):
    array = values_of(1, kind)[..., 0]
    expected = array if kind == "uint8" else array.astype(np.float32) / np.float32(TYPES[kind])
    if kind == "float32":
        Image.fromarray(array).save(file := io.BytesIO(), "TIFF")
    for encoded in (npy(array), file.getvalue() if kind == "float32" else png(array)):
        assert np.array_equal(read_image(encoded, "x", 1)[0], expected)
        three = read_image(encoded, "x", 3, (0, TYPES[kind]))
        assert three.dtype == np.float32 and (three == three[:1]).all()
        assert np.allclose(three[0], array / TYPES[kind], atol=1e-7)


@pytest.mark.parametrize("kind", TYPES)
def test_colours_become_grey_by_the_weights_of_pillow(kind):
    array = values_of(3, kind)
    grey = read_image(npy(array), "x", 1)[0] * (1 if kind == "uint8" else 255)
    expected = np.asarray(Image.fromarray(np.rint(array / TYPES[kind] * 255).astype(np.uint8)).convert("L"))
    assert np.abs(grey.astype(float) - expected).max() <= (0 if kind == "uint8" else 1.1)
    if kind == "uint8":
        assert np.array_equal(read_image(png(array), "x", 1)[0], expected)


def test_three_channels_at_the_full_range_are_the_images_of_open_image_and_arrays_keep_their_bits():
    grey, colour = values_of(1, "uint16")[..., 0], values_of(3, "uint16")
    assert np.array_equal(np.asarray(read_image(png(grey))), np.asarray(open_image(png(grey))))
    assert np.array_equal(read_image(npy(values_of(3, "uint8"))), values_of(3, "uint8").transpose(2, 0, 1))
    assert read_image(npy(colour)).dtype == np.float32


def test_four_channels_of_a_file_are_as_they_are_stored_and_transparency_of_fewer_is_on_white():
    array = values_of(4, "uint8")
    assert np.array_equal(read_image(png(array), "x", 4), array.transpose(2, 0, 1))
    white = np.asarray(open_image(png(array)).convert("L"))
    assert np.array_equal(read_image(png(array), "x", 1)[0], white)


@given(st.integers(-1000, 70_000), st.integers(1, 70_000), st.lists(st.integers(0, 65535), min_size=1, max_size=20))
def test_a_range_maps_its_bounds_to_0_and_1_and_clips_what_lies_beyond(low, width, values):
    array = np.array([values], dtype=np.uint16)
    units = read_image(npy(array), "x", 1, (low, low + width))[0]
    assert units.dtype == np.float32
    assert np.allclose(units, np.clip((array.astype(float) - low) / width, 0, 1), atol=1e-7)
    own = read_image(npy(array), "x", 1, "image")[0]
    assert own.min() == 0 and own.max() == (1 if len(set(values)) > 1 else 0)


BAD = {
    "neither the first nor the last side is 7": lambda: npy(values_of(3, "uint8")),
    "both the first and the last side are 7": lambda: npy(np.zeros((7, 5, 7))),
    "not of two or three sides": lambda: npy(np.zeros((7, 5, 5, 5))),
    "no numbers": lambda: npy(np.array([["a", "b"]])),
    "NaN or infinite values": lambda: npy(np.full((7, 5, 5), np.nan, np.float16)),
    "outside the full range of 0 to 1;": lambda: npy(np.full((7, 5, 5), 1.5)),
    "outside the full range of 0 to 65535": lambda: npy(np.full((7, 5, 5), -1)),
    "buffer is smaller": lambda: npy(values_of(7, "uint16"))[:-1],
    "of Pillow's mode RGB, of 3 channels": lambda: png(values_of(3, "uint8")),
    "3 bytes that begin with": lambda: b"abc",
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_refused_by_name(message):
    with pytest.raises(UnreadableImage, match=rf"^sea\.npy: .*{message}.*; expected a whole image of 7 channels"):
        read_image(BAD[message](), "sea.npy", 7)


def test_objects_are_refused_and_nothing_is_unpickled(tmp_path):
    class Opened:
        def __reduce__(self):
            return (tmp_path.joinpath("opened").mkdir, ())

    with pytest.raises(UnreadableImage, match="no numbers"):
        read_image(npy(np.array([[Opened()]])), "x", 1)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("shape", [(MAX_PIXELS, 2), (7, MAX_PIXELS, 1), (1, 5, 2**40), (0, 5)])
def test_the_header_alone_refuses_an_array_that_is_too_large(shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": shape})
    with pytest.raises(UnreadableImage, match=r" x .* values"):
        read_image(file.getvalue(), "x", 1)


def test_colours_of_sixteen_bits_that_pillow_would_cut_to_eight_are_refused_outside_of_plain_rgb():
    rows = b"".join(b"\0" + bytes(6 * WIDTH) for _ in range(HEIGHT))
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    encoded = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )
    assert read_image(encoded).size == (WIDTH, HEIGHT)
    with pytest.raises(UnreadableImage, match="colours of 16 bits"):
        read_image(encoded, "x", 3, (0, 4095))


def test_a_tiff_that_pillow_cannot_read_names_the_library_that_can(monkeypatch):
    encoded = tiff(values_of(7, "uint8"), planarconfig="contig")
    with pytest.raises(UnreadableImage, match="x: a TIFF with 7 channels of 8 bits"):
        read_image(encoded, "x")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(UnreadableImage, match=r"install tifffile, or umae with its extra `tiff`"):
        read_image(encoded, "x", 7)


@pytest.mark.parametrize("cut", range(8, 500, 37))
def test_a_damaged_tiff_is_unreadable_and_nothing_else(cut):
    encoded = tiff(values_of(7, "uint16"), planarconfig="contig")
    for damaged in (encoded[:cut], encoded[:cut] + b"\xff\xff\xff\xff" + encoded[cut + 4 :]):
        try:
            read_image(damaged, "x", 7)
        except UnreadableImage as error:
            assert str(error).startswith("x: ")


def test_files_say_how_many_channels_they_have():
    array = values_of(7, "uint16")
    assert declared_channels(npy(array)) == declared_channels(npy(array.transpose(2, 0, 1))) == 7
    assert declared_channels(npy(array[..., 0])) == 1 and declared_channels(png(array[..., 0])) is None
    for shape in ((8, 8, 8), (9, 7, 20), (7, 7, 9)):
        with pytest.raises(ValueError, match=r"does not say which side is the channels; give num_channels"):
            declared_channels(npy(np.zeros(shape)))
    assert [declared_channels(tiff(array[..., :count], planarconfig="contig")) for count in (2, 3, 4, 5)] == [
        2, None, None, 5,
    ]  # fmt: skip


def square(kind: str, seed: int = 0) -> np.ndarray:
    """Seven channels; the only box with the whole area of an image is that of the image, whatever its ratio was."""
    return values_of(7, kind, seed, (HEIGHT, HEIGHT))


def folder_of(path, kinds):
    path.mkdir()
    for i, kind in enumerate(kinds):
        np.save(path / f"{i}.npy", square(kind, seed=i))
    return load_images(str(path))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_crop_of_the_whole_image_at_its_own_size_has_its_values(tmp_path, kind, in_memory):
    images = folder_of(tmp_path / "images", [kind] * 4).read_as(Reading(7))
    decoded = decode_all(images) if in_memory else None
    crops = TrainingImages(images, (HEIGHT, HEIGHT), 0, decoded, min_scale=1.0)
    batch = crops[0, torch.arange(4)]["pixel_values"]
    shares = normalize(batch, [0.0] * 7, [1.0] * 7)
    for i in range(4):
        expected = square(kind, seed=i).transpose(2, 0, 1).astype(np.float32) / np.float32(TYPES[kind])
        assert np.array_equal(shares[i], expected)


@given(st.integers(0, 2**32 - 1))
def test_crops_of_floats_are_those_of_eight_bits_and_stay_in_their_range(seed):
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(80, 176, (7, 20, 23), generator=generator, dtype=torch.uint8)
    numbers = torch.rand(CROP_NUMBERS, generator=generator)
    floats = random_resized_crop(bits.float() / 255, numbers, (16, 16))
    assert (floats * 255 - random_resized_crop(bits, numbers, (16, 16))).abs().max() <= 1.5, "rounded twice"
    edges = random_resized_crop((bits > 127).float(), numbers, (16, 16))  # which overshoot
    assert edges.min() >= 0 and edges.max() <= 1 and edges.is_contiguous()


def test_images_of_eight_and_of_sixteen_bits_in_one_batch_keep_their_values(tmp_path):
    images = folder_of(tmp_path / "images", ["uint8", "uint16", "uint8"]).read_as(Reading(7))
    assert decode_all(images) is None, "their types differ"
    batch = TrainingImages(images, (HEIGHT, HEIGHT), 0, min_scale=1.0)[0, torch.arange(3)]["pixel_values"]
    assert batch.dtype == torch.float32 and batch.max() <= 1
    assert np.array_equal(batch[0], square("uint8").transpose(2, 0, 1).astype(np.float32) / np.float32(255))
    assert stacked([torch.zeros(1, dtype=torch.uint8)] * 2).dtype == torch.uint8


def test_the_memory_limit_counts_bytes(tmp_path, monkeypatch):
    images = folder_of(tmp_path / "images", ["float32"] * 2).read_as(Reading(7))
    monkeypatch.setattr("umae.data.batches.MEMORY_LIMIT", 2 * 7 * HEIGHT * HEIGHT * 4)
    assert decode_all(images, show_progress=False).pixels.dtype == torch.float32
    monkeypatch.setattr("umae.data.batches.MEMORY_LIMIT", 2 * 7 * HEIGHT * HEIGHT * 4 - 1)
    assert decode_all(images, show_progress=False) is None


def test_arrays_of_other_channels_in_the_same_folder_are_left_out_by_name(tmp_path):
    images = folder_of(tmp_path / "images", ["uint8"] * 3)
    np.save(tmp_path / "images" / "1.npy", values_of(3, "uint8"))
    first, second, third = images.read_as(Reading(7)).read_pixels([0, 1, 2])
    assert isinstance(second, UnreadableImage) and str(second).startswith("1.npy: an array of shape (9, 11, 3)")
    assert first.shape == third.shape == (7, HEIGHT, HEIGHT)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_tiffs_and_those_of_three_channels_that_pillow_does_not_know_keep_their_values(channels, kind):
    array = values_of(channels, kind)
    encoded = tiff(array, planarconfig="contig") if channels > 1 else tiff(array[..., 0])
    pixels = read_image(encoded, "x", channels)
    expected = array.transpose(2, 0, 1).astype(np.float32) / np.float32(TYPES[kind])
    assert np.array_equal(pixels if kind != "uint8" else pixels.astype(np.float32) / np.float32(255), expected)
