"""What has to be tried and measured once a GPU is at hand, see `python -m benchmarks.gpu --help`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))  # golden_models, the values of the original code
