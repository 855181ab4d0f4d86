"""A picture file, whatever it is, as the RGB picture a person would see, or a refusal that says why.

Left to itself Pillow clips 16-bit greys to white, turns float pictures black and ignores the camera's orientation.
"""

import io
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

try:
    import simplejpeg  # a faster way to the same pixels; `pip install umae[fast]`
except ImportError:
    simplejpeg = None

MAX_PIXELS = 89_478_485  # Pillow's own limit, where it only warns: a quarter of a gibibyte as RGB
BACKGROUND = (255, 255, 255)  # what is behind a transparent pixel

# Not all that Pillow opens: it hands EPS to Ghostscript, and returns some truncated JPEG 2000 files as if whole.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

# Once and for all, because catch_warnings around every picture makes the whole process repeat its once-only warnings.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # open_picture refuses what it warns of


class UnreadablePicture(ValueError):
    """A picture that cannot be shown as it was meant: truncated, malformed, too large, or no picture at all."""


def open_picture(
    source: bytes | str | os.PathLike | Image.Image, name: str = "picture", min_side: int | None = None
) -> Image.Image:
    """Read one picture as RGB: upright, 8 bits per channel, on a white background, the first frame if it is animated.

    16-bit greys are scaled from 0..65535. Float pictures are scaled from 0..1 if all values lie there, otherwise from
    their own minimum and maximum.

    Args:
        source: an encoded file's bytes, its path, or a Pillow image, which is not changed.
        name: what the refusal calls the picture.
        min_side: if given, a JPEG may come out at 1/2, 1/4 or 1/8 of its size, as long as its shorter side keeps so
            many pixels: its decoder then leaves out the finest frequencies, which saves most of the work.

    Raises:
        UnreadablePicture: "name: what was found; what was expected". A picture with more than MAX_PIXELS pixels is
            refused by its header, a truncated one as long as Pillow's LOAD_TRUNCATED_IMAGES is left off.
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
        unidentified = isinstance(error, UnidentifiedImageError)  # its text shows a memory address
        found = f"{len(source)} bytes that begin with {source[:16]!r}" if unidentified else str(error)
        expected = f"a whole picture ({', '.join(FORMATS)}) of at most {MAX_PIXELS} pixels"
        raise UnreadablePicture(f"{name}: {found}; expected {expected}") from error


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """The pixels of an RGB picture: uint8 (3, height, width), in memory of its own (channels last, as Pillow's)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def read_pixels(
    source: bytes | str | os.PathLike | Image.Image, name: str = "picture", min_side: int | None = None
) -> torch.Tensor:
    """As `to_tensor(open_picture(...))`, the same pixels and refusals, faster where simplejpeg is installed."""
    pixels = None if simplejpeg is None or isinstance(source, Image.Image) else _plain_jpeg(source, min_side)
    return to_tensor(open_picture(source, name, min_side)) if pixels is None else pixels


def _plain_jpeg(source: bytes | str | os.PathLike, min_side: int | None) -> torch.Tensor | None:
    """The pixels of a sound, upright JPEG in colour or grey; None leaves all others, and the verdict, to Pillow."""
    try:
        encoded = source if isinstance(source, bytes) else Path(source).read_bytes()
        image = Image.open(io.BytesIO(encoded), formats=("JPEG",))
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        if not upright or image.mode not in ("RGB", "L") or image.width * image.height > MAX_PIXELS:
            return None
        if min_side is not None:
            image.draft(None, (min_side, min_side))
        pixels = simplejpeg.decode_jpeg(encoded, min_height=image.height, min_width=image.width)
        return torch.from_numpy(pixels).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _upright(image: Image.Image) -> Image.Image:
    """Decode, and apply the EXIF orientation in place."""
    image.load()
    image.getexif()  # Pillow remembers it, so that its sources may go
    for source in ("exif", "Raw profile type exif"):  # else Pillow rewrites them, and fails at malformed other entries
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
        raise ValueError(f"integers from {values.min()} to {values.max()}, where 16 bits end at 65535")
    return values / 65535


def _unit_from_float(values: np.ndarray) -> np.ndarray:
    """Floats (height, width) of any range to floats in 0..1; a constant outside 0..1 becomes 0."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(high - low):
        raise ValueError("NaN or infinite values")
    if low >= 0 and high <= 1:
        return values.astype(np.float64)
    return (values.astype(np.float64) - low) / ((high - low) or 1)
