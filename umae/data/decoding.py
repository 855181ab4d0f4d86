"""An image file as a tensor, with the same pixels as `read_image` in `image_processing_umae.py`."""

import contextlib
import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image

from image_processing_umae import MAX_PIXELS, check_intensity_range, read_image

try:
    import simplejpeg  # decodes the same pixels faster; comes with umae where it has wheels, see pyproject.toml
except ImportError:
    simplejpeg = None

JPEG = b"\xff\xd8\xff"  # how all of them begin


@dataclass(frozen=True)
class Reading:
    """How images are read, see `read_image`.

    Args:
        num_channels: of every image.
        intensity_range: `full`, `image`, or the two numbers (low, high); None for values as they are stored.
    """

    num_channels: int = 3
    intensity_range: str | tuple[float, float] | None = "full"

    @property
    def is_rgb(self) -> bool:
        """Whether images are read as 8-bit RGB, unless they are arrays."""
        return self == RGB

    def read(
        self, source: bytes | str | os.PathLike | Image.Image, name: str, min_side: int | None = None
    ) -> Image.Image | np.ndarray:
        """See `read_image`."""
        return read_image(source, name, self.num_channels, self.intensity_range, min_side)


RGB = Reading()


def reading_of(processor: Any) -> Reading:
    """How a model's image processor reads images; all but U-MAE's read RGB."""
    intensity_range = check_intensity_range(getattr(processor, "intensity_range", "full"))
    if not isinstance(intensity_range, str):
        intensity_range = (intensity_range[0], intensity_range[1])
    return Reading(getattr(processor, "num_channels", 3), intensity_range)


def to_tensor(image: Image.Image | np.ndarray) -> torch.Tensor:
    """The pixels of an image, (channels, height, width): in new memory for an RGB image (channels last, as Pillow's),
    of type uint8 or float32."""
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return torch.from_numpy(image if image.flags.writeable else image.copy())


def read_pixels(
    source: bytes | str | os.PathLike | Image.Image,
    name: str = "image",
    min_side: int | None = None,
    reading: Reading = RGB,
) -> torch.Tensor:
    """`to_tensor(reading.read(...))`, with the same pixels and errors, but RGB faster where simplejpeg is installed."""
    if isinstance(source, str | os.PathLike):
        with contextlib.suppress(OSError):  # the reader names the file
            source = Path(source).read_bytes()
    pixels = None
    if reading.is_rgb and simplejpeg is not None and isinstance(source, bytes) and source.startswith(JPEG):
        pixels = _plain_jpeg(source, min_side)
    return to_tensor(reading.read(source, name, min_side)) if pixels is None else pixels


def stacked(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Images of one size as a batch: uint8 if all are, else float32 in 0..1."""
    if len({image.dtype for image in images}) > 1:
        images = [image.float() / 255 if image.dtype == torch.uint8 else image for image in images]
    return torch.stack(list(images))


def _plain_jpeg(encoded: bytes, min_side: int | None) -> torch.Tensor | None:
    """The pixels of a valid, upright JPEG in colour or grey; None for any other file, which Pillow then reads."""
    try:
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
