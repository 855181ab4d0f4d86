#!/usr/bin/env python
"""Pre-train U-MAE on images, without labels.

    python run_pretrain.py                                    # the bundled digits, two minutes on a laptop
    accelerate launch run_pretrain.py --dataset_name my_images --output_dir runs/mine

Run the same command again after an interruption and it continues from its newest checkpoint.
"""

import sys
from collections.abc import Sequence
from typing import Any

from arguments_umae import PRETRAIN
from command_line_umae import one_line_refusals, run_program


def main(argv: Sequence[str]) -> Any:
    return run_program("pretrain", argv)


if __name__ == "__main__":
    with one_line_refusals("run_pretrain.py", PRETRAIN):
        main(sys.argv[1:])
