"""A smaller copy of an image file, with what random crops need of it."""

import io
import os
from pathlib import Path

import torch
from PIL import Image

from image_processing_umae import UnreadableImage, declared_channels, open_image
from umae.files import copy_file, write_bytes

QUALITY = 90  # of JPEG, with chroma at half the resolution (4:2:0)
MOST_PIXELS = 65_500  # libjpeg's limit for a side


def shrunk(image: Image.Image, shortest_side: int) -> bytes | None:
    """An RGB image with its shorter side resized to `shortest_side` pixels, as JPEG; None if it is no longer than that.

    Bicubic with antialiasing. An image too long for JPEG is not resized either.
    """
    shorter = min(image.size)
    if shorter <= shortest_side or max(image.size) * shortest_side > MOST_PIXELS * shorter:
        return None
    width, height = (round(side * shortest_side / shorter) for side in image.size)
    buffer = io.BytesIO()
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    resized.save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:0", comment=b"")  # else the original's
    return buffer.getvalue()


class ShrunkFiles(torch.utils.data.Dataset):
    """Writes the smaller copies of image files, in the worker that is asked for an index; a small image is copied.

    Arrays and TIFFs of other than 1, 3 or 4 channels are copied, too.

    An item is None, `UnreadableImage` if training would refuse the image too, which is then not written, or the
    `OSError` of a failed write.

    Args:
        names: of the images, relative to `folder`, and to `output_dir`, where they keep them.
        temporary: folder on the file system of `output_dir` in which files are written before they are renamed.
    """

    def __init__(self, folder: Path, output_dir: Path, names: list[str], shortest_side: int, temporary: Path):
        self.folder, self.output_dir, self.names = folder, output_dir, names
        self.shortest_side, self.temporary = shortest_side, temporary

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, OSError | UnreadableImage | None]:
        name = self.names[index]
        source, target, temporary = self.folder / name, self.output_dir / name, self.temporary / str(os.getpid())
        try:
            ending = source.suffix.lower()
            keeps = ending == ".npy" or (ending in (".tif", ".tiff") and declared_channels(source) is not None)
            encoded = None if keeps else shrunk(open_image(source, name), self.shortest_side)
            target.parent.mkdir(parents=True, exist_ok=True)
            if encoded is None:
                copy_file(source, target, temporary)
            else:
                write_bytes(target, encoded, temporary)
        except (OSError, UnreadableImage) as error:
            return name, error
        return name, None
