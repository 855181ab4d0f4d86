#!/usr/bin/env python
"""Compare settings: a grid of runs, their evaluations, a table with differences, and figures.

    python run_study.py digits                                       # some minutes on a laptop
    python run_study.py choose_weight --dataset_name my_images --plan

Run the same command again after an interruption and it continues.
"""

import sys
from collections.abc import Sequence
from typing import Any

from arguments_umae import STUDY
from command_line_umae import one_line_refusals, run_program


def main(argv: Sequence[str]) -> Any:
    return run_program("study", argv)


if __name__ == "__main__":
    with one_line_refusals("run_study.py", STUDY):
        main(sys.argv[1:])
