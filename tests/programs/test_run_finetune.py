"""Fine-tuning as people start it: real images, real kills, several processes."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal

import pytest
import torch
from accelerate import Accelerator
from golden_models import SETUP_OF_768, fresh_config, original_file
from huggingface_hub import ModelCard
from PIL import Image
from processes import ROOT, run, together
from safetensors.torch import load_file
from training_runs import digits_with_lists, metrics
from transformers import pipeline

import arguments_umae
import run_finetune
from command_line_umae import given_flags
from modeling_umae import UMAEForImageClassification, UMAEForPreTraining
from umae.convert import read_model
from umae.data.classes import multi_hot
from umae.data.images import load_images
from umae.data.inputs import evaluation_processor, load_processor
from umae.evaluation.accuracy import class_logits, guess, multi_label_scores
from umae.evaluation.problem import MULTI_LABEL
from umae.programs import finetune
from umae.training import finetuning, loop

SHORT = (
    "--max_train_steps", "12", "--checkpointing_steps", "4", "--logging_steps", "3", "--eval_steps", "4",
    "--per_device_train_batch_size", "32", "--mixed_precision", "no",
)  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """What pre-training leaves, for the digits; pooling cls, with a decoder."""
    folder = tmp_path_factory.mktemp("encoder") / "run"
    torch.manual_seed(0)
    UMAEForPreTraining(fresh_config(image_size=8, patch_size=2)).save_pretrained(folder)
    evaluation_processor((8, 8)).save_pretrained(folder)
    (folder / "README.md").write_text("---\nbase_model: facebook/vit-mae-base\nlicense: cc-by-nc-4.0\n---\n")
    return folder


def command(encoder, folder, *words) -> list[str]:
    return [str(word) for word in ("--model_name_or_path", encoder, "--output_dir", folder, *SHORT, *words)]


@pytest.fixture(scope="module")
def finished(encoder, tmp_path_factory):
    """A short run on the digits, undisturbed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run_finetune.main(command(encoder, folder))
    return folder, printed.getvalue()


def test_a_run_says_what_it_will_do_and_leaves_a_whole_classifier(finished):
    folder, printed = finished
    for text in (
        "1,438 from digits (train), evaluated on 359 from digits (test)",
        "labels           10 classes from column 'label': 0, 1, 2, 3, 4, 5, ...",
        "12 (0.2727 epochs), 6 of them warm-up",
        "drop path 0.1, crops from 0.08, horizontal flip 0.5, rand augment 9, random erasing 0.25, mixup 0.8,",
    ):
        assert text in printed
    assert {entry.name for entry in folder.iterdir()} == {
        "README.md", "config.json", "configuration_umae.py", "finetune.json", "image_processing_umae.py",
        "metrics.jsonl", "model.safetensors", "modeling_umae.py", "preprocessor_config.json", "run.json",
        "run.lock", "step-8", "step-12",
    }  # fmt: skip
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert [line["step"] for line in lines if "test_top1" in line] == [6, 9, 12]
    report = json.loads((folder / "finetune.json").read_text())
    assert report["top1"] == round(100 * lines[-1]["test_top1"], 2) and report["top5"] >= report["top1"]
    protocol = report["protocol"]
    assert protocol["model"] == "run" and protocol["test"]["pictures"] == 359 and protocol["drop_path_rate"] == 0.1
    assert protocol["training"]["layer_decay"] == 0.65 and protocol["training"]["betas"] == [0.9, 0.999]
    assert protocol["training"]["learning_rate"] == pytest.approx(5e-4 * 32 / 256)
    assert protocol["augmentation"] == {
        "min_crop_scale": 0.08, "horizontal_flip": 0.5, "rand_augment": 9.0, "random_erasing": 0.25, "mixup": 0.8,
        "cutmix": 1.0, "label_smoothing": 0.1,
    }  # fmt: skip
    card = (folder / "README.md").read_text()
    assert "model-index" in card and f"value: {report['top1']}" in card and str(folder.parent) not in card
    assert "base_model:\n- facebook/vit-mae-base\n" in card and "license" not in card.split("---")[1]


def test_the_position_table_is_fine_tuned_as_in_mae(finished, encoder):
    """models_vit.py of facebookresearch/mae trains `pos_embed`, which pre-training keeps fixed."""
    name = "vit.embeddings.position_embeddings"
    before, after = (read_model(folder)[1][name] for folder in (encoder, finished[0]))
    assert 1e-5 < (after - before).abs().max() < 0.1
    state = load_file(finished[0] / "step-12" / "optimizer.safetensors")
    assert state[f"{name}/exp_avg"].abs().max() > 0


def test_a_run_whose_position_table_was_fixed_is_not_continued_with_one_that_is_trained(encoder, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["identity"].pop("position_table", None)
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "finished": False}))
    with pytest.raises(ValueError, match="holds a run with position_table None, not trained; use another"):
        run_finetune.main(command(encoder, tmp_path / "run"))


@pytest.mark.parametrize(
    ("words", "steps"), [(["--num_train_epochs", "50"], 5 * 44), (["--num_train_epochs", "4"], 2 * 44)]
)
def test_the_warm_up_is_maes_five_epochs_and_at_most_half_of_the_run(encoder, tmp_path, words, steps):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").touch()  # the run is refused once its schedule is known
    words = [word for word in command(encoder, tmp_path / "run", *words) if word not in ("--max_train_steps", "12")]
    seen = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="not empty"):
        patch.setattr(finetune, "identity_of", lambda job, weights: seen.append(job.schedule.warmup_steps) or {})
        run_finetune.main(words)
    assert seen == [steps]


def test_the_folder_classifies_in_a_pipeline_under_the_names_of_the_classes(finished, tmp_path):
    folder, _ = finished
    Image.new("L", (20, 10), 200).save(tmp_path / "image.png")
    guesses = pipeline("image-classification", model=str(folder), trust_remote_code=True)(str(tmp_path / "image.png"))
    assert {one["label"] for one in guesses} <= set("0123456789") and len(guesses) == 5


def test_the_model_is_maes_and_starts_from_the_encoders_weights(encoder):
    args = arguments_umae.FinetuneModelArguments(model_name_or_path=str(encoder))
    torch.manual_seed(1)
    model = finetune.make_model(Accelerator(cpu=True), args, list("abc"))
    assert not any(name.startswith(("vit.layernorm", "decoder")) for name in model.state_dict())
    assert model.config.drop_path_rate == 0.1 and model.config.pooling == "mean" and model.config.num_labels == 3
    assert torch.equal(model.vit.fc_norm.weight, torch.ones(32))
    assert 0 < model.classifier.weight.abs().max() < 1e-3
    _, tensors = read_model(encoder)
    taken = [name for name in model.state_dict() if not name.startswith(("vit.fc_norm", "classifier"))]
    assert len(taken) > 30 and all(torch.equal(model.state_dict()[name], tensors[name]) for name in taken)


def test_the_norm_of_the_pooled_feature_starts_fresh_whatever_pretraining_has_made_of_it(tmp_path):
    pretrained = UMAEForPreTraining(fresh_config(pooling="mean"))
    torch.nn.init.constant_(pretrained.vit.fc_norm.weight, 3.0)
    pretrained.save_pretrained(tmp_path)
    model = finetune.make_model(
        Accelerator(cpu=True), arguments_umae.FinetuneModelArguments(model_name_or_path=str(tmp_path)), list("abc")
    )
    assert torch.equal(model.vit.fc_norm.weight, torch.ones(32))


def test_an_encoder_is_fine_tuned_at_another_resolution_with_the_normalisation_it_was_trained_with(
    encoder, tmp_path, capsys
):
    weights, folder = tmp_path / "weights", tmp_path / "run"
    shutil.copytree(encoder, weights)
    processor = evaluation_processor((8, 8))
    processor.image_mean = processor.image_std = [0.5, 0.5, 0.5]
    processor.save_pretrained(weights)
    run_finetune.main(command(weights, folder, "--max_train_steps", "1", "--image_size", "16"))
    printed = capsys.readouterr().out
    assert "16 x 16 pixels" in printed
    assert "the encoder's position table is interpolated from 4 x 4 to 8 x 8 patches\n" in printed
    assert UMAEForImageClassification.from_pretrained(folder).config.grid == (8, 8)
    processor = load_processor(folder)
    assert processor.crop_size == {"height": 16, "width": 16} and processor.size == {"shortest_edge": 16}
    assert processor.image_mean == processor.image_std == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="patch_size 2 does not divide image_size 15"):
        run_finetune.main(command(weights, tmp_path / "odd", "--image_size", "15"))


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
def test_a_run_that_is_killed_while_it_saves_ends_with_the_same_bits(encoder, finished, tmp_path, workers):
    folder, _ = finished
    mine = tmp_path / "run"
    (tmp_path / "killed.py").write_text(
        "import os, signal, sys, run_finetune\n"
        "from umae.training import checkpoints\n"
        "plain = checkpoints.write_training_state\n"
        "def killed(path, *arguments):\n"
        "    if 'step-8' in str(path):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return plain(path, *arguments)\n"
        "checkpoints.write_training_state = killed\n"
        "run_finetune.main(sys.argv[1:])\n"
    )
    words = command(encoder, mine, "--dataloader_num_workers", workers)
    assert run(tmp_path / "killed.py", *words, check=False).returncode == -signal.SIGKILL
    assert {entry.name for entry in mine.glob("step-*")} == {"step-4", "step-8.tmp"}
    run_finetune.main(words)
    assert (mine / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert metrics(mine) == metrics(folder)
    assert (mine / "finetune.json").read_bytes() == (folder / "finetune.json").read_bytes()


def test_a_run_stopped_by_a_signal_goes_on_to_the_same_bits(encoder, finished, tmp_path, monkeypatch):
    folder, _ = finished
    steps = iter(range(100))

    def interrupted(*arguments, optimizer_step=loop.optimizer_step, **named):
        if next(steps) == 4:  # between two lines of metrics.jsonl
            os.kill(os.getpid(), signal.SIGTERM)
        return optimizer_step(*arguments, **named)

    monkeypatch.setattr(loop, "optimizer_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        run_finetune.main(command(encoder, tmp_path / "run"))
    assert stop.value.code == 143 and not (tmp_path / "run" / "finetune.json").exists()
    run_finetune.main(command(encoder, tmp_path / "run"))
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert metrics(tmp_path / "run") == metrics(folder)


def test_a_run_that_lacks_only_its_report_is_judged_and_finished(encoder, finished, tmp_path):
    folder, _ = finished
    mine = tmp_path / "run"
    shutil.copytree(folder, mine)
    record = json.loads((mine / "run.json").read_text())
    (mine / "run.json").write_text(json.dumps({**record, "finished": False}))
    (mine / "finetune.json").unlink()
    run_finetune.main(command(encoder, mine))
    assert (mine / "finetune.json").read_bytes() == (folder / "finetune.json").read_bytes()


def test_a_finished_run_changes_nothing_and_another_ones_folder_is_refused(encoder, finished, capsys):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run_finetune.main(command(encoder, folder))
    assert "finished; nothing to do" in capsys.readouterr().out
    for words, message in (
        (("--mixup", "0"), "mixup 0.8, not 0.0"),
        (("--layer_decay", "1"), "layer_decay 0.65, not 1.0"),
        (("--drop_path_rate", "0"), "drop_path_rate 0.1, not 0.0"),
        (("--min_crop_scale", "1"), "min_crop_scale 0.08, not 1.0"),
    ):
        with pytest.raises(ValueError, match=f"holds a run with {message}; use another output_dir"):
            run_finetune.main(command(encoder, folder, *words))
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


EVERY = ("--logging_steps", "1", "--checkpointing_steps", "12", "--drop_path_rate", "0", "--base_learning_rate", "0.01")


def test_two_processes_train_as_one_does_with_mixup_and_count_every_test_image_once(encoder, tmp_path):
    """Drop path is off: what an image skips is keyed by the process. The partners of mixup are not."""
    few = (*EVERY, "--max_train_steps", "6")
    run_finetune.main(command(encoder, tmp_path / "one", *few))
    together(2, "run_finetune.py", *command(encoder, tmp_path / "two", *few), "--per_device_train_batch_size", "16")
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line["step"] for line in two] == list(range(1, 7))
    for mine, expected in zip(two, one, strict=True):
        for name in ("loss", "grad_norm", "learning_rate"):
            assert mine[name] == pytest.approx(expected[name], rel=1e-4), (mine["step"], name)
    assert one[0]["loss"] != one[-1]["loss"]
    # 359 images are shared as 180 and 180, so one is looked at twice and must not be counted twice
    model = UMAEForImageClassification.from_pretrained(tmp_path / "two")
    test = load_images("digits", split="test")
    guesses, _, unreadable = guess(model, test, load_processor(tmp_path / "two"), 100, 0, 10, Accelerator(cpu=True))
    top1 = (guesses[:, 0] == test.labels()).float().mean().item()
    assert guesses.shape == (359, 5) and unreadable == []
    assert two[-1]["test_top1"] == pytest.approx(top1, abs=1e-6)


@pytest.mark.slow
def test_plain_fine_tuning_learns_the_digits(encoder, tmp_path):
    words = command(encoder, tmp_path / "run", "--max_train_steps", "660", "--base_learning_rate", "0.04")
    off = "--layer_decay 1 --horizontal_flip 0 --rand_augment 0 --random_erasing 0 --mixup 0 --cutmix 0"
    words += [*off.split(), "--label_smoothing", "0", "--drop_path_rate", "0", "--min_crop_scale", "0.8"]
    run_finetune.main([*words, "--logging_steps", "100", "--checkpointing_steps", "500", "--eval_steps", "0"])
    assert json.loads((tmp_path / "run" / "finetune.json").read_text())["top1"] > 85


def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_no_weight(encoder, tmp_path, monkeypatch):
    steps = iter(range(100))

    def spoil(pixel_values, mean, std, normalize=finetuning.normalize):
        values = normalize(pixel_values, mean, std)
        return values if next(steps) < 5 else values.index_fill(0, torch.tensor([3]), float("nan"))

    monkeypatch.setattr(finetuning, "normalize", spoil)
    with pytest.raises(FloatingPointError, match=r"^loss was not finite at step 6, with the images .* of digits"):
        run_finetune.main(command(encoder, tmp_path / "run", "--eval_steps", "0"))
    assert [entry.name for entry in (tmp_path / "run").glob("step-*")] == ["step-4"]
    model = UMAEForImageClassification.from_pretrained(tmp_path / "run" / "step-4")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def write_images(folder, classes, count, split="train"):
    for number, name in enumerate(classes):
        (folder / split / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (9, 9), (60 * number + i, 200 - i, 0)).save(folder / split / name / f"{i}.png")


def test_unreadable_images_are_left_out_of_training_and_count_as_wrong_in_the_test(encoder, tmp_path, capsys):
    folder = tmp_path / "images"
    write_images(folder, ("cat", "dog"), 20)
    write_images(folder, ("cat", "dog"), 4, "test")
    (folder / "train" / "cat" / "3.png").write_bytes(b"")
    (folder / "test" / "dog" / "1.png").write_text("<html>")
    words = ("--dataset_name", folder, "--max_unreadable_share", "0.1", "--per_device_train_batch_size", "8")
    run_finetune.main(command(encoder, tmp_path / "run", *words))
    printed = capsys.readouterr().out
    assert printed.count("left out: train/cat/3.png") == 1 and printed.count("counted as wrong: test/dog/1.png") == 1
    report = json.loads((tmp_path / "run" / "finetune.json").read_text())
    assert report["top1"] in [12.5 * n for n in range(8)] and report["top5"] is None
    assert report["protocol"]["train"]["unreadable"] == 1 and len(report["protocol"]["test"]["counted_as_wrong"]) == 1


def test_data_that_cannot_be_learned_from_is_refused_with_what_to_do(encoder, tmp_path):
    write_images(tmp_path / "differ", ("cat", "dog"), 4)
    write_images(tmp_path / "differ", ("cat", "fox"), 4, "test")
    write_images(tmp_path / "alone", ("cat", "dog"), 4)
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "bare" / "0.png")
    for name, message in {
        "bare": "has no labels: its columns are image; .*give a folder with one sub-folder for each class",
        "differ": r"do not have the same classes: 2 names \(cat, dog\) and 2 names \(cat, fox\); give both splits",
        "alone": "give heldout 5% to evaluate on a share of the images, or name one of train with test_split",
    }.items():
        with pytest.raises(ValueError, match=message):
            run_finetune.main(command(encoder, tmp_path / "run", "--dataset_name", tmp_path / name))
    write_images(tmp_path / "alone", ("cat", "dog"), 4, "test")
    for words, message in {
        (): r"holds 8 images, fewer than one step of 32 \(32 per device x 1 processes x 1 accumulated\); lower",
        (
            "--per_device_train_batch_size",
            "7",
        ): "7 is odd, and mixup and cutmix take images in pairs; use 8, or mixup 0",
        (
            "--per_device_train_batch_size",
            "4",
            "--test_split",
            "train",
        ): "are both train; use another split for evaluation",
        ("--per_device_train_batch_size", "4", "--min_crop_scale", "0"): "crops of nothing",
    }.items():
        with pytest.raises(ValueError, match=message):
            run_finetune.main(command(encoder, tmp_path / "run", "--dataset_name", tmp_path / "alone", *words))
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------ any number of classes


NO_AUGMENTATION = (
    "--layer_decay", "1", "--horizontal_flip", "0", "--rand_augment", "0", "--random_erasing", "0",
    "--drop_path_rate", "0", "--min_crop_scale", "0.8",
)  # fmt: skip


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    return digits_with_lists(tmp_path_factory.mktemp("lists") / "digits")


@pytest.fixture(scope="module")
def tagged(encoder, lists, tmp_path_factory):
    """A run of a few seconds on the digits, each of them odd, large, both or neither."""
    folder = tmp_path_factory.mktemp("tagged") / "run"
    words = ("--dataset_name", lists, "--max_train_steps", "150", "--base_learning_rate", "0.04", "--mixup", "0")
    words += ("--cutmix", "0", "--logging_steps", "50", "--eval_steps", "50", "--checkpointing_steps", "150")
    run_finetune.main(command(encoder, folder, *words, *NO_AUGMENTATION))
    return folder


def test_images_of_several_classes_are_learned_and_every_file_says_how_well(tagged):
    lines, report = metrics(tagged), json.loads((tagged / "finetune.json").read_text())
    names = ("mAP", "f1_micro", "f1_macro")
    for name in names:
        assert report[name] == round(100 * lines[-1][f"test_{name}"], 2)
    assert report["mAP"] > 80 and report["f1_macro"] > 70 and "top1" not in report
    assert lines[-1]["loss"] < lines[0]["loss"]
    card = ModelCard((tagged / "README.md").read_text())
    results = {(result.metric_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    types = (("mAP", "mean_average_precision"), ("micro F1", "f1"), ("macro F1", "f1"))
    assert results == {key: report[name] for key, name in zip(types, names, strict=True)}
    assert "a probability of its own" in card.text and "macro F1 are means over the classes" in card.text


def test_the_pipeline_gives_each_class_a_probability_of_its_own(tagged, lists):
    classify = pipeline("image-classification", model=str(tagged), trust_remote_code=True)
    test = load_images(str(lists), split="test")
    answers = [{one["label"]: one["score"] for one in classify(test.read(index))} for index in range(40)]
    assert set(answers[0]) == {"large", "odd"}
    assert any(abs(sum(answer.values()) - 1) > 0.2 for answer in answers)
    right = [
        (answer[name] > 0.5) == (name in test.label_lists()[i]) for i, answer in enumerate(answers) for name in answer
    ]
    assert sum(right) / len(right) > 0.7


@pytest.mark.slow
def test_two_processes_train_and_evaluate_several_classes_as_one_does(encoder, lists, tmp_path):
    few = (*EVERY, "--max_train_steps", "4", "--dataset_name", lists)
    run_finetune.main(command(encoder, tmp_path / "one", *few))
    together(2, "run_finetune.py", *command(encoder, tmp_path / "two", *few), "--per_device_train_batch_size", "16")
    for mine, expected in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(expected[name], rel=1e-4), (mine["step"], name)
    model = UMAEForImageClassification.from_pretrained(tmp_path / "two")
    test = load_images(str(lists), split="test")
    logits, errors = class_logits(model, test, load_processor(tmp_path / "two"), 100, 0, 2, Accelerator(cpu=True))
    assert logits.shape == (359, 2) and errors == []
    scores = multi_label_scores(logits.sigmoid(), multi_hot(test, ["large", "odd"]))
    last = metrics(tmp_path / "two")[-1]
    assert {name: last[f"test_{name}"] for name in scores} == pytest.approx(scores, abs=1e-6)


def test_the_loss_of_several_classes_is_the_models_own(encoder, lists, tmp_path, monkeypatch):
    """transformers' binary cross entropy, of targets that neither mixing nor smoothing has changed."""
    losses = []

    def compared(logits, targets, loss=MULTI_LABEL.loss):
        losses.append((loss(logits, targets), model.loss_of(logits, targets)))
        assert {*targets.flatten().tolist()} == {0.0, 1.0} and (targets.sum(dim=1) == 2).any()
        return losses[-1][0]

    model = UMAEForImageClassification(fresh_config(num_labels=2, problem_type="multi_label_classification"))
    monkeypatch.setattr(finetune, "MULTI_LABEL", dataclasses.replace(MULTI_LABEL, loss=compared))
    words = ("--dataset_name", lists, "--mixup", "0", "--cutmix", "0", "--label_smoothing", "0", "--eval_steps", "0")
    run_finetune.main(command(encoder, tmp_path / "run", "--max_train_steps", "2", *words))
    assert len(losses) == 2 and all(torch.equal(*pair) for pair in losses)


def test_one_class_an_image_is_trained_from_a_classifier_of_several(tagged, tmp_path):
    run_finetune.main(command(tagged, tmp_path / "run", "--max_train_steps", "1"))
    assert UMAEForImageClassification.from_pretrained(tmp_path / "run").config.problem_type is None


def test_a_file_of_the_original_code_is_fine_tuned(tmp_path):
    """Of the width of ViT-B, whose heads are known, and little else; files have no image processor."""
    path = original_file(tmp_path / "mae.pth", SETUP_OF_768)
    run_finetune.main(command(path, tmp_path / "run", "--max_train_steps", "1"))
    assert UMAEForImageClassification.from_pretrained(tmp_path / "run").config.num_attention_heads == 12


def test_the_recipe_of_the_digits_is_read(encoder):
    recipe = ("--recipe", str(ROOT / "recipes" / "digits_finetune.yaml"))
    given = given_flags(arguments_umae.FINETUNE, [*command(encoder, "run"), *recipe])
    _, _, augmentation, training = arguments_umae.arguments_of(arguments_umae.FINETUNE, given)
    assert augmentation.horizontal_flip == 0 and training.layer_decay == 0.9
