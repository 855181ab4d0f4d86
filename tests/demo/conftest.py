"""A model and a folder of images, for tests of the demo."""

import numpy as np
import pytest
from demo_run import save_run
from PIL import Image


@pytest.fixture
def run(tmp_path):
    return save_run(tmp_path / "run")


@pytest.fixture
def model(run):
    from umae.demo.models import load_model

    return load_model(str(run))


@pytest.fixture
def folder(tmp_path):
    """Nine images of three classes, in sub-folders."""
    numbers = np.random.default_rng(0)
    for i in range(9):
        file = tmp_path / "images" / "abc"[i % 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers.integers(0, 256, (20 + i % 3, 20, 3), dtype=np.uint8)).save(file)
    return tmp_path / "images"
