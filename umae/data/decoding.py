"""An image file as a tensor, with the same pixels as `open_image` in `image_processing_umae.py`."""

import io
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image

from image_processing_umae import MAX_PIXELS, open_image

try:
    import simplejpeg  # decodes the same pixels faster; comes with umae where it has wheels, see pyproject.toml
except ImportError:
    simplejpeg = None


def to_tensor(image: Image.Image) -> torch.Tensor:
    """The pixels of an RGB image: uint8 (3, height, width), in new memory (channels last, as Pillow's)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_pixels(
    source: bytes | str | os.PathLike | Image.Image, name: str = "image", min_side: int | None = None
) -> torch.Tensor:
    """`to_tensor(open_image(...))`, with the same pixels and errors, but faster where simplejpeg is installed."""
    pixels = None if simplejpeg is None or isinstance(source, Image.Image) else _plain_jpeg(source, min_side)
    return to_tensor(open_image(source, name, min_side)) if pixels is None else pixels


def _plain_jpeg(source: bytes | str | os.PathLike, min_side: int | None) -> torch.Tensor | None:
    """The pixels of a valid, upright JPEG in colour or grey; None for any other file, which Pillow then reads."""
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


# For the whole process, because catch_warnings around every image would make all once-only warnings appear again.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # open_image raises an error instead
