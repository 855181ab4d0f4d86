"""From a model and images to the measures of collapse."""

import numpy as np
import pytest
import torch
from golden_models import fresh_config
from PIL import Image
from processes import run, together

from modeling_umae import UMAEForPreTraining
from umae import seeding
from umae.convert import encoder_from_pretrained
from umae.data.images import load_images
from umae.data.inputs import evaluation_processor, load_processor
from umae.evaluation import diagnosis
from umae.evaluation.collapse import MEASURES, alignment, effective_rank
from umae.evaluation.diagnosis import diagnose
from umae.evaluation.features import extract_features


def save_model(folder, **fields) -> UMAEForPreTraining:
    torch.manual_seed(0)
    model = UMAEForPreTraining(fresh_config(**fields)).eval()
    model.save_pretrained(folder)
    evaluation_processor((16, 16)).save_pretrained(folder)
    return model


def test_the_diagnosis_measures_the_features_of_the_images_that_can_be_read(tmp_path, capsys):
    model, folder = tmp_path / "model", tmp_path / "images"
    save_model(model)
    folder.mkdir()
    numbers = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(numbers.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    (folder / "00.png").write_bytes(b"<html>")
    images = load_images(str(folder))
    measures = diagnose(str(model), str(folder))
    assert "skipped: 00.png" in capsys.readouterr().out
    encoder = encoder_from_pretrained(model, pooling="mean")
    features = extract_features(encoder, images, load_processor(model), 64, skip_unreadable=True)
    for name, values in features.items():
        assert set(measures[name]) == {*MEASURES, "alignment"}
        assert measures[name]["effective_rank"] == pytest.approx(effective_rank(values[1:]), rel=1e-9)
        assert measures[name]["participation_ratio"] == pytest.approx(1 / measures[name]["uniformity"])
    assert diagnose(str(model), images, batch_size=5)["cls"]["rankme"] == pytest.approx(measures["cls"]["rankme"], 1e-6)
    assert diagnose(str(model), images, most_images=4)["cls"]["effective_rank"] <= 4
    with pytest.raises(ValueError, match="none of the 1 images"):
        diagnose(str(model), images, most_images=1)  # the first, which is no image


def test_alignment_is_that_of_two_masks_of_each_image(tmp_path):
    model = save_model(tmp_path / "model", pooling="mean")
    images = load_images("digits", split="test")
    index = torch.tensor(images.spread(20))
    processor = load_processor(tmp_path / "model")
    pixel_values = torch.cat([processor(images.read(i), return_tensors="pt")["pixel_values"] for i in index.tolist()])
    views = [
        model.vit(pixel_values, noise=seeding.uniform(0, seeding.MASK, view, index, 16)).pooler_output.detach()
        for view in (1, 2)
    ]
    measures = diagnose(str(tmp_path / "model"), images, most_images=20)
    assert measures["mean"]["alignment"] == pytest.approx(alignment(*views), rel=1e-5)
    assert measures["mean"]["alignment"] > 1e-3, "the masks differ"


DIAGNOSE = """
import os, pathlib
from umae.evaluation.diagnosis import diagnose
pathlib.Path("measures_" + os.environ.get("RANK", "0")).write_text(str(diagnose("model", "digits", "test", 100, 16)))
"""


def test_processes_share_the_images_and_find_the_same(tmp_path):
    save_model(tmp_path / "model")
    (tmp_path / "diagnose.py").write_text(DIAGNOSE)
    run(tmp_path / "diagnose.py", cwd=tmp_path)
    alone = (tmp_path / "measures_0").read_text()
    together(2, tmp_path / "diagnose.py", cwd=tmp_path)
    assert (tmp_path / "measures_0").read_text() == (tmp_path / "measures_1").read_text() == alone
    assert "effective_rank" in alone


def test_memory_does_not_grow_with_the_number_of_images():
    def kept(images: int) -> int:
        running = diagnosis.Diagnosis()
        for _ in range(images // 64):
            running.add(torch.randn(64, 6, 32))
        statistics = running.statistics["cls"]
        return sum(map(len, statistics.rows)) + len(statistics.moment_sum)

    assert max(kept(6400), kept(12800), kept(12864)) <= 32 + 3 * 64
