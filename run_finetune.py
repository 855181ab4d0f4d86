#!/usr/bin/env python
"""Fine-tune a pre-trained encoder on labelled images, as a whole, by MAE's recipe.

    python run_finetune.py --model_name_or_path runs/digits --output_dir runs/digits_finetuned
    accelerate launch run_finetune.py --model_name_or_path runs/mine --dataset_name labelled_images \
        --output_dir runs/mine_finetuned

Run the same command again after an interruption and it continues from its newest checkpoint. The output folder gets
`finetune.json`, with accuracy and protocol, and a classifier that `pipeline("image-classification")` runs.
"""

import sys
from collections.abc import Sequence
from typing import Any

from arguments_umae import FINETUNE
from command_line_umae import one_line_refusals, run_program


def main(argv: Sequence[str]) -> Any:
    return run_program("finetune", argv)


if __name__ == "__main__":
    with one_line_refusals("run_finetune.py", FINETUNE):
        main(sys.argv[1:])
