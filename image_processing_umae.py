"""The image processor that is saved with every model: it reads images exactly as training does.

Pillow's own conversion clips 16-bit greys to white, turns float images black and ignores the EXIF orientation.
"""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import ViTImageProcessorPil

MAX_PIXELS = 89_478_485  # Pillow's own limit, where it only warns: a quarter of a gibibyte as RGB
BACKGROUND = (255, 255, 255)  # the colour behind transparent pixels

# Not all of Pillow's formats: for EPS it runs Ghostscript, and some truncated JPEG 2000 files give no error.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


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


class UMAEImageProcessor(ViTImageProcessorPil):
    """`ViTImageProcessorPil` that reads files and Pillow images by `open_image`; RGB images are not changed.

    Arrays, tensors and images from a URL are used as they are. So are images that `pipeline` opens: it converts files
    to RGB before it calls the processor, so give it `processor.open_image(file)` instead of the file.

    A folder saved by this class also loads without its code, as transformers' own class with the same settings.
    """

    # Saves this file beside the settings
    _auto_class = "AutoImageProcessor"
    open_image = staticmethod(open_image)

    def fetch_images(self, image_url_or_urls):
        """The argument, with a file opened by `open_image`; transformers would convert it to RGB in its own way."""
        if isinstance(image_url_or_urls, str) and os.path.isfile(image_url_or_urls):
            return open_image(image_url_or_urls, image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def process_image(self, image, *args, **kwargs) -> np.ndarray:
        """One image, (channels, height, width). Raises `UnreadableImage` where `open_image` does."""
        if isinstance(image, Image.Image):
            image = open_image(image, "image")
        return super().process_image(image, *args, **kwargs)

    def to_dict(self) -> dict:
        """The settings, with the name of transformers' class, which loads without `trust_remote_code`."""
        code = {"AutoImageProcessor": "image_processing_umae.UMAEImageProcessor"}
        return {**super().to_dict(), "image_processor_type": "ViTImageProcessor", "auto_map": code}


__all__ = ["UMAEImageProcessor", "UnreadableImage", "open_image"]
