#!/usr/bin/env python
"""Evaluate a frozen encoder: linear heads and nearest neighbours.

    python run_linear_probe.py --model_name_or_path runs/umae --output_dir runs/umae_probe
    accelerate launch run_linear_probe.py --protocol mae --model_name_or_path runs/umae --output_dir runs/umae_mae_probe

The model is a run folder or any U-MAE, ViT or ViTMAE checkpoint. The protocol is `cached`, features computed once and a
grid of heads on them, or `mae`, 90 epochs through the encoder on fresh crops. The output folder gets
`linear_probe.json`, with both poolings and the whole protocol, and a classifier that `pipeline("image-classification")`
runs.
"""

import sys
from collections.abc import Sequence
from typing import Any

from arguments_umae import PROBE
from command_line_umae import one_line_refusals, run_program


def main(argv: Sequence[str]) -> Any:
    return run_program("probe", argv)


if __name__ == "__main__":
    with one_line_refusals("run_linear_probe.py", PROBE):
        main(sys.argv[1:])
