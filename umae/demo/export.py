"""A folder that shows the page on Hugging Face Spaces, or on any machine with what its requirements.txt names."""

import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from PIL import Image

import modeling_umae
import umae
from umae.data.decoding import Reading
from umae.data.images import Images
from umae.demo.index import at_most
from umae.demo.models import DemoModel, read_weights_of
from umae.files import write_folder

MOST_IMAGES = 200  # spread evenly
SIDE = 512  # pixels of an image's longer side, at most

# What the package imports. It is copied, without the programs, as it need not be on PyPI
DISTRIBUTIONS = (
    "gradio", "torch", "transformers", "datasets", "accelerate", "huggingface_hub", "safetensors", "Pillow", "numpy",
    "pyarrow", "scikit-learn", "scipy", "matplotlib", "Jinja2", "PyYAML", "psutil", "tqdm", "fsspec", "filelock",
    "simplejpeg", "tifffile",
)  # fmt: skip

README = """\
---
title: U-MAE demo
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
---

# U-MAE demo

What a masked autoencoder sees, reconstructs and finds alike. To run it on a machine of your own:

```bash
pip install -r requirements.txt
python app.py
```

`models/` has the weights, `images/` the images to search, made smaller and without their metadata; put others there, in
a sub-folder for each class if there are classes.
"""

APP = '''\
"""The page: on Hugging Face Spaces, or by `python app.py`."""

from pathlib import Path

from umae.data.images import load_images
from umae.demo.index import load_index
from umae.demo.models import load_model
from umae.demo.page import LAUNCH, build

here = Path(__file__).resolve().parent
models = [load_model(str(here / "models" / name)) for name in {names!r}]
indexes = []
if (here / "images").is_dir():
    images = load_images(str(here / "images"))
    indexes = [load_index(model, images, here / "index") for model in models]
build(models, indexes).launch(**LAUNCH)
'''


def export(sources: Sequence[str], models: Sequence[DemoModel], images: Images | None, folder: Path) -> None:
    """Write the page of these models to a new folder: `README.md`, `requirements.txt`, `app.py` and what they need.

    Args:
        sources: where the models were loaded from.
        images: to search; of them at most MOST_IMAGES are written, of at most SIDE pixels and without their metadata.

    Raises:
        ValueError: the folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"export {folder} exists and is not empty; give a new folder")
    write_folder(folder, partial(_write, sources, models, images))
    megabytes = sum(path.stat().st_size for path in folder.rglob("*")) / 1e6
    print(f"{folder}: {megabytes:,.1f} MB; `python app.py` in it shows the page, and so does a Space it is uploaded to")


def _write(sources: Sequence[str], models: Sequence[DemoModel], images: Images | None, folder: Path) -> None:
    names = [f"{number}_{Path(model.name).name}" for number, model in enumerate(models, 1)]
    names = names if len(names) > 1 else [Path(models[0].name).name]
    for source, model, name in zip(sources, models, names, strict=True):
        read_weights_of(source).save_pretrained(folder / "models" / name)
        model.processor.save_pretrained(folder / "models" / name)
    if images is not None:
        _write_images(at_most(images, MOST_IMAGES), models[0].reading, folder / "images")
    package, modules = Path(umae.__file__).parent, Path(modeling_umae.__file__).parent
    shutil.copytree(
        package, folder / "umae", ignore=shutil.ignore_patterns("programs", "__pycache__", "*.yaml", "*.sh")
    )
    for name in ("configuration_umae.py", "modeling_umae.py", "image_processing_umae.py"):
        shutil.copyfile(modules / name, folder / name)
    (folder / "requirements.txt").write_text(requirements())
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "README.md").write_text(README.format(gradio=version("gradio"), python=python))
    (folder / "app.py").write_text(APP.format(names=names))


def _write_images(images: Images, reading: Reading, folder: Path) -> None:
    labels, names = [], images.label_names or []
    with suppress(ValueError):  # there are none
        labels = images.labels().tolist()
    stored = images.read_as(reading if reading.is_rgb else Reading(reading.num_channels, None))
    for row in range(len(images)):
        with suppress(ValueError):  # UnreadableImage
            image = stored.read(row)
            of_class = (names[labels[row]] if names else str(labels[row])).replace("/", "_") if labels else ""
            (folder / of_class).mkdir(parents=True, exist_ok=True)
            if isinstance(image, Image.Image):
                image.thumbnail((SIDE, SIDE))
                image.save(folder / of_class / f"{row:03}.jpg", quality=95)
            else:
                np.save(folder / of_class / f"{row:03}.npy", image)


def requirements() -> str:
    """The installed versions of what the page needs, for pip; torch for CPUs, as Spaces have unless they are paid."""
    lines = ["--extra-index-url https://download.pytorch.org/whl/cpu"]
    for name in DISTRIBUTIONS:
        with suppress(PackageNotFoundError):  # those that are not needed everywhere
            lines.append(f"{name}=={version(name).partition('+')[0]}")
    return "\n".join([*lines, ""])
