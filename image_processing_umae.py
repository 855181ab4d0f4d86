"""The image processor that travels with every saved model: it reads images by the rule that training reads them by.

Left to itself Pillow clips 16-bit greys to white, turns float images black and ignores the camera's orientation.
"""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import ViTImageProcessorPil

MAX_PIXELS = 89_478_485  # Pillow's own limit, where it only warns: a quarter of a gibibyte as RGB
BACKGROUND = (255, 255, 255)  # what is behind a transparent pixel

# Not all that Pillow opens: it hands EPS to Ghostscript, and returns some truncated JPEG 2000 files as if whole.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


class UnreadableImage(ValueError):
    """An image that cannot be shown as it was meant: truncated, malformed, too large, or no image at all."""


def open_image(
    source: bytes | str | os.PathLike | Image.Image, name: str = "image", min_side: int | None = None
) -> Image.Image:
    """Read one image as RGB: upright, 8 bits per channel, on a white background, the first frame if it is animated.

    16-bit greys are scaled from 0..65535. Float images are scaled from 0..1 if all values lie there, otherwise from
    their own minimum and maximum.

    Args:
        source: an encoded file's bytes, its path, or a Pillow image, which is not changed.
        name: what the refusal calls the image.
        min_side: if given, a JPEG may come out at 1/2, 1/4 or 1/8 of its size, as long as its shorter side keeps so
            many pixels: its decoder then leaves out the finest frequencies, which saves most of the work.

    Raises:
        UnreadableImage: "name: what was found; what was expected". An image with more than MAX_PIXELS pixels is
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
        expected = f"a whole image ({', '.join(FORMATS)}) of at most {MAX_PIXELS} pixels"
        raise UnreadableImage(f"{name}: {found}; expected {expected}") from error


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


class UMAEImageProcessor(ViTImageProcessorPil):
    """`ViTImageProcessorPil`, which reads files and Pillow images as `open_image` does; RGB ones keep their bits.

    Arrays and tensors, and what is opened from an URL, are taken as they come. So is what `pipeline` opens: it has
    converted a file to RGB before any processor sees it, so give it `processor.open_image(file)` instead.

    A folder that this class has saved also opens without it: as transformers' own class, which has all its settings.
    """

    _auto_class = "AutoImageProcessor"  # its code is saved beside the settings
    open_image = staticmethod(open_image)

    def fetch_images(self, image_url_or_urls):
        """What is given, with files opened; transformers would convert them to RGB in its own way."""
        if isinstance(image_url_or_urls, str) and os.path.isfile(image_url_or_urls):
            return open_image(image_url_or_urls, image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def process_image(self, image, *args, **kwargs) -> np.ndarray:
        """One image, (channels, height, width). Raises `UnreadableImage` where `open_image` does."""
        if isinstance(image, Image.Image):
            image = open_image(image, "image")
        return super().process_image(image, *args, **kwargs)

    def to_dict(self) -> dict:
        """The settings, saved or not, under the name of transformers' class, which loads where no code is trusted."""
        code = {"AutoImageProcessor": "image_processing_umae.UMAEImageProcessor"}
        return {**super().to_dict(), "image_processor_type": "ViTImageProcessor", "auto_map": code}


__all__ = ["UMAEImageProcessor", "UnreadableImage", "open_image"]
