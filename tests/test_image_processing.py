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
from image_processing_umae import UnreadableImage, open_image
from umae.convert import encoder_from_pretrained
from umae.data.decoding import Reading
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
    folder = tmp_path / "weights" / "umae-vit-mini-64"  # the name in README
    umae.UMAEForPreTraining(fresh_config()).save_pretrained(folder)
    evaluation_processor((16, 16)).save_pretrained(folder)
    return folder


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


CELLS = NUMBERS.integers(0, 4096, (20, 28, 7)).astype(np.uint16)


@pytest.fixture
def seven(tmp_path):
    """The image processor of a model for seven channels of 12 bits, saved in a folder."""
    processor = evaluation_processor((16, 16), Reading(7, (0.0, 4095.0)), [0.5] * 7, [0.25] * 7)
    processor.save_pretrained(tmp_path / "seven")
    np.save(tmp_path / "image.npy", CELLS)
    return tmp_path / "seven"


def test_a_processor_of_other_channels_reads_files_arrays_and_tensors_alike_with_its_code_or_ours(seven, tmp_path):
    remote = AutoImageProcessor.from_pretrained(seven, trust_remote_code=True)
    images = load_images(str(tmp_path)).read_as(Reading(7, (0.0, 4095.0)))
    expected = remote(images.read(0), return_tensors="pt").pixel_values
    assert expected.shape == (1, 7, 16, 16) and expected.dtype == torch.float32
    first, file = CELLS.transpose(2, 0, 1), str(tmp_path / "image.npy")
    for processor in (remote, load_processor(str(seven))):
        sources = (CELLS, first, torch.from_numpy(CELLS.astype(np.int32)), file, processor.open_image(file))
        for source in (*sources, [CELLS], CELLS[None]):
            assert torch.equal(processor(source, return_tensors="pt").pixel_values, expected)
    wide = evaluation_processor((20, 28), Reading(7, (0.0, 4095.0)), [0.0] * 7, [1.0] * 7)
    wide.size = {"height": 20, "width": 28}
    shares = wide(CELLS, do_center_crop=False, return_tensors="pt").pixel_values[0]
    assert np.array_equal(shares, (first / 4095).astype(np.float32)), "an image of this size keeps its values"


def test_channels_are_resized_as_pillow_resizes_those_of_rgb(tmp_path):
    pixels = NUMBERS.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    rgb = evaluation_processor((16, 16))(Image.fromarray(pixels), do_normalize=False, return_tensors="pt").pixel_values
    for array in (pixels, pixels.astype(np.uint16) * 257):
        reading = Reading(3, (0.0, 255.0 if array.dtype == np.uint8 else 65535.0))
        processor = evaluation_processor((16, 16), reading)
        floats = processor(array, do_normalize=False, return_tensors="pt").pixel_values
        assert (floats - rgb).abs().max() < 2.1 / 255, "8 bits are rounded in between"
        edges = processor((pixels > 127) * array.max(), do_normalize=False, size={"height": 99, "width": 99})
        assert np.min(edges.pixel_values) == 0 and np.max(edges.pixel_values) == 1, "bicubic filters overshoot"


def test_grey_arrays_of_two_sides_are_images_of_one_channel():
    processor = evaluation_processor((16, 16), Reading(1), [0.5], [0.5])
    expected = processor(CELLS[..., :1], return_tensors="pt").pixel_values
    for source in (CELLS[..., 0], [CELLS[..., 0]], Image.fromarray(CELLS[..., 0])):
        assert torch.equal(processor(source, return_tensors="pt").pixel_values, expected)


def test_arrays_that_do_not_fit_are_refused_and_the_settings_hold_numbers(seven):
    processor = load_processor(str(seven))
    with pytest.raises(UnreadableImage, match=r"^image: .*; expected .* of 7 channels"):
        processor(CELLS[..., :3])
    with pytest.raises(ValueError, match=r"intensity_range 5,5 is empty"):
        umae.UMAEImageProcessor(intensity_range=[5, 5])
    settings = json.loads((seven / "preprocessor_config.json").read_text())
    assert (settings["num_channels"], settings["intensity_range"]) == (7, [0.0, 4095.0])
    assert settings["image_mean"] == [0.5] * 7 and settings["do_convert_rgb"] is False


def test_the_settings_of_rgb_name_neither_channels_nor_range(folder):
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert {"num_channels", "intensity_range"}.isdisjoint(settings)


@pytest.mark.parametrize("classifies", [False, True])
def test_code_on_the_card_of_other_channels_reads_the_image_as_training_does(seven, tmp_path, monkeypatch, classifies):
    torch.manual_seed(0)
    kind = umae.UMAEForImageClassification if classifies else umae.UMAEModel
    model = kind(fresh_config(num_channels=7, num_labels=5)).eval()
    model.save_pretrained(seven)
    monkeypatch.chdir(seven)
    (seven / "image.npy").write_bytes((tmp_path / "image.npy").read_bytes())
    text = cards._classify(seven) if classifies else cards._use(seven, 32)
    assert "7 channels, values from 0 to 4095" in text
    exec(python_block(text), found := {})
    with torch.no_grad():
        output = model(load_processor(str(seven))(CELLS, return_tensors="pt").pixel_values)
    if classifies:
        assert found["label"] == output.logits.argmax().item()
    else:
        assert torch.allclose(found["features"], output.pooler_output, atol=1e-5)
