"""The examples run as their first lines say."""

import shutil

import numpy as np
import pytest
import torch
from golden_models import fresh_config
from PIL import Image
from processes import ROOT, run

from modeling_umae import UMAEForPreTraining
from umae.data.inputs import evaluation_processor


@pytest.fixture
def folder(tmp_path):
    """A model, and images of noise of which one is also the query."""
    torch.manual_seed(0)
    UMAEForPreTraining(fresh_config()).save_pretrained(tmp_path / "model")
    evaluation_processor((16, 16)).save_pretrained(tmp_path / "model")
    numbers = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for name in "abcdefg":
        pixels = numbers.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
    shutil.copy(tmp_path / "images" / "d.png", tmp_path / "query.png")
    return tmp_path


def test_a_part_of_an_image_is_found_where_it_is(folder, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import dense_retrieval

    for size, (right, down) in ((16, (0.3, 0.8)), (32, (0.9, 0.1))):
        paths = (str(folder / "model"), str(folder / "images"), str(folder / "query.png"))
        figure = dense_retrieval.search(*paths, (right, down), size)
        best = figure.axes[1]
        assert best.get_title() == "d.png, 1.00"
        similar = best.images[1].get_array()
        rows, columns = similar.shape
        assert rows == size // 4
        assert np.unravel_index(similar.argmax(), similar.shape) == (int(down * rows), int(right * columns))


def test_the_program_writes_an_image_and_refuses_a_place_outside(folder):
    words = ("examples/dense_retrieval.py", folder / "model", folder / "images", folder / "query.png")
    run(*words, "--at", "0.4", "0.6", "--layer", "1", "--output", folder / "found.png", cwd=ROOT)
    with Image.open(folder / "found.png") as image:
        assert image.width == 1320
    refused = run(*words, "--at", "1.4", "0.6", cwd=ROOT, check=False)
    assert refused.returncode == 1 and "--at 1.4 0.6 lies outside of the image" in refused.stderr
