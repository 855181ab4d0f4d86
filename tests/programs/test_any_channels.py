"""Runs on images of any channels and bit depths: from the first line to the probe, resumed and on two processes."""

import json
import shutil
from itertools import product

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from golden_models import fresh_config
from PIL import Image
from processes import run, together
from sklearn.datasets import load_digits
from training_runs import assert_same_curve, metrics

import arguments_umae
import umae
from umae.convert import read_model
from umae.evaluation.features import extract_features
from umae.evaluation.reconstruction import to_pixels
from umae.programs import pretrain

TYPES = {"uint8": 255, "uint16": 65535, "float32": 1}
SIZES = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,decoder_hidden_size=16,decoder_num_hidden_layers=1"


def digits_of(folder, channels: int, kind: str, count: int = 60, ending: str = ".npy", highest: float | None = None):
    """Three classes of digits in two splits; each channel is darker than the one before, with grain."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.flatnonzero(labels < 3)[:count]
    for number, index in enumerate(chosen):
        units = images[index].reshape(8, 8, 1) / 16 * np.linspace(1, 0.4, channels)
        units = np.clip(units * 0.9 + 0.1 * np.random.default_rng(number).random((8, 8, channels)), 0, 1)
        array = (units * (highest or TYPES[kind])).round(0 if kind.startswith("u") else 9).astype(kind)
        path = folder / ("test" if number % 4 == 0 else "train") / str(labels[index]) / f"{number:03}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if ending == ".npy":
            np.save(path, array)
        elif ending == ".png":
            Image.fromarray(array[..., 0] if channels == 1 else array).save(path)
        else:
            planes = {"planarconfig": "contig"} if channels > 1 else {}
            pytest.importorskip("tifffile").imwrite(path, array.squeeze(), photometric="minisblack", **planes)
    return folder


def words(data, folder, *more) -> list[str]:
    return [
        "--dataset_name", str(data), "--output_dir", str(folder), "--image_size", "8", "--patch_size", "2",
        "--config_overrides", SIZES, "--max_train_steps", "6", "--logging_steps", "3", "--checkpointing_steps", "3",
        "--eval_steps", "3", "--per_device_train_batch_size", "16", *map(str, more),
    ]  # fmt: skip


def pretrained(data, folder, **given) -> umae.Run:
    return umae.pretrain(
        **{
            "dataset_name": str(data), "output_dir": folder, "image_size": 8, "patch_size": 2,
            "config_overrides": SIZES, "max_train_steps": 6, "logging_steps": 3, "checkpointing_steps": 3,
            "eval_steps": 3, "per_device_train_batch_size": 16, **given,
        }
    )  # fmt: skip


def check_all_ends_well(data, folder, channels: int, thorough: bool = False, **given) -> None:
    """A run, its probe, features, diagnosis, fine-tuning and evaluation."""
    weights = pretrained(data, folder / "run", **given).folder
    assert json.loads((weights / "config.json").read_text())["num_channels"] == channels
    assert {"effective_rank_cls", "online_top1"} <= umae.Run(weights).metrics[-1].keys()
    assert Image.open(weights / "reconstructions.png").mode == "RGB"
    common = {"model_name_or_path": str(weights), "dataset_name": str(data)}
    report = umae.probe(
        **common, output_dir=folder / "probe", protocol="mae", num_train_epochs=2, warmup_epochs=1,
        per_device_train_batch_size=16,
    )  # fmt: skip
    assert report["protocol"]["evaluation_transform"].get("num_channels", 3) == channels
    if thorough:
        umae.probe(**common, output_dir=folder / "cached", augmented_passes=1, attentive=True)
    tuned = umae.finetune(
        **common, output_dir=folder / "tuned", max_train_steps=2, per_device_train_batch_size=16, rand_augment=0.0
    )
    for classifier in (tuned.folder, folder / "probe"):
        found = umae.evaluate(str(classifier), str(data))
        assert found["images"] == 15 and found["unreadable"] == [] and np.isfinite(found["loss"])
    assert umae.diagnose(str(weights), str(data))["cls"]["effective_rank"] > 1
    (data / "test" / "0" / "odd.npy").write_bytes(b"")
    (reason,) = umae.evaluate(str(tuned.folder), str(data), batch_size=1)["unreadable"]
    assert reason.startswith("test/0/odd.npy: ")
    (data / "test" / "0" / "odd.npy").unlink()


@pytest.mark.parametrize(
    ("channels", "kind", "ending", "asked"),
    [(1, "uint16", ".png", {"num_channels": 1, "intensity_range": "percentiles"}), (7, "uint16", ".npy", {})],
    ids=["grey, 16 bits", "seven channels"],
)
def test_everything_ends_well(tmp_path, capsys, channels, kind, ending, asked):
    data = digits_of(tmp_path / "data", channels, kind, ending=ending)
    check_all_ends_well(data, tmp_path, channels, **asked)
    printed = capsys.readouterr().out
    assert f"  channels         {channels}, " in printed


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".npy", ".tiff"])
@pytest.mark.parametrize(("channels", "kind"), product((1, 3, 4, 7), TYPES))
def test_everything_ends_well_for_all_channels_and_types(tmp_path, channels, kind, ending):
    data = digits_of(tmp_path / "data", channels, kind, ending=ending)
    for asked in ("full", "set", "image"):
        check_all_ends_well(
            data, tmp_path / asked, channels, asked == "full", num_channels=channels, intensity_range=asked
        )


@pytest.mark.parametrize("asked", [{}, pytest.param({"intensity_range": "image"}, marks=pytest.mark.slow)], ids=str)
def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(tmp_path, no_figures, asked):
    data = digits_of(tmp_path / "data", 7, "uint16")
    pretrained(data, tmp_path / "run", checkpoints_total_limit=9, **asked)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    shutil.copytree(tmp_path / "run", tmp_path / "again", ignore=shutil.ignore_patterns("step-6", "*.safetensors~"))
    (tmp_path / "again" / "model.safetensors").unlink()
    (tmp_path / "again" / "run.json").write_text(json.dumps({**record, "finished": False}))
    pretrained(data, tmp_path / "again", checkpoints_total_limit=9, **asked)
    for name in ("model.safetensors", "preprocessor_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    assert metrics(tmp_path / "again") == metrics(tmp_path / "run")


def test_two_processes_measure_once_and_train_as_one(tmp_path):
    data = digits_of(tmp_path / "data", 7, "float32")
    told = ("--intensity_range", "percentiles", "--mixed_precision", "no")  # gradients in bf16 depend on the batch
    run("run_pretrain.py", *words(data, tmp_path / "one", *told))
    together(2, "run_pretrain.py", *words(data, tmp_path / "two", *told, "--per_device_train_batch_size", 8))
    one, two = ((tmp_path / name / "preprocessor_config.json").read_bytes() for name in ("one", "two"))
    assert one == two and b'"intensity_range"' in one
    assert_same_curve(metrics(tmp_path / "two"), metrics(tmp_path / "one"))


def test_two_processes_are_refused_with_one_message(tmp_path):
    data = digits_of(tmp_path / "data", 7, "uint16")
    wrong = words(data, tmp_path / "run", "--image_mean", "0.5,0.5")
    for result in together(2, "run_pretrain.py", *wrong, check=False):
        assert result.returncode == 1
        assert "--image_mean has 2 numbers, and the images 7 channels" in result.stderr


def test_what_is_used_is_in_the_identity_of_the_run_and_in_its_folder(tmp_path, capsys, no_figures):
    data = digits_of(tmp_path / "data", 7, "uint16", highest=4095)
    pretrained(data, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "of 65,535; with intensity_range set they fill the range" in printed
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    settings = json.loads((tmp_path / "run" / "preprocessor_config.json").read_text())
    for name in ("intensity_range", "image_mean", "image_std"):
        assert identity[name] == settings[name]
    assert settings["num_channels"] == 7 and len(settings["image_std"]) == 7
    card = (tmp_path / "run" / "README.md").read_text()
    assert "7 channels, the full range; figures show the first three as red, green and blue" in card
    with pytest.raises(ValueError, match=r"holds a run with intensity_range full, not \[.*\]; use another output_dir"):
        pretrained(data, tmp_path / "run", intensity_range="set")


def test_images_with_another_number_of_channels_are_counted_and_named(tmp_path, no_figures):
    data = digits_of(tmp_path / "data", 7, "uint8")
    np.save(data / "train" / "0" / "odd.npy", np.zeros((8, 8, 3), np.uint8))
    result = pretrained(data, tmp_path / "run", max_unreadable_share=0.5)
    (reason,) = json.loads((result.folder / "run.json").read_text())["unreadable"].values()
    assert reason.startswith("train/0/odd.npy: an array of shape (8, 8, 3), of which neither the first nor the last")
    with pytest.raises(ValueError, match=r"^none of the .* images .* can be read: .*of 5 channels"):
        pretrained(data, tmp_path / "five", num_channels=5)


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_rand_augment_refuses_what_has_no_colours_by_name(tmp_path, kind):
    umae.UMAEForPreTraining(fresh_config(image_size=8, patch_size=2, num_channels=1)).save_pretrained(tmp_path / "run")
    processor = umae.UMAEImageProcessor(num_channels=1, size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[1])
    processor.save_pretrained(tmp_path / "run")
    data = digits_of(tmp_path / "data", 1, kind, ending=".png")
    message = (
        r"^rand_augment changes colours of 8-bit RGB \(autocontrast, .*, color, .*of 1 channels; use rand_augment 0"
    )
    with pytest.raises(ValueError, match=message):
        umae.finetune(model_name_or_path=tmp_path / "run", dataset_name=str(data), output_dir=tmp_path / "tuned")


@pytest.mark.parametrize("channels", [1, 4, 7])
def test_rgb_weights_start_a_model_of_other_channels_that_sees_equal_ones_as_grey(tmp_path, capsys, channels):
    rgb = umae.UMAEForPreTraining(fresh_config(norm_pix_loss=False)).eval()
    rgb.save_pretrained(tmp_path / "rgb")
    args = arguments_umae.PretrainModelArguments(model_name_or_path=str(tmp_path / "rgb"), num_channels=channels)
    model = pretrain.make_model(Accelerator(cpu=True), args).eval()
    assert f"each of the {channels} channels starts from the mean of the three, in the patch" in capsys.readouterr().out
    grey = torch.rand(2, 1, *rgb.config.image_height_width, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        of_rgb = rgb(grey.expand(-1, 3, -1, -1), noise=noise, output_logits=True)
        ours = model(grey.expand(-1, channels, -1, -1), noise=noise, output_logits=True)
    assert torch.allclose(ours.features, of_rgb.features, atol=1e-5)
    means = of_rgb.logits.unflatten(-1, (-1, 3)).mean(-1, keepdim=True)
    assert torch.allclose(ours.logits.unflatten(-1, (-1, channels)), means.expand(-1, -1, -1, channels), atol=1e-5)


def test_weights_of_other_channels_are_taken_as_they_are_and_never_guessed_at(tmp_path):
    umae.UMAEForPreTraining(fresh_config(num_channels=4)).save_pretrained(tmp_path / "four")
    args = arguments_umae.PretrainModelArguments(model_name_or_path=str(tmp_path / "four"))
    model = pretrain.make_model(Accelerator(cpu=True), args)
    _, tensors = read_model(tmp_path / "four")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="the weights are for 4 channels, not 7; only those for RGB"):
        pretrain.make_model(Accelerator(cpu=True), args, 7)


def test_features_of_arrays_are_those_of_the_same_photographs(tmp_path, no_figures):
    weights = pretrained("digits", tmp_path / "run", eval_steps=0, recipe=None).folder
    digits = umae.load_images("digits", split="test")
    for i in range(8):
        np.save(tmp_path / f"{i}.npy", np.asarray(digits.read(i)))
    encoder = umae.encoder_from_pretrained(str(weights), pooling="mean")
    arrays = extract_features(encoder, umae.load_images(str(tmp_path)), umae.load_processor(str(weights)), 8)
    expected = extract_features(encoder, digits, umae.load_processor(str(weights)), 8)
    assert torch.allclose(arrays["cls"], expected["cls"][:8], atol=1e-5)


@pytest.mark.parametrize(("channels", "shown"), [(1, (0, 0, 0)), (2, (0, 0, 0)), (3, (0, 1, 2)), (7, (0, 1, 2))])
def test_figures_show_three_channels_as_colours_or_one_as_grey(channels, shown):
    values = torch.rand(2, channels, 4, 5)
    mean, std = [0.1 * i for i in range(channels)], [1.0 + i for i in range(channels)]
    normalised = (values - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    expected = (values[:, list(shown)] * 255).round().permute(0, 2, 3, 1)
    pixels = to_pixels(normalised, mean, std)
    assert pixels.shape == (2, 4, 5, 3) and np.abs(pixels.astype(float) - expected.numpy()).max() <= 1


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_of_arrays_train_as_folders_do(tmp_path, no_figures, streaming):
    data = digits_of(tmp_path / "data", 7, "uint16")
    files = sorted((data / "train").rglob("*.npy"))
    rows = [{"bytes": file.read_bytes(), "path": None} for file in files]
    (tmp_path / "shards").mkdir()
    features = datasets.Features({"image": datasets.Image(decode=False)})
    datasets.Dataset.from_dict({"image": rows}, features).to_parquet(tmp_path / "shards" / "train.parquet")
    result = pretrained(tmp_path / "shards", tmp_path / "run", streaming=streaming)
    assert result.model().config.num_channels == 7
