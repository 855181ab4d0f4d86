"""A model and images, for tests of features."""

import numpy as np
import pytest
import torch
from golden_models import fresh_config
from PIL import Image


@pytest.fixture
def run(tmp_path):
    """A run folder: weights and the evaluation transform."""
    from modeling_umae import UMAEForPreTraining
    from umae.data.inputs import evaluation_processor

    torch.manual_seed(0)
    UMAEForPreTraining(fresh_config()).save_pretrained(tmp_path / "run")
    evaluation_processor((16, 16)).save_pretrained(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def folder(tmp_path):
    """37 unlabelled images of different sizes, in two sub-folders of one class each."""
    numbers = np.random.default_rng(0)
    for i in range(37):
        file = tmp_path / "images" / ("a" if i % 2 else "b") / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers.integers(0, 256, (16 + i % 3, 20, 3), dtype=np.uint8)).save(file)
    return tmp_path / "images"
