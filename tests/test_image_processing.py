"""One reading rule for everybody: features by the package, by README and by the card are those of the same pixels."""

import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from golden_models import fresh_config
from PIL import ExifTags, Image
from processes import ROOT
from torch.nn.functional import cosine_similarity
from transformers import AutoImageProcessor, ViTImageProcessorPil, pipeline

import umae
from image_processing_umae import open_image
from umae.convert import encoder_from_pretrained
from umae.data.images import load_images
from umae.data.inputs import evaluation_processor, load_processor
from umae.evaluation.features import extract_features
from umae.sharing import cards

NUMBERS = np.random.default_rng(0)
COLOURS = NUMBERS.integers(0, 256, (20, 28, 4), dtype=np.uint8)
GREYS = np.linspace(0, 40_000, 20 * 28).reshape(20, 28) + NUMBERS.integers(0, 20_000, (20, 28))


def encoded(kind: str) -> bytes:
    """A file whose pixels Pillow's `.convert("RGB")` changes, or an ordinary one."""
    name, _, format = kind.partition(", ")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6 if name == "turned" else 1
    image = {
        "alpha": Image.fromarray(COLOURS),
        "16 bits": Image.fromarray(GREYS.astype(np.uint16)),
        "float": Image.fromarray((GREYS / 65535).astype(np.float32)),
    }.get(name, Image.fromarray(COLOURS).convert("RGB"))
    image.save(file := io.BytesIO(), format, exif=exif)
    return file.getvalue()


KINDS = [
    "alpha, PNG", "alpha, WEBP", "16 bits, PNG", "16 bits, TIFF", "float, TIFF", "turned, JPEG", "turned, PNG",
    "turned, TIFF", "turned, WEBP", "ordinary, JPEG",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A folder of pre-training."""
    torch.manual_seed(0)
    umae.UMAEForPreTraining(fresh_config()).save_pretrained(tmp_path / "runs" / "digits")
    evaluation_processor((16, 16)).save_pretrained(tmp_path / "runs" / "digits")
    return tmp_path / "runs" / "digits"


def python_block(text: str) -> str:
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


SNIPPETS = {
    "README": python_block((ROOT / "README.md").read_text()),
    "card": python_block(cards._USE.replace("{hidden_size}", "32")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("snippet", SNIPPETS)
def test_documented_code_gives_the_features_that_the_package_gives(folder, tmp_path, monkeypatch, snippet, kind):
    (tmp_path / "images").mkdir()
    for name in (tmp_path / "images" / "a.png", tmp_path / "image.png", folder / "image.jpg"):
        name.write_bytes(encoded(kind))  # what it is, the bytes say
    encoder = encoder_from_pretrained(folder, pooling="mean")
    expected = extract_features(encoder, load_images(str(tmp_path / "images")), load_processor(str(folder)), 1)
    monkeypatch.chdir(folder if snippet == "card" else tmp_path)
    found = {}
    exec(SNIPPETS[snippet], found)
    assert cosine_similarity(found["features"], expected["cls"]).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_travelling_processor_reads_a_file_and_an_open_image_as_training_does(folder, tmp_path, kind):
    file = tmp_path / "image"
    file.write_bytes(encoded(kind))
    expected = ViTImageProcessorPil.from_pretrained(folder)(open_image(file), return_tensors="pt").pixel_values
    remote = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    for processor in (remote, umae.UMAEImageProcessor.from_pretrained(folder)):
        assert type(processor).__name__ == "UMAEImageProcessor"
        for source in (Image.open(file), str(file), processor.open_image(file)):
            assert torch.equal(processor(source, return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize("size", [(16, 16), (20, 33), (300, 200)])
def test_ordinary_images_have_the_same_bits_by_transformers_own_processor(size):
    images = [Image.fromarray(NUMBERS.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(2)]
    ours = evaluation_processor((128, 128))
    theirs = ViTImageProcessorPil(**ours.to_dict())
    assert torch.equal(ours(images, return_tensors="pt").pixel_values, theirs(images, return_tensors="pt").pixel_values)


def test_without_its_code_the_folder_gives_transformers_own_processor(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(f"asked: {question}"))
    assert type(AutoImageProcessor.from_pretrained(folder)) is ViTImageProcessorPil
    theirs = ViTImageProcessorPil.from_pretrained(folder).to_json_string()
    assert (folder / "preprocessor_config.json").read_text() == theirs, "settings are as transformers would save them"


def test_saving_and_loading_leave_the_settings_as_they_are(folder):
    fresh, saved = evaluation_processor((16, 16)), load_processor(str(folder))
    assert fresh.to_dict() == saved.to_dict()
    before = fresh.to_json_string()
    fresh.save_pretrained(folder)
    assert before == fresh.to_json_string() == load_processor(str(folder)).to_json_string()


def test_folders_that_were_saved_without_the_code_are_read_by_the_rule(folder, tmp_path):
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    assert settings.pop("auto_map") == {"AutoImageProcessor": "image_processing_umae.UMAEImageProcessor"}
    file.write_text(json.dumps(settings))
    (folder / "image_processing_umae.py").unlink()
    assert type(AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)) is ViTImageProcessorPil
    (tmp_path / "image").write_bytes(encoded("alpha, PNG"))
    processor, image = load_processor(str(folder)), Image.open(tmp_path / "image")
    pixel_values = processor(image, return_tensors="pt").pixel_values
    assert torch.equal(pixel_values, processor(open_image(image), return_tensors="pt").pixel_values)
    processor.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "image_processing_umae.py").exists()


def test_pipelines_have_the_travelling_processor(folder, tmp_path):
    (tmp_path / "image").write_bytes(encoded("16 bits, PNG"))
    extract = pipeline("image-feature-extraction", str(folder), trust_remote_code=True)
    found = torch.tensor(extract(extract.image_processor.open_image(tmp_path / "image")))
    pixel_values = evaluation_processor((16, 16))(Image.open(tmp_path / "image"), return_tensors="pt").pixel_values
    expected = umae.UMAEModel.from_pretrained(folder)(pixel_values).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5)


def test_code_on_a_classifiers_card_reads_the_image_as_training_does(tmp_path, monkeypatch):
    torch.manual_seed(0)
    umae.UMAEForImageClassification(fresh_config(num_labels=5)).save_pretrained(tmp_path)
    evaluation_processor((16, 16)).save_pretrained(tmp_path)
    (tmp_path / "image.jpg").write_bytes(encoded("16 bits, TIFF"))
    monkeypatch.chdir(tmp_path)
    exec(python_block(cards._CLASSIFY), found := {})
    pixel_values = evaluation_processor((16, 16))(open_image("image.jpg"), return_tensors="pt").pixel_values
    logits = umae.UMAEForImageClassification.from_pretrained(tmp_path)(pixel_values).logits
    scores = sorted((label["score"] for label in found["classify"](found["image"])), reverse=True)
    assert scores == pytest.approx(logits.softmax(-1).sort(descending=True).values[0].tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_was_read_is_not_changed_by_reading_it_again(tmp_path, kind):
    once = open_image(encoded(kind))
    assert np.array_equal(np.asarray(open_image(once)), np.asarray(once))


def test_a_copied_folder_keeps_its_processor(folder, tmp_path):
    AutoImageProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "copy")
    shutil.copy(folder / "config.json", tmp_path / "copy")
    again = AutoImageProcessor.from_pretrained(tmp_path / "copy", trust_remote_code=True)
    assert type(again).__name__ == "UMAEImageProcessor"
