import io
import math
import runpy
import struct
import warnings
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from image_processing_umae import MAX_PIXELS, UnreadableImage, open_image
from umae.data import decoding
from umae.data.decoding import read_pixels, to_tensor

SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet_sample"
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=-1)


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int, colour_type: int, chunks: bytes) -> bytes:
    """A PNG written by hand, for headers that Pillow refuses to write."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + chunks + png_chunk(b"IEND", b"")


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def pixels(source) -> np.ndarray:
    image = open_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def refusal(source) -> str:
    with pytest.raises(UnreadableImage, match=r"^holiday\.jpg: .+; expected a whole image \(JPEG, ") as caught:
        open_image(source, "holiday.jpg")
    return str(caught.value)


@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    mode=st.sampled_from(["RGB", "L"]),
    format=st.sampled_from(["PNG", "BMP", "TIFF", "PPM", "WEBP"]),
    data=st.data(),
)
def test_what_was_written_is_read(height, width, mode, format, data):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    size = math.prod(shape)
    content = data.draw(st.binary(min_size=size, max_size=size))
    written = np.frombuffer(content, np.uint8).reshape(shape)
    expected = written if mode == "RGB" else np.stack([written] * 3, axis=-1)
    options = {"lossless": True} if format == "WEBP" else {}
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(written), format, **options)), expected)


@pytest.mark.filterwarnings("ignore")
@given(format=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]), data=st.data())
def test_damaged_bytes_are_read_or_refused_but_nothing_else_escapes(format, data):
    content = bytearray(encode(Image.fromarray(COLOURS), format))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = open_image(bytes(content))
    except UnreadableImage:
        return
    assert image.mode == "RGB"


def test_bytes_a_path_and_an_image_give_the_same_image(tmp_path):
    image = Image.fromarray(COLOURS)
    image.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), image):
        np.testing.assert_array_equal(pixels(source), COLOURS)


def test_the_given_image_stays_as_it_was():
    image = Image.open(io.BytesIO(encode(Image.fromarray(COLOURS).quantize(8), "PNG", transparency=2)))
    image.getexif()[ExifTags.Base.Orientation] = 6
    image.info["exif"] = image.getexif().tobytes()
    before, information = image.convert("RGBA").tobytes(), dict(image.info)
    open_image(image).putpixel((0, 0), (1, 2, 3))
    assert image.mode == "P" and image.info == information and image.convert("RGBA").tobytes() == before


# Where the top left pixel is in the stored image, and whether rows and columns change places (EXIF 2.32, 4.6.4).
@pytest.mark.parametrize(
    ("orientation", "corner", "swapped"),
    [
        (1, (0, 0), False),
        (2, (0, -1), False),
        (3, (-1, -1), False),
        (4, (-1, 0), False),
        (5, (0, 0), True),
        (6, (-1, 0), True),
        (7, (-1, -1), True),
        (8, (0, -1), True),
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_image_stands_upright_whatever_its_exif_orientation(orientation, corner, swapped, format):
    stored = np.kron(np.arange(6).reshape(2, 3) * 40, np.ones((8, 8))).astype(np.uint8)  # 16 x 24, six flat squares
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    shown = pixels(encode(Image.fromarray(stored).convert("RGB"), format, exif=exif))[..., 0].astype(int)
    assert shown.shape == ((24, 16) if swapped else (16, 24))
    assert abs(shown[4, 4] - int(stored[corner])) <= 2


# ImageWidth as text, Make as a rational, XResolution as text: Pillow 13 reads them all but can rewrite none.
@pytest.mark.parametrize(("tag", "kind"), [(0x100, 2), (0x10F, 5), (0x11A, 2)])
@pytest.mark.parametrize("container", ["eXIf", "zTXt"])
def test_an_image_is_turned_although_another_exif_entry_is_malformed(tag, kind, container):
    entries = sorted([(tag, kind, 1, 8), (0x112, 3, 1, 6)])
    exif = b"II*\0\x08\0\0\0\x02\0" + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    text = f"\nexif\n{len(exif) + 6:8}\n{(b'Exif' + bytes(2) + exif).hex()}\n".encode()  # as ImageMagick writes it
    legacy = b"Raw profile type exif\0\0" + zlib.compress(text)
    metadata = png_chunk(b"eXIf", exif) if container == "eXIf" else png_chunk(b"zTXt", legacy)
    rows = png_chunk(b"IDAT", zlib.compress(bytes(2 * 4)))
    assert open_image(png(3, 2, 8, 0, metadata + rows)).size == (2, 3)


def test_sixteen_bit_png_keeps_its_greys():
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    grey = pixels(encode(Image.fromarray(ramp), "PNG"))
    expected = np.floor(ramp / 257 + 0.5)  # 65535 / 255 = 257
    for channel in range(3):
        np.testing.assert_array_equal(grey[..., channel], expected)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I"])
def test_every_sixteen_bit_mode_means_the_same_greys(mode):
    values = np.array([[0, 128, 129, 32896, 65406, 65407, 65535]])
    kind = {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2", "I": "=i4"}[mode]
    image = Image.frombytes(mode, (7, 1), values.astype(kind).tobytes())
    assert pixels(image)[0, :, 0].tolist() == [0, 0, 1, 128, 254, 255, 255]
    if mode != "I;16L":  # in which Pillow writes no file
        assert pixels(encode(image, "TIFF"))[0, :, 0].tolist() == [0, 0, 1, 128, 254, 255, 255]


def test_sixteen_bit_pgm_keeps_its_greys():
    values = np.array([0, 128, 129, 65407], ">u2")
    assert pixels(b"P5 4 1 65535\n" + values.tobytes())[0, :, 0].tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("values", [[0, 65536], [-1, 5]])
def test_integers_beyond_sixteen_bits_are_refused(values):
    assert f"from {min(values)} to {max(values)}" in refusal(Image.fromarray(np.array([values], np.int32)))


@pytest.mark.filterwarnings("error")  # numpy only warns of a division by zero
@pytest.mark.parametrize(
    ("values", "greys"),
    [
        ([0.0, 0.25, 0.5, 1.0], [0, 64, 128, 255]),
        ([0.25, 0.25, 0.5, 0.5], [64, 64, 128, 128]),  # within 0..1: not stretched
        ([-1.0, 0.0, 1.0, 3.0], [0, 64, 128, 255]),
        ([-1.0, -0.5, 0.0, 1.0], [0, 64, 128, 255]),
        ([100.0, 200.0, 300.0, 500.0], [0, 64, 128, 255]),
        ([7.0, 7.0, 7.0, 7.0], [0, 0, 0, 0]),
        ([-3.4e38, 0.0, 0.0, 3.4e38], [0, 128, 128, 255]),
    ],
)
def test_float_tiff_keeps_its_greys(values, greys):
    content = encode(Image.fromarray(np.array([values], np.float32)), "TIFF")
    assert pixels(content)[0].tolist() == [[grey] * 3 for grey in greys]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_float_tiff_without_a_finite_range_is_refused(value):
    content = encode(Image.fromarray(np.array([[0.5, value]], np.float32)), "TIFF")
    assert "NaN or infinite" in refusal(content)


def test_transparent_pixels_show_white_and_half_transparent_ones_half_of_it():
    content = encode(Image.fromarray(np.array([[[200, 0, 100, a] for a in (0, 51, 255)]], np.uint8)), "PNG")
    assert pixels(content).tolist() == [[[255, 255, 255], [244, 204, 224], [200, 0, 100]]]


def test_grey_with_alpha_shows_white_behind():
    content = encode(Image.fromarray(np.array([[[100, 0], [100, 255], [100, 51]]], np.uint8), "LA"), "PNG")
    assert pixels(content)[0].tolist() == [[255] * 3, [100] * 3, [224] * 3]


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_the_transparent_colour_of_a_palette_shows_white(format):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert pixels(encode(image, format))[0].tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    content = encode(image, format, transparency=1)
    assert pixels(content)[0].tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]


def test_the_alpha_of_every_palette_colour_counts():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 0, 100, 70, 80, 90])
    content = encode(image, "PNG", transparency=b"\xff\x33\x00")
    assert pixels(content)[0].tolist() == [[10, 20, 30], [244, 204, 224], [255, 255, 255]]


@pytest.mark.parametrize(
    ("image", "transparency"),
    [
        (Image.fromarray(np.array([[7, 255]], np.uint8)), 7),
        (Image.fromarray(np.array([[1000, 65535]], np.uint16)), 1000),
        (Image.fromarray(np.array([[[1, 2, 3], [255, 255, 255]]], np.uint8)), (1, 2, 3)),
    ],
)
def test_a_grey_or_colour_declared_transparent_shows_white(image, transparency):
    assert pixels(encode(image, "PNG", transparency=transparency)).tolist() == [[[255] * 3] * 2]
    assert pixels(encode(image, "PNG")).tolist() != [[[255] * 3] * 2]


def test_one_bit_images_are_black_and_white():
    content = encode(Image.fromarray(np.array([[True, False]])), "PNG")
    assert pixels(content).tolist() == [[[255] * 3, [0] * 3]]


def test_cmyk_jpeg_has_the_colours_of_the_ink():
    inks = np.zeros((16, 48, 4), np.uint8)
    inks[:, :16, 0], inks[:, 16:32, 1:3], inks[:, 32:, 3] = 255, 255, 255  # cyan, magenta and yellow, black
    shown = pixels(encode(Image.fromarray(inks, "CMYK"), "JPEG", quality=95)).astype(int)
    for column, colour in ((8, (0, 255, 255)), (24, (255, 0, 0)), (40, (0, 0, 0))):
        assert np.abs(shown[8, column] - colour).max() <= 2


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animated_image_is_its_first_frame(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if format == "WEBP" else {}
    content = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 2
    np.testing.assert_array_equal(pixels(content), np.asarray(frames[0]))


@pytest.mark.parametrize("size", [(1, 1), (4000, 2), (2, 4000)])
def test_extreme_sizes_are_read(size):
    assert open_image(encode(Image.new("RGB", size, (1, 2, 3)), "PNG")).size == size


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_truncated_file_is_refused_never_half_grey(format, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    content = encode(Image.fromarray(noise), format)
    assert pixels(content).shape == (64, 64, 3)
    refusal(content[: int(len(content) * share)])


def test_an_avif_without_its_items_is_refused():
    content = encode(Image.fromarray(COLOURS), "AVIF")
    assert "image item" in refusal(content.replace(b"iloc", b"free"))


def test_a_truncated_image_opened_by_the_caller_is_refused():
    content = encode(Image.fromarray(COLOURS), "JPEG")
    assert "truncated" in refusal(Image.open(io.BytesIO(content[: len(content) - 20])))


def test_no_bytes_are_refused():
    assert "0 bytes that begin with b''" in refusal(b"")


def test_html_named_jpg_is_refused_by_what_it_is(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"<!DOCTYPE html><html>404</html>")
    assert "31 bytes that begin with b'<!DOCTYPE html><'" in refusal(tmp_path / "holiday.jpg")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "absent.jpg")


def test_a_script_for_ghostscript_is_refused():
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    assert "bytes that begin with b'%!PS-Adobe" in refusal(script)  # not even recognised


# A one-bit header alone: the pixels are missing, so that a refusal by size proves that they were not asked for.
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(MAX_PIXELS + 1, 1), (12_000, 10_000), (50_000, 50_000)])
def test_too_many_pixels_are_refused_by_the_header(width, height):
    found = refusal(png(width, height, 1, 0, png_chunk(b"IDAT", b"")))
    assert f"{width} x {height} pixels" in found or f"({width * height} pixels)" in found


def test_the_largest_allowed_image_is_not_refused_for_its_size():
    found = refusal(png(MAX_PIXELS, 1, 1, 0, png_chunk(b"IDAT", b"")))
    assert "truncated" in found


def test_an_image_with_too_many_pixels_is_refused():
    assert "12000 x 10000 pixels" in refusal(Image.new("1", (12_000, 10_000)))


def test_a_refusal_by_size_does_not_warn_as_well():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fresh = runpy.run_path(decoding.__file__)  # pytest has undone the filter that the first import set
        with pytest.raises(UnreadableImage, match="12000 x 10000 pixels"):
            fresh["read_image"](png(12_000, 10_000, 1, 0, png_chunk(b"IDAT", b"")))
    assert caught == []


def test_reading_leaves_the_warning_filters_alone():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            open_image(Image.fromarray(COLOURS))
            open_image(encode(Image.fromarray(COLOURS).quantize(4), "PNG", transparency=b"\xff\x33"))
            warnings.warn("once", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["once"]


@pytest.mark.filterwarnings("error")  # torch only warns of memory that must not be written to
@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 5), (6, 4)])
def test_tensor_holds_the_pixels_in_memory_of_its_own(size):
    image = Image.fromarray(np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3))
    tensor = to_tensor(image)
    assert tensor.dtype == torch.uint8
    np.testing.assert_array_equal(tensor.numpy(), np.asarray(image).transpose(2, 0, 1))
    before = np.asarray(image).copy()
    tensor.zero_()
    np.testing.assert_array_equal(np.asarray(image), before)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no ImageNet sample in ../shared/data")
def test_ordinary_photographs_are_what_pillow_makes_of_them():
    paths = sorted(SAMPLE.glob("*.JPEG"))[::8]
    greys = [path for path in sorted(SAMPLE.glob("*.JPEG")) if Image.open(path).mode == "L"]
    assert greys
    for path in paths + greys:
        with Image.open(path) as image:
            if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
                np.testing.assert_array_equal(pixels(path), np.asarray(image.convert("RGB")))


# ------------------------------------------------------------------------------------------ pixels, fast and reduced


def photograph(mode: str, height: int = 70, width: int = 90) -> Image.Image:
    """Smooth and coloured, so that chroma subsampling and all frequencies matter."""
    y, x = np.mgrid[:height, :width]
    channels = [
        128 + 100 * np.sin(x / 7 + i) * np.cos(y / (5 + i)) for i in range(len(Image.new(mode, (1, 1)).getbands()))
    ]
    values = np.stack(channels, axis=-1).astype(np.uint8)
    return Image.fromarray(values.squeeze(-1) if mode == "L" else values, mode)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encode(photograph("RGB"), "JPEG", exif=exif)


COLOUR = encode(photograph("RGB"), "JPEG", quality=90)
FILES = {
    "colour": COLOUR,
    "whole chroma": encode(photograph("RGB"), "JPEG", subsampling="4:4:4"),
    "progressive": encode(photograph("RGB"), "JPEG", progressive=True),
    "grey": encode(photograph("L"), "JPEG"),
    "cmyk": encode(photograph("CMYK"), "JPEG"),
    "turned": turned(6),
    "not turned": turned(1),
    "one pixel": encode(photograph("RGB", 1, 1), "JPEG"),
    "png": encode(photograph("RGB"), "PNG"),
    "truncated": COLOUR[: len(COLOUR) // 2],
    "header only": COLOUR[:300],
    "without its end": COLOUR[:-2],
    "nothing": b"",
    "html": b"<!DOCTYPE html><html></html>",
}


def outcome(read, *arguments) -> torch.Tensor | str:
    try:
        return read(*arguments)
    except UnreadableImage as error:
        return str(error)


@pytest.fixture(params=["Pillow alone", "simplejpeg"])
def decoder(request, monkeypatch):
    if request.param == "Pillow alone":
        monkeypatch.setattr(decoding, "simplejpeg", None)
    elif decoding.simplejpeg is None:
        pytest.skip("needs simplejpeg")


def test_pixels_and_refusals_do_not_depend_on_the_decoder(decoder):
    for kind, min_side in product(FILES, (None, 30)):
        found = outcome(read_pixels, FILES[kind], "holiday.jpg", min_side)
        expected = outcome(lambda *a: to_tensor(open_image(*a)), FILES[kind], "holiday.jpg", min_side)
        assert type(found) is type(expected), (kind, min_side)
        same = torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected
        assert same, (kind, min_side)


@pytest.mark.parametrize("kind", ["colour", "whole chroma", "progressive", "grey", "not turned"])
def test_plain_jpegs_take_the_fast_way(kind, tmp_path, monkeypatch):
    if decoding.simplejpeg is None:
        pytest.skip("needs simplejpeg")
    monkeypatch.setattr(decoding, "read_image", None)  # the other way
    (tmp_path / "image.jpg").write_bytes(FILES[kind])
    for source in (FILES[kind], tmp_path / "image.jpg"):
        assert read_pixels(source).shape == (3, 70, 90)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(10_000, 9_000), (20_000, 20_000)])  # Pillow itself refuses the latter
def test_a_huge_jpeg_is_refused_by_its_header_whatever_decodes(decoder, width, height):
    header = COLOUR.index(b"\xff\xc0") + 5  # of the frame: height and width as two bytes each
    huge = COLOUR[:header] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + COLOUR[header + 4 :]
    found = outcome(read_pixels, huge, "holiday.jpg", 8)
    assert f"{width} x {height} pixels" in found or f"({width * height} pixels)" in found


@pytest.mark.parametrize(
    ("min_side", "shape"), [(None, (300, 401)), (151, (300, 401)), (150, (150, 201)), (75, (75, 101)), (1, (38, 51))]
)
def test_a_jpeg_comes_out_at_the_smallest_scale_that_keeps_its_shorter_side(decoder, min_side, shape):
    image = photograph("RGB", 300, 401)
    assert read_pixels(encode(image, "JPEG"), "image", min_side).shape == (3, *shape)
    assert read_pixels(encode(image, "PNG"), "image", min_side).shape == (3, 300, 401)
