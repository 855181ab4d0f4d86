"""What makes runs shorter in tests: few probe images, digits that are decoded once, and the device's rate is that of
one matrix product. Processes that are forked for a run have imported `short_programs` (processes.py), others use
`no_figures`."""

import importlib
from functools import cache

PROBE_IMAGES = 64


@cache
def decoded_digits():
    """The training images, and their pixels."""
    from umae.data import batches, images  # slow to import, and not every test needs them

    digits = images.load_images("digits")
    return digits, batches.decode_all(digits, show_progress=False)


def decode_all(images, show_progress: bool = True):
    from umae.data import batches

    digits, decoded = decoded_digits()
    same = (images.description, images.reading) == (digits.description, digits.reading)
    return decoded if same else batches.decode_all(images, show_progress)


SHORTER = {
    "umae.programs.pretrain.decode_all": decode_all,
    "umae.programs.finetune.decode_all": decode_all,
    "umae.evaluation.monitor.MOST_IMAGES": PROBE_IMAGES,
    "umae.programs.evaluations.MOST_IMAGES": PROBE_IMAGES,
    "umae.programs.pretrain.MOST_IMAGES": PROBE_IMAGES,
    "umae.speed.SECONDS": 1e-9,
}
NO_FIGURES = {"umae.sharing.gallery.draw": lambda *arguments: None}  # drawing takes half of a short run


def change(changes: dict) -> None:
    for target, value in changes.items():
        module, _, name = target.rpartition(".")
        setattr(importlib.import_module(module), name, value)
