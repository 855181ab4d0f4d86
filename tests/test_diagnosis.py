"""From a model and pictures to the measures of collapse."""

import numpy as np
import pytest
import torch
from golden_models import fresh_config
from PIL import Image

from modeling_umae import UMAEForPreTraining
from umae.collapse import effective_rank
from umae.convert import encoder_from_pretrained
from umae.data import load_pictures
from umae.diagnosis import MEASURES, diagnose
from umae.features import extract_features, load_processor
from umae.transforms import evaluation_processor


def test_the_diagnosis_measures_the_features_of_the_pictures_that_can_be_read(tmp_path, capsys):
    run, folder = tmp_path / "run", tmp_path / "pictures"
    torch.manual_seed(0)
    UMAEForPreTraining(fresh_config()).save_pretrained(run)
    evaluation_processor((16, 16)).save_pretrained(run)
    folder.mkdir()
    numbers = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(numbers.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    (folder / "00.png").write_bytes(b"<html>")
    pictures = load_pictures(str(folder))
    found = diagnose(str(run), str(folder))
    assert "skipped: 00.png" in capsys.readouterr().out
    encoder = encoder_from_pretrained(run, pooling="mean")
    features = extract_features(encoder, pictures, load_processor(run), 64, skip_unreadable=True)
    for name, values in features.items():
        assert set(found[name]) == set(MEASURES)
        assert found[name]["effective_rank"] == effective_rank(values[1:])
        assert found[name]["participation_ratio"] == pytest.approx(1 / found[name]["uniformity"])
    assert diagnose(str(run), pictures, most_pictures=4)["cls"]["effective_rank"] <= 3
    with pytest.raises(ValueError, match="none of the 1 pictures"):
        diagnose(str(run), pictures, most_pictures=1)
