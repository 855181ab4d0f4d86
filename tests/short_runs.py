"""What makes runs of pre-training shorter in tests: few probe images, and the device's rate is that of one matrix
product. Processes that are forked for a run have imported `short_programs` (processes.py), others use `no_figures`."""

import importlib

PROBE_IMAGES = 64

SHORTER = {
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
