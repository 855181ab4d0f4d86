"""The image processor that is saved with every model: it reads images exactly as training does.

Pillow's own conversion clips 16-bit greys to white, turns float images black and ignores the EXIF orientation.

Most models see 8-bit RGB, by `open_image`. Others see any number of channels in any range of values, by `read_image`.
"""

import io
import math
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from transformers import ViTImageProcessorPil
from transformers.image_transforms import get_resize_output_image_size
from transformers.image_utils import ChannelDimension

MAX_PIXELS = 89_478_485  # Pillow's own limit, where it only warns: a quarter of a gibibyte as RGB
MAX_VALUES = 4 * MAX_PIXELS  # of all channels together
BACKGROUND = (255, 255, 255)  # the colour behind transparent pixels

# Not all of Pillow's formats: for EPS it runs Ghostscript, and some truncated JPEG 2000 files give no error.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


NPY = b"\x93NUMPY"
TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are BigTIFF
# What damaged files raise, in Pillow, numpy and tifffile
ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError,
          MemoryError, struct.error, zlib.error, Image.DecompressionBombError)  # fmt: skip

IntensityRange = str | Sequence[float]


class UnreadableImage(ValueError):
    """An image that cannot be read correctly: truncated, malformed, too large, or no image at all."""


def open_image(
    source: bytes | str | os.PathLike | Image.Image, name: str = "image", min_side: int | None = None
) -> Image.Image:
    """Read one image as RGB: upright, 8 bits per channel, on a white background, the first frame if it is animated.

    16-bit greys are scaled from 0..65535. Float images are scaled from 0..1 if all values lie there, otherwise from
    their own minimum and maximum.

    Args:
        source: an encoded file's bytes, its path, or a Pillow image, which is not changed.
        name: the image's name in error messages.
        min_side: if given, a JPEG may come out at 1/2, 1/4 or 1/8 of its size, as long as its shorter side keeps this
            many pixels: the decoder then skips the highest frequencies, which saves most of the work.

    Raises:
        UnreadableImage: "name: what was found; what was expected". Also for more than MAX_PIXELS pixels, by the header
            alone, and for a truncated file, unless Pillow's LOAD_TRUNCATED_IMAGES is set.
    """
    try:
        if isinstance(source, str | os.PathLike):
            source = Path(source).read_bytes()
        image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        if min_side is not None:
            image.draft(None, (min_side, min_side))
        return _to_rgb(_upright(image.copy() if image is source else image))
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        found = str(error)
        if isinstance(error, UnidentifiedImageError) and isinstance(source, bytes):  # its text is a memory address
            found = f"{len(source)} bytes that begin with {source[:16]!r}"
            if header := _tiff_header(source):
                found = f"a TIFF with {header.samples} channels of {header.bits} bits"
        expected = f"a whole image ({', '.join(FORMATS)}) of at most {MAX_PIXELS} pixels"
        raise UnreadableImage(f"{name}: {found}; expected {expected}") from error


def _upright(image: Image.Image) -> Image.Image:
    """Decode, and apply the EXIF orientation in place."""
    image.load()
    image.getexif()  # Pillow caches it, so the entries that it comes from can be removed
    for source in ("exif", "Raw profile type exif"):  # else Pillow rewrites them, and fails at other malformed entries
        image.info.pop(source, None)
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes to RGB. Image.convert alone clips 16-bit and float greys, and drops the alpha channel."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        grey = _unit_from_float(values) if image.mode == "F" else _unit_from_sixteen_bits(values)
        grey[values == image.info.get("transparency")] = 1  # one grey may be declared transparent
        return Image.fromarray(np.rint(grey * 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, BACKGROUND)
        return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _unit_from_sixteen_bits(values: np.ndarray) -> np.ndarray:
    """Integers (height, width) in 0..65535, in Pillow's modes I and I;16, to floats in 0..1."""
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"integers from {values.min()} to {values.max()}, outside 0 to 65535")
    return values / 65535


def _unit_from_float(values: np.ndarray) -> np.ndarray:
    """Floats (height, width) of any range to floats in 0..1; a constant outside 0..1 becomes 0."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(high - low):
        raise ValueError("NaN or infinite values")
    if low >= 0 and high <= 1:
        return values.astype(np.float64)
    return (values.astype(np.float64) - low) / ((high - low) or 1)


# ----------------------------------------------------------------------------------------------------------------------
# Any channels and intensities


class Pixels(np.ndarray):
    """The pixels of one image, (channels, height, width): uint8 of 8 bits at the full range, else float32 in 0..1.

    An array like any other; by its type the processor knows that the intensity range has been applied.
    """

    is_scaled = True


def read_image(
    source: bytes | str | os.PathLike | Image.Image,
    name: str = "image",
    num_channels: int = 3,
    intensity_range: IntensityRange | None = "full",
    min_side: int | None = None,
) -> Image.Image | np.ndarray:
    """Read one image with a number of channels and a range of intensities.

    Args:
        source: an encoded file's bytes, its path, or a Pillow image. What Pillow reads, `.npy` of (height, width),
            (height, width, channels) or (channels, height, width), and TIFFs of any number of channels (with more than
            8 bits or 4 channels by tifffile).
        name: the image's name in error messages.
        num_channels: of the result. 1 and 3 also turn colours to grey (ITU-R 601-2) and greys to three equal channels.
        intensity_range: what becomes 0 and 1: `full` is 0..255 of 8 bits, 0..65535 of other integers and 0..1 of
            floats; `image` is the image's own minimum and maximum; or (low, high), beyond which values are clipped.
            None leaves the values as they are stored.
        min_side: see `open_image`; not with `image`.

    Returns:
        With 3 channels and the full range, what Pillow reads is the RGB image of `open_image`, of 8 bits. All else is
        `Pixels`, (channels, height, width): uint8 of 8-bit files at the full range, else float32 in 0..1. With
        `intensity_range` None an array of the file's type.

    Raises:
        UnreadableImage: "name: what was found; what was expected". Also for another number of channels, NaN and
            infinite values, and values outside the full range.
    """
    try:
        if isinstance(source, str | os.PathLike):
            source = Path(source).read_bytes()
        is_array = isinstance(source, bytes) and (source.startswith(NPY) or _is_beyond_pillow(source))
        if num_channels == 3 and intensity_range == "full" and not is_array:
            return open_image(source, name, min_side)
        values = _stored_values(source, num_channels, None if intensity_range == "image" else min_side)
        return values if intensity_range is None else scaled(values, intensity_range)
    except UnreadableImage:
        raise
    except ERRORS as error:
        raise UnreadableImage(f"{name}: {_found(error, source)}; expected {_expected(num_channels)}") from error


def _expected(num_channels: int) -> str:
    channels = "1 channel" if num_channels == 1 else f"{num_channels} channels"
    return f"a whole image of {channels} ({', '.join(FORMATS)}, .npy), of at most {MAX_PIXELS} pixels"


def _found(error: BaseException, source: object) -> str:
    if isinstance(error, UnidentifiedImageError) and isinstance(source, bytes):
        return f"{len(source)} bytes that begin with {source[:16]!r}"
    return str(error) or type(error).__name__


def declared_channels(source: bytes | str | os.PathLike) -> int | None:
    """How many channels a file must be read with: that of `.npy` files, and of TIFFs with other than 1, 3 or 4 channels
    (a grey TIFF with transparency has one). None for all others, which Pillow reads as RGB or grey.

    Raises:
        ValueError: the shape of an array does not say which side is the channels.
        UnreadableImage: an array without a valid header.
        OSError: the file cannot be read.
    """
    encoded = source if isinstance(source, bytes) else Path(source).read_bytes()
    if encoded.startswith(NPY):
        try:
            shape = _npy_header(encoded)[0]
        except ERRORS as error:
            raise UnreadableImage(_found(error, encoded)) from error
        sides = sorted(shape)
        if len(shape) == 2:
            return 1
        if len(shape) != 3 or sides[0] == sides[1] or sides[0] not in (shape[0], shape[-1]):
            raise ValueError(f"the shape {shape} does not say which side is the channels; give num_channels")
        return sides[0]
    header = _tiff_header(encoded)
    if header is None or header.samples in (1, 3, 4) or (header.samples == 2 and header.has_alpha):
        return None
    return header.samples


def check_intensity_range(intensity_range: IntensityRange) -> IntensityRange:
    """`full`, `image` or (low, high), the latter as a list of two numbers; raises `ValueError` for anything else."""
    if isinstance(intensity_range, str):
        if intensity_range in ("full", "image"):
            return intensity_range
    elif len(intensity_range) == 2 and all(isinstance(bound, int | float) for bound in intensity_range):
        low, high = (float(bound) for bound in intensity_range)
        if math.isfinite(high - low) and low < high:
            return [low, high]
        raise ValueError(f"intensity_range {low:g},{high:g} is empty; give two finite numbers, the smaller one first")
    raise ValueError(f"intensity_range {intensity_range!r:.80}; expected full, image, or two numbers")


def scaled(values: np.ndarray, intensity_range: IntensityRange) -> Pixels:
    """Values (channels, height, width) as `read_image` returns them, see there; raises `ValueError` outside `full`."""
    if intensity_range == "full" and values.dtype == np.uint8:
        return values.view(Pixels)
    lowest, highest = float(values.min()), float(values.max())
    if intensity_range == "full":
        low, high = 0.0, 1.0 if values.dtype.kind == "f" else 65535.0
        if lowest < low or highest > high:
            raise ValueError(
                f"values from {lowest:g} to {highest:g}, outside the full range of {low:g} to {high:g}; as "
                f"intensity_range give set, percentiles, image or two numbers"
            )
    elif intensity_range == "image":
        low, high = lowest, highest
    else:
        low, high = (float(bound) for bound in intensity_range)
    units = np.subtract(values, low, dtype=np.float64)
    units /= (high - low) or 1  # a constant image becomes 0
    return units.clip(0, 1).astype(np.float32).view(Pixels)


def _stored_values(source: Any, num_channels: int, min_side: int | None = None) -> np.ndarray:
    """(num_channels, height, width), of the type that the file has."""
    if isinstance(source, bytes) and source.startswith(NPY):
        shape, fortran_order, dtype, offset = _npy_header(source)
        _check_size(shape)
        flat = np.frombuffer(source, dtype, count=math.prod(shape), offset=offset)
        return values_of(flat.reshape(shape, order="F" if fortran_order else "C"), num_channels)
    header = _tiff_header(source) if isinstance(source, bytes) else None
    plain = header and (header.samples == 1 or (header.bits == 8 and header.samples <= 4 and num_channels in (1, 3)))
    if header and (not plain or _is_beyond_pillow(source)):
        if header.samples != num_channels and {header.samples, num_channels} != {1, 3}:
            raise ValueError(f"a TIFF with {header.samples} channels of {header.bits} bits")
        _check_size((header.samples, header.height, header.width))
        return _matched(_tiff_values(source), num_channels)
    image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source), formats=FORMATS)
    _check_size((image.height, image.width))
    if len(image.getbands()) > 1 and ";16" in str(getattr(image, "tile", "")):
        raise ValueError("colours of 16 bits, of which Pillow reads 8 (save them as TIFF or .npy)")
    if min_side is not None:
        image.draft(None, (min_side, min_side))
    image = _upright(image.copy() if image is source else image)
    if image.mode == "F" or image.mode.startswith("I"):
        return values_of(np.array(image), num_channels)
    if num_channels in (1, 3):
        image = _to_rgb(image)
        return values_of(np.array(image if num_channels == 3 else image.convert("L")), num_channels)
    if len(image.getbands()) != num_channels:
        raise ValueError(f"an image of Pillow's mode {image.mode}, of {len(image.getbands())} channels")
    return values_of(np.array(image), num_channels)


def values_of(array: np.ndarray, num_channels: int) -> np.ndarray:
    """An array (height, width), (height, width, channels) or (channels, height, width), with the channels first.

    Raises:
        ValueError: neither the first nor the last side is the number of channels, or both are; no numbers, or NaN.
    """
    if array.dtype.kind not in "buif":
        raise ValueError(f"an array of {array.dtype}, no numbers")
    if array.ndim == 2:
        array = array[None]
    elif array.ndim != 3:
        raise ValueError(f"an array of shape {array.shape}, not of two or three sides")
    else:
        counts = [num_channels, *({1, 3} - {num_channels} if num_channels in (1, 3) else ())]
        axes = next((axes for count in counts if (axes := [i for i in (0, 2) if array.shape[i] == count])), [])
        if len(axes) != 1:
            which = "both the first and the last side are" if axes else "neither the first nor the last side is"
            raise ValueError(f"an array of shape {array.shape}, of which {which} {num_channels}")
        array = np.moveaxis(array, axes[0], 0)
    return _matched(_numbers(array), num_channels)


def _numbers(values: np.ndarray) -> np.ndarray:
    """(channels, height, width), in this machine's byte order and in a row; bits become 0 and 255."""
    _check_size(values.shape)
    if values.dtype.kind == "b":
        values = values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("NaN or infinite values")
    return np.ascontiguousarray(values, values.dtype.newbyteorder("="))


def _matched(values: np.ndarray, num_channels: int) -> np.ndarray:
    """Grey as three equal channels, three channels as grey, or as they are."""
    if len(values) == 1 and num_channels == 3:
        return np.repeat(values, 3, axis=0)
    if len(values) == 3 and num_channels == 1:
        if values.dtype == np.uint8:
            return np.array(Image.fromarray(np.ascontiguousarray(values.transpose(1, 2, 0))).convert("L"))[None]
        grey = np.tensordot((0.299, 0.587, 0.114), values.astype(np.float64), 1)[None]
        return (grey if values.dtype.kind == "f" else np.rint(grey)).astype(values.dtype)
    if len(values) != num_channels:
        raise ValueError(f"{len(values)} channels")
    return values


def _check_size(shape: Sequence[int]) -> None:
    height, width = sorted(shape)[-2:] if len(shape) == 3 else shape[:2]
    if height * width > MAX_PIXELS or math.prod(shape) > MAX_VALUES or 0 in shape:
        raise ValueError(f"{' x '.join(map(str, shape))} values")


def _npy_header(encoded: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether it is in Fortran's order, type, and where the data begin. Nothing is unpickled."""
    file = io.BytesIO(encoded)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f".npy of version {version}, which only structures have")
    two = version == (2, 0)
    read = np.lib.format.read_array_header_2_0 if two else np.lib.format.read_array_header_1_0
    shape, fortran_order, dtype = read(file)
    if dtype.kind not in "buif":
        raise ValueError(f".npy of {dtype}, no numbers")
    return shape, fortran_order, dtype, file.tell()


class _TiffHeader(NamedTuple):
    samples: int
    bits: int
    width: int
    height: int
    has_alpha: bool


def _tiff_header(encoded: bytes) -> _TiffHeader | None:
    """Of the first page; None if this is no TIFF or a damaged one."""
    if not encoded.startswith(TIFFS):
        return None
    try:
        file = io.BytesIO(encoded)
        directory = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if b"+" in encoded[2:4] else 8))
        file.seek(directory.next)
        directory.load(file)
        bits, extra = directory.get(258, 1), directory.get(338, ())
        bits = max(bits) if isinstance(bits, tuple) else bits
        alpha = bool({1, 2} & set(extra if isinstance(extra, tuple) else (extra,)))
        return _TiffHeader(int(directory.get(277, 1)), int(bits), int(directory[256]), int(directory[257]), alpha)
    except ERRORS:
        return None


def _is_beyond_pillow(encoded: bytes) -> bool:
    """Whether this is a TIFF of 1 or 3 channels, such as floats, that Pillow does not know."""
    header = _tiff_header(encoded)
    if header is None or header.samples not in (1, 3):
        return False
    try:
        Image.open(io.BytesIO(encoded), formats=("TIFF",))
    except UnidentifiedImageError:
        return True
    except ERRORS:  # which reading raises again
        return False
    return False


def _tiff_values(encoded: bytes) -> np.ndarray:
    """The first page of a TIFF, (channels, height, width)."""
    try:
        import tifffile
    except ImportError as error:
        raise ValueError("a TIFF that Pillow cannot read; install tifffile, or umae with its extra `tiff`") from error
    try:
        with tifffile.TiffFile(io.BytesIO(encoded)) as file:
            values = file.pages[0].asarray(squeeze=False)  # (planes, 1, height, width, samples of a plane)
    except tifffile.TiffFileError as error:
        raise ValueError(str(error)) from error
    planes, depth, height, width, samples = values.shape
    if depth != 1:
        raise ValueError(f"a TIFF of {depth} layers")
    if values.dtype.kind not in "buif":
        raise ValueError(f"a TIFF of {values.dtype}, no numbers")
    return _numbers(values.transpose(0, 4, 1, 2, 3).reshape(planes * samples, height, width))


# ----------------------------------------------------------------------------------------------------------------------
# The processor


class UMAEImageProcessor(ViTImageProcessorPil):
    """`ViTImageProcessorPil` that reads files and Pillow images by `read_image`; RGB images are not changed.

    Images that `pipeline` opens are converted to RGB before they reach the processor, so give it
    `processor.open_image(file)` instead of the file. With 3 channels and the full range, arrays, tensors and images
    from a URL are used as they are. Else arrays and tensors (height, width, channels) or (channels, height, width) are
    read as those of a file, and resized channel by channel.

    A folder saved by this class also loads without its code, as transformers' own class with the same settings.

    Args:
        num_channels, intensity_range: see `read_image`; in `preprocessor_config.json` unless they are 3 and `full`.
        kwargs: those of transformers' class.
    """

    # Saves this file beside the settings
    _auto_class = "AutoImageProcessor"

    def __init__(self, num_channels: int = 3, intensity_range: IntensityRange = "full", **kwargs: Any):
        super().__init__(**kwargs)
        self.num_channels, self.intensity_range = num_channels, check_intensity_range(intensity_range)

    @property
    def _reads_rgb(self) -> bool:
        return self.num_channels == 3 and self.intensity_range == "full"

    def open_image(
        self, source: bytes | str | os.PathLike | Image.Image, name: str = "image"
    ) -> Image.Image | np.ndarray:
        """Read one image as training does, see `read_image`."""
        return read_image(source, name, self.num_channels, self.intensity_range)

    def fetch_images(self, image_url_or_urls):
        """The argument, with a file opened by `open_image`; transformers would convert it to RGB in its own way."""
        if isinstance(image_url_or_urls, str) and os.path.isfile(image_url_or_urls):
            return self.open_image(image_url_or_urls, image_url_or_urls)
        images = super().fetch_images(image_url_or_urls)
        if not self._reads_rgb and getattr(images, "ndim", 3) == 2:
            images = images[None]  # transformers expects three sides of every array
        return images

    def process_image(self, image, *args, **kwargs) -> np.ndarray:
        """One image, (channels, height, width). Raises `UnreadableImage` where `read_image` does."""
        if isinstance(image, Image.Image):
            image = self.open_image(image)
        elif not self._reads_rgb and not hasattr(image, "is_scaled"):
            try:
                image = scaled(values_of(np.asarray(image), self.num_channels), self.intensity_range)
            except ValueError as error:
                raise UnreadableImage(f"image: {error}; expected {_expected(self.num_channels)}") from error
        if hasattr(image, "is_scaled"):
            return np.asarray(image).view(Pixels)  # of this module's type
        return super().process_image(image, *args, **kwargs)

    def resize(self, image, size, resample=None, *args, **kwargs) -> np.ndarray:
        """As transformers', but `Pixels` channel by channel; bicubic overshoot is clipped, as with 8 bits."""
        if not isinstance(image, Pixels):
            return super().resize(image, size, resample, *args, **kwargs)
        target = (size.height, size.width)
        if size.shortest_edge:
            target = get_resize_output_image_size(
                image, size.shortest_edge, default_to_square=False, input_data_format=ChannelDimension.FIRST
            )
        if image.shape[1:] == tuple(target):
            return image
        filter = Image.Resampling(Image.Resampling.BILINEAR if resample is None else int(resample))
        channels = [np.asarray(Image.fromarray(channel).resize(target[::-1], filter)) for channel in image]
        resized = np.stack(channels)
        return (resized if resized.dtype == np.uint8 else resized.clip(0, 1)).view(Pixels)

    def rescale(self, image, scale, *args, **kwargs) -> np.ndarray:
        """As transformers', but float `Pixels` are in 0..1 already."""
        if isinstance(image, Pixels) and image.dtype != np.uint8:
            return image
        return super().rescale(image, scale, *args, **kwargs)

    def to_dict(self) -> dict:
        """The settings, with the name of transformers' class, which loads without `trust_remote_code`."""
        code = {"AutoImageProcessor": "image_processing_umae.UMAEImageProcessor"}
        settings = {**super().to_dict(), "image_processor_type": "ViTImageProcessor", "auto_map": code}
        if self._reads_rgb:
            del settings["num_channels"], settings["intensity_range"]
        return settings


__all__ = ["UMAEImageProcessor", "UnreadableImage", "open_image", "read_image"]
