import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from golden_models import SETUP_OF_768, fresh_config, original_file
from PIL import Image
from processes import ROOT, run, together
from transformers import ViTConfig, ViTForImageClassification, pipeline

import run_linear_probe
from modeling_umae import UMAEForImageClassification, UMAEForPreTraining
from umae.convert import encoder_from_pretrained
from umae.data.images import load_images
from umae.data.inputs import evaluation_processor, load_processor
from umae.evaluation import features, linear, mae
from umae.evaluation.features import extract_features
from umae.programs import probe as program

CLASSES = ("dark", "green", "red", "striped", "turned", "white")


@pytest.fixture(scope="module", autouse=True)
def fewer_epochs():
    """Of the linear heads of protocol cached; how well 100 of them separate classes is tested in test_linear.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "EPOCHS", 20)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "run"
    torch.manual_seed(0)
    UMAEForPreTraining(fresh_config(pooling="mean")).save_pretrained(folder)
    evaluation_processor((16, 16)).save_pretrained(folder)
    (folder / "README.md").write_text("---\nbase_model: facebook/vit-mae-base\nlicense: cc-by-nc-4.0\n---\n")
    return folder


def image(name: str, numbers) -> Image.Image:
    pixels = numbers.integers(0, 60, (16, 20, 3), dtype=np.uint8)
    pixels += np.uint8({"dark": 0, "white": 190}.get(name, 90))
    pixels[:, :, {"green": 1, "red": 0}.get(name, slice(None))] += np.uint8(60 if name in ("green", "red") else 0)
    if name in ("striped", "turned"):  # equal except for the EXIF orientation
        pixels[:, 10:] = 0
    image = Image.fromarray(pixels)
    return image.convert("L") if name in ("dark", "white") else image


def write_split(folder: Path, seed: int, count: int, classes=CLASSES) -> None:
    """One sub-folder per class; two classes are greyscale, and `turned` is `striped` with an EXIF orientation."""
    numbers = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        exif = Image.Exif()
        if name == "turned":
            exif[0x0112] = 6
        for i in range(count):
            image(name, numbers).save(folder / name / f"{i}.jpg", quality=95, exif=exif)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "images"
    write_split(folder / "train", 0, 20)
    write_split(folder / "test", 1, 6)
    return folder


@pytest.fixture(scope="module")
def probed(model, folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("probe") / "out"
    probe(model, folder, output)
    return output


def probe(model, folder, output, *words):
    named = ("--model_name_or_path", model, "--dataset_name", folder, "--output_dir", output)
    run_linear_probe.main([str(word) for word in (*named, *words)])


def report(output):
    return json.loads((output / "linear_probe.json").read_text())


def own_predictions(model, output, images, feature):
    """The classes that the saved head predicts from extracted features."""
    encoder = encoder_from_pretrained(model, pooling="mean")
    features = extract_features(encoder, images, load_processor(model), 256)[feature]
    head = UMAEForImageClassification.from_pretrained(output).classifier
    return (features @ head.weight.T + head.bias).argmax(dim=1)


def test_the_report_holds_both_poolings_and_the_protocol(probed):
    result = report(probed)
    assert set(result) == {"cls", "mean", "protocol"}
    for feature in ("cls", "mean"):
        numbers = result[feature]
        assert set(numbers) == {
            "top1", "mean_class_top1", "top5", "knn10_top1", "knn20_top1", "effective_rank", "uniformity",
            "learning_rate", "weight_decay", "validation_top1",
        }  # fmt: skip
        assert 60 < numbers["top1"] <= numbers["top5"] <= 100 and 40 < numbers["knn20_top1"] <= 100
        assert numbers["top1"] == round(numbers["top1"], 2)
        assert 1 <= numbers["effective_rank"] <= 32 and 1 / 32 <= numbers["uniformity"] <= 1
    protocol = result["protocol"]
    assert protocol["train"] == {"data": "folder images (train)", "pictures": 120}
    assert protocol["test"]["pictures"] == 36 and protocol["classes"] == 6 and protocol["seeds"] == [0]
    assert protocol["evaluation_transform"]["crop_size"] == {"height": 16, "width": 16}
    assert protocol["linear"]["learning_rates"] and protocol["knn"]["k"] == [10, 20]
    assert "/" not in protocol["model"]
    assert protocol["precision"] == {"training": "float32", "evaluation": "float32"}


def test_the_saved_classifier_repeats_the_reported_accuracy(model, folder, probed):
    images = load_images(str(folder), split="test")
    for_pooling = own_predictions(model, probed, images, "mean")
    correct = (for_pooling == images.labels()).float().mean().item()
    assert round(100 * correct, 2) == report(probed)["mean"]["top1"]


def test_global_pool_takes_the_tokens_as_the_last_layer_returns_them(model, folder, tmp_path):
    """As facebookresearch/mae's models_vit.py does: no last norm, then `fc_norm` of the mean of the patch tokens."""
    probe(model, folder, tmp_path / "out", "--global_pool")
    result = report(tmp_path / "out")["protocol"]
    assert result["classifier_pooling"] == "mean" and "without the encoder's norm" in result["features"]["cls"]
    images = [load_images(str(folder), split="test").read(i) for i in range(4)]
    pixel_values = load_processor(model)(images=images, return_tensors="pt").pixel_values
    classifier = UMAEForImageClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        last = encoder_from_pretrained(model)(pixel_values, output_hidden_states=True).hidden_states[-1]
        feature = torch.nn.functional.layer_norm(last[:, 1:].mean(dim=1), (32,), eps=classifier.config.layer_norm_eps)
        expected, logits = classifier.classifier(feature), classifier(pixel_values).logits
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    with pytest.raises(ValueError, match="pooling cls: global_pool is a mean of patch tokens; leave one"):
        probe(model, folder, tmp_path / "other", "--global_pool", "--pooling", "cls")


def test_a_pipeline_predicts_as_the_probe_does(model, folder, probed):
    """Also for images that EXIF turns and for greyscale ones."""
    images = load_images(str(folder), split="test")
    expected = own_predictions(model, probed, images, "mean").tolist()
    classify = pipeline("image-classification", model=str(probed), trust_remote_code=True)
    files = [str(folder / images.name_of(i)) for i in range(len(images))]
    assert [guesses[0]["label"] for guesses in classify(files)] == [CLASSES[label] for label in expected]
    assert set(classify.model.config.id2label.values()) == set(CLASSES)


def test_the_card_states_the_results_and_its_code_runs(probed, tmp_path):
    text = (probed / "README.md").read_text()
    assert f"| linear probe top-1, mean features, % | {report(probed)['mean']['top1']} |" in text
    assert "base_model:\n- facebook/vit-mae-base\n" in text
    assert "license" not in text.split("---")[1], "that of the encoder's weights is not ours to state"
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    shutil.copytree(probed, tmp_path / "probe")
    image("red", numbers()).save(tmp_path / "probe" / "image.jpg")
    printed = run("-c", code, cwd=tmp_path / "probe", PYTHONPATH="").stdout
    assert "'label': 'red'" in printed


def test_the_classifier_has_the_pooling_asked_for_or_that_of_the_run(model, folder, probed, tmp_path):
    assert UMAEForImageClassification.from_pretrained(probed).config.pooling == "mean"
    probe(model, folder, tmp_path / "cls", "--pooling", "cls")
    classifier = UMAEForImageClassification.from_pretrained(tmp_path / "cls")
    assert classifier.config.pooling == "cls" and not hasattr(classifier.vit, "fc_norm")
    images = load_images(str(folder), split="test")
    correct = own_predictions(model, tmp_path / "cls", images, "cls") == images.labels()
    assert round(100 * correct.float().mean().item(), 2) == report(tmp_path / "cls")["cls"]["top1"]


def test_the_test_images_do_not_influence_the_head(model, folder, probed, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train").symlink_to(folder / "train")
    write_split(tmp_path / "images" / "test", 2, 3)
    for name in CLASSES[:-1]:  # and every label but one is wrong
        (tmp_path / "images" / "test" / name).rename(tmp_path / "images" / "test" / f"_{name}")
    for name, other in zip(CLASSES[:-1], reversed(CLASSES[:-1]), strict=True):
        (tmp_path / "images" / "test" / f"_{name}").rename(tmp_path / "images" / "test" / other)
    probe(model, tmp_path / "images", tmp_path / "out")
    assert report(tmp_path / "out")["mean"]["top1"] != report(probed)["mean"]["top1"]
    for feature in ("cls", "mean"):
        for name in ("learning_rate", "validation_top1"):
            assert report(tmp_path / "out")[feature][name] == report(probed)[feature][name]
    first, second = (UMAEForImageClassification.from_pretrained(out).state_dict() for out in (probed, tmp_path / "out"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_vit_is_probed_with_its_class_token(folder, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    old = {"feature_extractor_type": "ViTFeatureExtractor", "size": 8, "resample": 2, "do_resize": True}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(old))
    probe(tmp_path / "vit", folder, tmp_path / "out")
    assert UMAEForImageClassification.from_pretrained(tmp_path / "out").config.pooling == "cls"
    assert len(pipeline("image-classification", str(tmp_path / "out"), trust_remote_code=True)(image("red", numbers())))


def test_a_file_of_the_original_code_is_probed_with_the_transform_of_mae(folder, tmp_path):
    probe(original_file(tmp_path / "mae.pth", SETUP_OF_768), folder, tmp_path / "out")
    assert load_processor(tmp_path / "out").to_dict() == evaluation_processor((8, 8)).to_dict()
    assert report(tmp_path / "out")["protocol"]["model"] == "mae.pth"


def numbers():
    return np.random.default_rng(5)


def test_five_classes_or_fewer_have_no_top5(model, tmp_path, capsys):
    write_split(tmp_path / "images" / "train", 0, 6, CLASSES[:5])
    write_split(tmp_path / "images" / "validation", 1, 2, CLASSES[:5])
    probe(model, tmp_path / "images", tmp_path / "out")
    assert "labels: 5 classes from sub-folders: dark, green, red, striped, turned\n" in capsys.readouterr().out
    assert report(tmp_path / "out")["mean"]["top5"] is None
    assert report(tmp_path / "out")["protocol"]["test"]["data"] == "folder images (validation)"


def test_invalid_inputs_are_refused_before_any_work(model, folder, tmp_path, monkeypatch):
    def no_work(*args, **kwargs):
        raise AssertionError("work began")

    monkeypatch.setattr(program, "extract_features", no_work)
    for name, splits in {
        "unlabelled": {"train": ["one"], "test": ["one"]},
        "other_classes": {"train": CLASSES[:3], "test": CLASSES[1:4]},
        "one_class": {"train": CLASSES[:1], "test": CLASSES[:1]},
        "no_test": {"train": CLASSES[:2]},
    }.items():
        for split, classes in splits.items():
            write_split(tmp_path / name / split, 0, 2, classes)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    for name, train, test in (("one_label", [2, 2], [1, 2]), ("labels_differ", [0, 1], [7, 1])):
        label_type = datasets.Value("int64") if name == "labels_differ" else features["label"]
        for split, labels in (("train", train), ("test", test)):
            rows = {"image": [image("red", numbers())] * 2, "label": labels}
            (tmp_path / name).mkdir(exist_ok=True)
            datasets.Dataset.from_dict(rows, features=datasets.Features({**features, "label": label_type})).to_parquet(
                tmp_path / name / f"{split}-00000-of-00001.parquet"
            )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine")
    out = tmp_path / "out"
    for words, message in (
        ((tmp_path / "no" / "model", folder, out), "there is no model"),
        ((model, tmp_path / "no" / "data", out), "there is no folder"),
        ((model, tmp_path / "unlabelled", out), "has no labels: its columns are image"),
        ((model, tmp_path / "other_classes", out), "do not have the same classes: 3 names .dark, green, red"),
        ((model, tmp_path / "one_class", out), "has no labels: its columns are image; .*one sub-folder for each class"),
        ((model, tmp_path / "one_label", out), "has the class red only; expected at least 2 classes"),
        ((model, tmp_path / "labels_differ", out), "test. has labels up to 7, .* up to 1 of 2 classes"),
        ((model, tmp_path / "no_test", out), "no split test or validation; give heldout 5%"),
        ((model, folder, out, "--test_split", "train"), "both train"),
        ((model, folder, out, "--label_column_name", "kind"), "no column 'kind'; it has image, label"),
        ((model, folder, tmp_path / "mine"), "is not empty and holds no linear_probe.json"),
        ((model, folder, tmp_path / "mine" / "note.txt"), "is a file"),
        ((model, folder, out, "--poling", "cls"), "did you mean --pooling"),
    ):
        with pytest.raises(ValueError, match=message):
            probe(*words)
    assert not out.exists() and [entry.name for entry in (tmp_path / "mine").iterdir()] == ["note.txt"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="started 2 processes"):
        probe(model, folder, out)


def test_an_earlier_probe_is_overwritten_and_the_run_folder_left_alone(model, folder, tmp_path):
    before = sorted((entry.name, entry.stat().st_mtime_ns) for entry in model.iterdir())
    (tmp_path / "linear_probe.json").write_text("{}")
    probe(model, folder, tmp_path)
    assert set(report(tmp_path)) == {"cls", "mean", "protocol"}
    assert sorted((entry.name, entry.stat().st_mtime_ns) for entry in model.iterdir()) == before


@pytest.mark.slow
def test_two_processes_count_each_image_once_and_report_what_one_does(model, folder, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train").symlink_to(folder / "train")
    write_split(tmp_path / "images" / "test", 1, 6)
    image("red", numbers()).save(tmp_path / "images" / "test" / "red" / "last.jpg")
    words = ("--model_name_or_path", model, "--dataset_name", tmp_path / "images")
    words += ("--per_device_eval_batch_size", "8")
    run(ROOT / "run_linear_probe.py", *words, "--output_dir", tmp_path / "one")
    together(2, ROOT / "run_linear_probe.py", *words, "--output_dir", tmp_path / "two")
    assert report(tmp_path / "two") == report(tmp_path / "one")
    assert report(tmp_path / "two")["protocol"]["test"]["pictures"] == 37
    for feature in ("cls", "mean"):
        right = report(tmp_path / "two")[feature]["top1"] * 37 / 100
        assert right == pytest.approx(round(right), abs=0.01)


@pytest.mark.slow
def test_the_command_ends_with_one_line_on_invalid_input(model, tmp_path):
    words = ("--model_name_or_path", tmp_path / "no" / "model", "--output_dir", tmp_path / "out")
    result = run(ROOT / "run_linear_probe.py", *words, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith("run_linear_probe.py: there is no model")


def reports_of_one_and_two_processes(tmp_path, *words, batch=None, dataset="digits"):
    """Their reports, the same but for the protocol; `batch`: images of a step, shared out if given."""
    torch.manual_seed(0)
    UMAEForPreTraining(fresh_config(image_size=8, patch_size=2)).save_pretrained(tmp_path / "model")
    evaluation_processor((8, 8)).save_pretrained(tmp_path / "model")
    words = ("run_linear_probe.py", "--model_name_or_path", tmp_path / "model", "--dataset_name", dataset, *words)
    for processes in (1, 2):
        share = ("--per_device_train_batch_size", batch // processes) if batch else ()
        together(processes, *words, "--output_dir", tmp_path / str(processes), *share)
    one, two = (report(tmp_path / str(processes)) for processes in (1, 2))
    for name in one.keys() - {"protocol"}:
        assert one[name] == two[name], name
    return one


@pytest.mark.slow
def test_two_processes_report_what_one_does(tmp_path):
    one = reports_of_one_and_two_processes(tmp_path, "--layers", "1", "--attentive", "--augmented_passes", "1")
    attentive = one["attentive"]
    assert 60 < attentive["top1"] <= attentive["top5"] and "cls@1" in one
    card = (tmp_path / "1" / "README.md").read_text()
    assert f"| attentive probe top-1, % | {attentive['top1']} |" in card and "attentive features" not in card


def test_two_processes_report_what_one_does_by_protocol_mae(folder, tmp_path):
    words = ("--protocol", "mae", "--num_train_epochs", "3", "--warmup_epochs", "1")
    one = reports_of_one_and_two_processes(tmp_path, *words, batch=40, dataset=folder)
    record = one["protocol"]["linear"]
    assert record["epochs"] == 3 and record["of_each_seed"][0]["pictures_per_step"] == 40


@pytest.mark.parametrize("mixed", ["no", "bf16"])
def test_the_precision_that_is_reported_is_that_of_training_and_of_evaluation(
    model, folder, tmp_path, monkeypatch, mixed
):
    """Protocol mae trains in the accelerator's precision; what is evaluated is float32 either way."""
    precisions = {"training": set(), "evaluation": set()}

    def recorded(name, function):
        def call(*args, **kwargs):
            precisions[name].add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(mae, "frozen_features", recorded("training", mae.frozen_features))
    monkeypatch.setattr(features, "_encode", recorded("evaluation", features._encode))
    epochs = ("--num_train_epochs", "2", "--warmup_epochs", "1", "--per_device_train_batch_size", "60")
    probe(model, folder, tmp_path / "out", "--protocol", "mae", "--mixed_precision", mixed, *epochs)
    expected = {"training": {torch.bfloat16 if mixed == "bf16" else torch.float32}, "evaluation": {torch.float32}}
    assert precisions == expected
    trained = {"no": "float32", "bf16": "encoder in bf16 autocast, heads in float32"}[mixed]
    assert report(tmp_path / "out")["protocol"]["precision"] == {"training": trained, "evaluation": "float32"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| Precision | training: {trained}; evaluation: float32 |" in card


def test_seeds_layers_and_parts_are_reported_with_their_deviation(model, folder, tmp_path, capsys):
    probe(model, folder, tmp_path / "out", "--seeds", "0,1", "--layers", "all", "--low_shot", "50%,2")
    results = report(tmp_path / "out")
    layers = encoder_from_pretrained(model).config.num_hidden_layers
    expected = {"cls", "mean", *(f"{name}@{layer}" for layer in range(1, layers) for name in ("cls", "mean"))}
    low_shot = results["low_shot"]
    assert set(results) == {*expected, "low_shot", "protocol"} and results["protocol"]["seeds"] == [0, 1]
    assert set(low_shot) == {"50%", "2"} and set(low_shot["2"]) == expected
    assert low_shot["2"]["cls"]["pictures"] == 12 and low_shot["50%"]["cls"]["pictures"] == 60
    for result in (results["cls"], low_shot["2"]["mean@1"]):
        values = [of_seed["top1"] for of_seed in result["of_each_seed"]]
        assert result["top1"] == round(sum(values) / 2, 2)
        assert result["deviation"]["top1"] == pytest.approx(np.std(values, ddof=1), abs=0.01)
    assert low_shot["2"]["mean"]["top1"] < results["mean"]["top1"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "linear probe top-1, mean features, 50% of the labels" in card and "10-NN top-1, cls@1 features" in card
    assert re.search(r"cls, 50% +\d+\.?\d* \+-\d", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layers", "2,99"), "expected `last`, `all`, or numbers from 1 to"),
        (("--seeds", "0,0"), "expected different whole numbers"),
        (("--seeds", "-1"), "expected different whole numbers"),
        (("--low_shot", "0%"), "low_shot '0%': expected a percentage"),
        (("--protocol", "mae", "--low_shot", "5"), "leave out protocol mae"),
        (("--protocol", "mae", "--augmented_passes", "1"), "leave out protocol mae"),
    ],
    ids=str,
)
def test_invalid_arguments_are_refused_before_images_are_encoded(model, folder, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        probe(model, folder, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
