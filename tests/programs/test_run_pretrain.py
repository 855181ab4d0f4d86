"""Pre-training as people start it: what a run says, shows and leaves, from any images and weights."""

import json
import re
import shutil
import time
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from golden_models import SETUP_OF_768, fresh_config, original_file
from PIL import Image
from processes import ROOT, SHARED, run, together
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import SHORT, digits_with_lists, folder_of_parquet, folder_with_bad_images, metrics, small_model
from transformers import AutoImageProcessor

import arguments_umae
import run_pretrain
import umae
from command_line_umae import given_flags
from umae.convert.weights import read_weights
from umae.data.batches import Plan
from umae.data.inputs import device_inputs
from umae.data.streaming import START
from umae.programs import evaluations, pretrain
from umae.sharing import report
from umae.training.folder import USUAL_CROPS, USUAL_INPUTS

pytestmark = pytest.mark.usefixtures("no_figures")


def test_a_run_says_what_it_will_do_and_leaves_a_whole_folder(finished):
    folder, printed = finished
    labels = "labels           10 classes from column 'label': 0, 1, 2, 3, 4, 5, ..."
    for text in ("1,438 from digits (train)", labels, "batch  128", "weight 0.01, mean over the cls features of 128"):
        assert text in printed
    assert {entry.name for entry in folder.iterdir()} == {
        "README.md", "attention.png", "config.json", "configuration_umae.py", "curve.png",
        "image_processing_umae.py", "metrics.jsonl", "model.safetensors", "modeling_umae.py", "neighbours.png",
        "notebook.ipynb", "preprocessor_config.json", "progress.png", "reconstructions", "reconstructions.png",
        "run.json", "run.lock", "spectrum.json", "spectrum.png", "step-8", "step-12",
    }  # fmt: skip
    assert [line["step"] for line in metrics(folder)] == [3, 6, 9, 12]
    for line in metrics(folder):
        assert 1 <= line["participation_ratio"] <= 64
        assert line["loss"] == pytest.approx(line["reconstruction_loss"] + 0.01 * line["uniformity_loss"], rel=1e-5)
    width, height = Image.open(folder / "reconstructions.png").size
    assert width > 400 and height > 200
    for name in ("attention.png", "curve.png", "neighbours.png", "progress.png", "spectrum.png"):
        with Image.open(folder / name) as image:
            assert image.width > 400 and len(set(image.convert("L").tobytes())) > 20, "something is drawn"
    card = (folder / "README.md").read_text()
    for name in ("attention", "curve", "neighbours", "progress", "reconstructions", "spectrum"):
        assert f"({name}.png)" in card
    assert "| Steps | 12, each of 128 images, seed 0 |" in card
    assert "1,438 images" in card and str(folder.parent) not in card


def test_a_run_with_the_coding_rate_says_and_logs_it(finished, tmp_path):
    folder, flags = tmp_path / "run", ("--regularizer", "coding_rate", "--uniformity_weight", "0.5", *SHORT)
    printed = run("run_pretrain.py", "--output_dir", folder, *flags).stdout
    assert re.search(r"coding rate +weight 0.5, of the cls features of 128 images\n", printed)
    assert re.search(r"coding rate loss -\d\.\d{4}, uniformity 0\.\d{4} \(features fill", printed)
    assert "gradient of the terms" in printed
    config = json.loads((folder / "config.json").read_text())
    assert (config["regularizer"], config["uniformity_weight"]) == ("coding_rate", 0.5)
    lines = metrics(folder)
    for line, other in zip(lines, metrics(finished[0]), strict=True):
        assert line["loss"] == pytest.approx(line["reconstruction_loss"] + 0.5 * line["coding_rate_loss"], rel=1e-5)
        assert line["participation_ratio"] == pytest.approx(1 / line["uniformity_loss"])
        here_only, there_only = line.keys() - other.keys(), other.keys() - line.keys()
        assert "grad_norm_uniformity" not in line and there_only <= {"grad_norm_uniformity"}
        assert here_only == {"coding_rate_loss", *(["grad_norm_coding_rate"] if there_only else [])}
    card = (folder / "README.md").read_text()
    assert "| Coding rate weight | 0.5 on the cls feature |" in card and "tan2024information" in card
    assert f"| Coding rate loss | {lines[-1]['coding_rate_loss']:.4f} |" in card and "uniformity term" not in card

    text = report.report([folder, finished[0]])
    rows = re.findall(r'class="differs"><th>(\w+)</th>', text)
    assert sorted(rows) == ["regularizer", "uniformity_weight"]
    last = lines[-1]["coding_rate_loss"]
    assert re.search(rf"<th>coding rate loss</th>\s*<td>{last:.4f}</td>\s*<td></td>", text)


@pytest.mark.slow  # in the fast suite runs with the uniformity term are resumed; the regularizer has no state
def test_a_run_with_the_coding_rate_resumes_to_the_same_bits(tmp_path):
    folder, flags = tmp_path / "run", ("--regularizer", "coding_rate", "--uniformity_weight", "0.5", *SHORT)
    run("run_pretrain.py", "--output_dir", folder, *flags)
    mine = tmp_path / "interrupted"
    shutil.copytree(folder, mine)
    record = json.loads((mine / "run.json").read_text())
    (mine / "run.json").write_text(json.dumps({**record, "finished": False}))
    shutil.rmtree(mine / "step-12")
    (mine / "model.safetensors").unlink()
    assert f"continuing from {mine}/step-8" in run("run_pretrain.py", "--output_dir", mine, *flags).stdout
    assert (mine / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert metrics(mine) == metrics(folder)


LOOKED = [
    f"{name}_{pooling}"
    for name in ("effective_rank", "participation_ratio", "uniformity", "alignment", "dead_dimensions")
    for pooling in ("cls", "mean")
] + ["online_top1", "online_knn_top1", "grad_norm_reconstruction", "grad_norm_uniformity"]


def test_what_is_learned_is_looked_at_at_the_first_line_of_every_so_many_steps_and_the_last(finished):
    folder, printed = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "effective_rank_cls" in line] == [6, 9, 12]
    for line in lines:
        assert all((name in line) == (line["step"] > 3) for name in LOOKED)
        assert 0.1 < line["memory_gb"] < 10 and line["diagnostics_seconds"] > 0
    assert "evaluated on     digits (test), every 4 steps" in printed
    assert len(re.findall(r"^step \d+: effective rank .* nearest neighbours \d+.\d%, gradient of", printed, re.M)) == 3
    assert re.search(r"\d% on diagnostics", printed)
    assert sorted(tile.name for tile in (folder / "reconstructions").iterdir())[0] == "step-00000006.png"


def test_ranks_are_compared_with_those_of_an_untrained_encoder_once(finished):
    folder, printed = finished
    ranks = json.loads((folder / "run.json").read_text())["untrained_ranks"]
    text = (
        f"effective rank {ranks['cls']:.1f} (cls) and {ranks['mean']:.1f} (mean), features that have collapsed have 1"
    )
    assert printed.count("an untrained encoder has") == printed.count(text) == 1
    assert 1 < ranks["mean"] < 64 and "warning" not in printed


def test_features_that_collapse_are_named_once_in_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluations, "COLLAPSE", 100)  # of an untrained encoder's rank: no features pass
    flags = ["--output_dir", str(tmp_path / "run"), "--max_train_steps", "4", "--checkpointing_steps", "2"]
    flags += ["--logging_steps", "2", "--eval_steps", "2"]
    monkeypatch.setattr(pretrain, "finish", lambda *rest: None)
    run_pretrain.main(flags)
    printed = capsys.readouterr().out
    assert printed.count("warning: the cls features collapse") == 1
    assert (
        printed.index("step 2: ") < printed.index("collapse: their") and "uniformity_weight, which is 0.01" in printed
    )
    assert json.loads((tmp_path / "run" / "run.json").read_text())["collapsed_at"] == 2, "after a quarter of 4 steps"
    shutil.rmtree(tmp_path / "run" / "step-4")
    run_pretrain.main(flags)
    assert "warning" not in capsys.readouterr().out


def test_a_plan_says_what_the_run_needs_and_leaves_nothing(tmp_path, capsys):
    run_pretrain.main(["--output_dir", str(tmp_path / "run"), *SHORT, "--plan", "--heldout", "3%"])
    printed = capsys.readouterr().out
    held_out = ("1,395 from digits (train) without 3%", "evaluated on     3% of digits (train)")
    for text in (*held_out, "memory           about", "a checkpoint, 2 kept; ", "for all steps, at", "12 (1.2 epochs)"):
        assert text in printed
    assert list(tmp_path.iterdir()) == []


def test_looking_leaves_the_weights_as_they_are(finished, tmp_path):
    folder, _ = finished
    never = run("run_pretrain.py", "--output_dir", tmp_path / "run", *SHORT[:-1], "0")
    assert "evaluated on" not in never.stdout and not (tmp_path / "run" / "reconstructions").exists()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    lines = metrics(tmp_path / "run")
    assert lines == [{name: value for name, value in line.items() if name in lines[0]} for line in metrics(folder)]


def test_a_test_split_that_cannot_be_read_is_not_looked_at(tmp_path):
    (tmp_path / "images").mkdir()
    settings = folder_with_bad_images(tmp_path / "images" / "train", 16, bad=0).replace("/train", "")
    (tmp_path / "images" / "test").mkdir()
    for i in range(4):
        (tmp_path / "images" / "test" / f"{i}.jpg").write_bytes(b"<html>")
    command = f"{settings} --output_dir {tmp_path / 'run'} --per_device_train_batch_size 8 --max_train_steps 2".split()
    printed = run("run_pretrain.py", *command).stdout
    assert "held-out images cannot be loaded, so the training images are evaluated: none of the 4" in printed
    assert "evaluated on     folder images (train)" in printed and "effective rank" in printed


def test_a_test_split_without_labels_gives_way_to_the_labelled_one_so_that_both_accuracies_are_kept(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    name = folder_of_parquet(tmp_path / "images", train=[0, 1] * 8, validation=[0, 1] * 3, test=[-1] * 5)
    command = f"{small_model(name)} --output_dir {tmp_path / 'run'} --max_train_steps 1"
    run_pretrain.main([*command.split(), "--per_device_train_batch_size", "8"])
    printed = capsys.readouterr().out
    assert "images (test) comes without labels" in printed and "images (validation) is used instead" in printed
    assert "evaluated on     images (validation)" in printed
    assert {"online_top1", "online_knn_top1"} <= metrics(tmp_path / "run")[-1].keys()


LABELS = "2 classes from column 'label': a, b"


@pytest.mark.parametrize(
    ("test_labels", "flags", "announced"),
    [
        ([0, 1], ("--label_column_name", "none"), "none"),
        (
            [-1, -1],
            (),
            "2 classes from column 'label': a, b; without online accuracies: images (test) has no such labels",
        ),
    ],
    ids=["said to be none", "not of the images to evaluate"],
)
def test_without_labels_there_are_no_online_accuracies_and_that_is_said(
    tmp_path, capsys, test_labels, flags, announced
):
    (tmp_path / "images").mkdir()
    name = folder_of_parquet(tmp_path / "images", train=[0, 1] * 4, test=test_labels)
    command = f"{small_model(name)} --output_dir {tmp_path / 'run'} --max_train_steps 1"
    run_pretrain.main([*command.split(), "--per_device_train_batch_size", "8", *flags])
    assert f"  labels           {announced}\n" in capsys.readouterr().out
    (line,) = metrics(tmp_path / "run")
    assert "effective_rank_cls" in line and "online_top1" not in line and "online_knn_top1" not in line


def test_lists_of_classes_are_left_aside_and_that_is_said(tmp_path, capsys, no_figures):
    name = digits_with_lists(tmp_path / "lists")
    command = f"{small_model(name)} --output_dir {tmp_path / 'run'} --max_train_steps 1"
    run_pretrain.main([*command.split(), "--per_device_train_batch_size", "8"])
    said = "lists of string values from column 'labels'; without online accuracies: they need one class\n"
    assert said in capsys.readouterr().out
    assert "online_top1" not in metrics(tmp_path / "run")[-1]


def test_evaluations_are_spaced_by_the_time_that_they_take_and_a_resumed_run_keeps_to_it(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    name = folder_of_parquet(tmp_path / "images", train=[0, 1] * 4, test=[0, 1])
    flags = [*small_model(name).split(), "--output_dir", str(tmp_path / "run"), "--per_device_train_batch_size", "8"]
    flags += ["--max_train_steps", "20", "--checkpointing_steps", "10"]
    evaluate = pretrain.evaluate_features
    monkeypatch.setattr(pretrain, "evaluate_features", lambda *arguments: time.sleep(0.2) or evaluate(*arguments))
    monkeypatch.setattr(evaluations, "EVALUATIONS", 1)
    monkeypatch.setattr(evaluations, "estimated_steps", lambda *_, **__: 2)
    for resumed in (False, True):
        if resumed:
            record = json.loads((tmp_path / "run" / "run.json").read_text())
            assert record["eval_steps"] > 20, "one takes more than 0.2 steps"
            (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "finished": False}))
            shutil.rmtree(tmp_path / "run" / "step-20")
        run_pretrain.main(flags)
        evaluated = [line["step"] for line in metrics(tmp_path / "run") if "effective_rank_cls" in line]
        assert evaluated == [2, 4, 6, 20], "known after two lines"


def test_the_code_on_the_card_runs_as_it_stands(finished, tmp_path):
    code = re.search(r"```python\n(.*?)```", (finished[0] / "README.md").read_text(), re.DOTALL)[1]
    shutil.copytree(finished[0], tmp_path / "run")
    Image.new("L", (20, 10), 200).save(tmp_path / "run" / "image.jpg")
    run("-c", code + "assert features.shape == (1, 64)", cwd=tmp_path / "run", PYTHONPATH="")


def test_the_processor_in_the_folder_gives_the_model_its_images(finished):
    processor = AutoImageProcessor.from_pretrained(finished[0])
    image = Image.new("L", (20, 10), 255)
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert pixel_values.shape == (1, 3, 8, 8)
    assert torch.allclose(pixel_values[0, :, 0, 0], white, atol=1e-5)
    assert umae.UMAEModel.from_pretrained(finished[0])(pixel_values).pooler_output.shape == (1, 64)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("what", ["layers", "model"])
def test_compiled_and_checkpointed_layers_train_the_same(finished, tmp_path, processes, what):
    folder, _ = finished
    flags = (*SHORT, "--torch_compile", what, "--per_device_train_batch_size", 128 // processes)
    together(processes, "run_pretrain.py", "--output_dir", tmp_path / "run", *flags, "--gradient_checkpointing")
    for mine, expected in zip(metrics(tmp_path / "run"), metrics(folder), strict=True):
        for name in ("reconstruction_loss", "uniformity_loss", "grad_norm"):
            assert mine[name] == pytest.approx(expected[name], rel=1e-4), name
    assert umae.UMAEForPreTraining.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize("really", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_accelerate_launches_the_command(tmp_path, really):
    """With its precision, where neither a flag nor the recipe says another."""
    lines = (ROOT / "recipes" / "digits.yaml").read_text().splitlines()
    (tmp_path / "recipe.yaml").write_text("\n".join(line for line in lines if not line.startswith("mixed_precision")))
    launcher = ("--num_processes", "1", "--cpu", "--mixed_precision", "bf16", "-m", "umae", "pretrain")
    flags = ("--output_dir", tmp_path / "run", "--max_train_steps", "1", "--eval_steps", "0")
    flags += ("--recipe", tmp_path / "recipe.yaml", "--per_device_train_batch_size", "4")
    if really:
        result = run("-m", "accelerate.commands.launch", *launcher, *flags, fresh=True)
    else:  # what the launcher would start, in a process that is forked
        args, _, _ = _validate_launch_command(launch_command_parser().parse_args([*map(str, (*launcher, *flags))]))
        (_, *command), told = prepare_simple_launcher_cmd_env(args)
        result = run(*command, **{name: value for name, value in told.items() if name.startswith("ACCELERATE_")})
    assert "bf16 on 1 x CPU" in result.stdout
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_real_images_in_a_folder_train_and_report_to_a_tracker(tmp_path):
    source = SHARED / "data" / "imagenet_sample"
    if not source.is_dir():
        pytest.skip("needs the ImageNet sample beside the project")
    (tmp_path / "images").mkdir()
    for file in sorted(source.glob("*.JPEG"))[:12]:
        shutil.copy(file, tmp_path / "images")
    sizes = (
        "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,decoder_hidden_size=16,decoder_num_hidden_layers=1"
    )
    run_pretrain.main(
        f"--dataset_name {tmp_path / 'images'} --output_dir {tmp_path / 'run'} --config_overrides {sizes} "
        "--image_size 64 --patch_size 16 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 "
        "--num_train_epochs 2 --pooling mean --report_to tensorboard --logging_steps 1".split()
    )
    assert [line["epoch"] for line in metrics(tmp_path / "run")] == [1.0, 2.0]
    files = (tmp_path / "run" / "logs").rglob("events.out.tfevents.*")
    tags = [EventAccumulator(str(file)).Reload().Tags() for file in files]
    assert ["reconstructions"] in [found["images"] for found in tags]
    tracked = {name for found in tags for name in found["scalars"]}
    assert {"loss", "effective_rank_cls"} <= tracked and "online_top1" not in tracked, "there are no labels"
    assert "folder images (train)" in (tmp_path / "run" / "README.md").read_text()


def test_a_run_from_before_a_setting_continues_with_what_it_was(finished, tmp_path, capsys):
    record = json.loads((finished[0] / "run.json").read_text())
    for name in USUAL_CROPS | USUAL_INPUTS:
        del record["identity"][name]
    del record["identity"]["config"]["regularizer"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    then = ["--output_dir", str(tmp_path), *SHORT, "--horizontal_flip", "0.5"]  # for all images, also the digits
    run_pretrain.main(then)
    assert "finished; nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"holds a run with vertical_flip 0\.0, not 0\.5"):
        run_pretrain.main([*then, "--vertical_flip", "0.5"])


@pytest.mark.parametrize("streaming", [False, True])
def test_crops_and_flips_are_those_of_the_flags(tmp_path, streaming):
    pixels = np.arange(8 * 4 * 4 * 3, dtype=np.uint8).reshape(8, 4, 4, 3)
    images = [Image.fromarray(image) for image in pixels]
    features = datasets.Features({"image": datasets.Image()})
    (tmp_path / "images").mkdir()
    datasets.Dataset.from_dict({"image": images}, features).to_parquet(tmp_path / "images" / "train.parquet")
    words = f"--dataset_name {tmp_path / 'images'} --min_crop_scale 1 --horizontal_flip 0 --vertical_flip 1"
    data_args, _, args = arguments_umae.pretraining_arguments(given_flags(arguments_umae.PRETRAIN, words.split()))
    data_args.streaming, accelerator = streaming, Accelerator(cpu=True)
    job = SimpleNamespace(
        accelerator=accelerator, images=pretrain.load_data(accelerator, data_args, "train"), workers=0, args=args,
        config=fresh_config(image_size=4, patch_size=2), plan=Plan(8, 8, 1, 1, seed=0),
    )  # fmt: skip
    (batch,) = pretrain.make_loader(job, range(1), [START])
    assert batch["flip"].tolist() == [[False, True]] * 8
    inputs = device_inputs(batch, torch.device("cpu"), 4, 0, (0.0,) * 3, (1 / 255,) * 3)[0]
    upside_down = torch.from_numpy(pixels[batch["index"]]).permute(0, 3, 1, 2).flip(-2)
    assert (inputs - upside_down).abs().max() < 0.01, "and not cropped: no other box has the whole area"


def test_training_starts_from_given_weights(finished, tmp_path):
    folder, _ = finished
    run_pretrain.main(
        f"--output_dir {tmp_path / 'run'} --model_name_or_path {folder} --uniformity_weight 0.5 --max_train_steps 1 "
        "--base_learning_rate 0 --eval_steps 0".split()
    )
    before, after = (umae.UMAEForPreTraining.from_pretrained(one) for one in (folder, tmp_path / "run"))
    assert after.config.uniformity_weight == 0.5
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


@pytest.mark.parametrize(
    ("trained_with", "said", "expected"), [(0.0, None, 0.01), (0.3, None, 0.3), (0.0, 0.0, 0.0), (0.3, 0.1, 0.1)]
)
def test_the_uniformity_weight_is_what_was_said_or_that_of_the_weights_or_else_the_default(
    tmp_path, trained_with, said, expected
):
    umae.UMAEForPreTraining(fresh_config(uniformity_weight=trained_with)).save_pretrained(tmp_path)
    args = arguments_umae.PretrainModelArguments(model_name_or_path=str(tmp_path), uniformity_weight=said)
    assert pretrain.make_model(Accelerator(cpu=True), args).config.uniformity_weight == expected


def test_training_goes_on_at_another_resolution_with_all_other_sizes_those_of_the_weights(tmp_path, capsys):
    """On the digits, whose recipe has sizes of its own: 8 x 8 pixels in patches of 2, 4 heads."""
    weights, folder = tmp_path / "weights", tmp_path / "run"
    before = umae.UMAEForPreTraining(fresh_config(num_attention_heads=2))
    before.save_pretrained(weights)
    command = f"--model_name_or_path {weights} --max_train_steps 1 --base_learning_rate 0 --eval_steps 0"
    run_pretrain.main([*command.split(), "--output_dir", str(tmp_path / "same")])
    printed = capsys.readouterr().out
    assert "16 x 16 pixels, 16 patches" in printed and "interpolated" not in printed
    run_pretrain.main([*command.split(), "--output_dir", str(folder), "--image_size", "32"])
    printed = capsys.readouterr().out
    assert "32 x 32 pixels, 64 patches" in printed
    assert "position table is interpolated from 4 x 4 to 8 x 8 patches, the decoder's made anew" in printed
    after = umae.UMAEForPreTraining.from_pretrained(folder)
    assert (after.config.grid, after.config.patch_size, after.config.num_attention_heads) == ((8, 8), 4, 2)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert AutoImageProcessor.from_pretrained(folder).crop_size == {"height": 32, "width": 32}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"patch_size": 8}, "patch_size 8 is not that of the weights, 4; leave it out"),
        ({"patch_size": 8, "image_size": 32}, "patch_size 8 is not that of the weights, 4; leave it out"),
        ({"image_size": 30}, r"patch_size 4 does not divide image_size 30 \(height\); use image_size 28"),
    ],
    ids=str,
)
def test_sizes_that_weights_cannot_have_are_refused(tmp_path, sizes, message):
    umae.UMAEForPreTraining(fresh_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        pretrain.make_model(
            Accelerator(cpu=True), arguments_umae.PretrainModelArguments(model_name_or_path=str(tmp_path), **sizes)
        )


def test_a_share_that_hides_all_but_one_patch_of_the_larger_images_is_accepted(tmp_path):
    umae.UMAEForPreTraining(fresh_config()).save_pretrained(tmp_path)  # 16 patches, of which it would leave none
    args = arguments_umae.PretrainModelArguments(model_name_or_path=str(tmp_path), image_size=32, mask_ratio=0.98)
    assert pretrain.make_model(Accelerator(cpu=True), args).config.num_hidden_patches == 63


def test_training_starts_from_a_file_of_the_original_code(tmp_path, capsys):
    source = original_file(tmp_path / "mae.pth", SETUP_OF_768)
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (9, 9), (i, 99, 9)).save(tmp_path / "images" / f"{i}.png")
    run_pretrain.main(
        f"--output_dir {tmp_path / 'run'} --model_name_or_path {source} --max_train_steps 1 --base_learning_rate 0 "
        f"--dataset_name {tmp_path / 'images'} "
        "--per_device_train_batch_size 4".split()
    )
    assert f"from {source}" in capsys.readouterr().out
    tensors, _ = read_weights(source)
    after = umae.UMAEForPreTraining.from_pretrained(tmp_path / "run")
    assert torch.equal(after.vit.embeddings.cls_token, tensors["cls_token"])
    assert (after.config.uniformity_weight, after.config.mask_ratio) == (0.01, 0.6), "from the settings in the file"


def test_a_finished_run_is_made_longer_by_a_new_curve_and_continues_to_the_same_bits(finished, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    longer = [*SHORT[:-1], "0", "--extend_to", "20"]
    shutil.copytree(finished[0], whole)
    run_pretrain.main(["--output_dir", str(whole), *longer])
    shutil.copytree(whole, cut)
    assert "20, 12 of them done: the rest is a new warm-up of 1 steps and a new cosine" in capsys.readouterr().out
    lines = metrics(whole)
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 18, 20]
    rates = {line["step"]: line["learning_rate"] for line in lines}
    assert rates[12] < 0.1 * rates[15], "a new curve"
    record = json.loads((cut / "run.json").read_text())
    assert record["finished"] and record["identity"]["extended_at"] == 12
    shutil.rmtree(cut / "step-20")
    (cut / "model.safetensors").unlink()
    (cut / "run.json").write_text(json.dumps(record | {"finished": False}))
    run_pretrain.main(["--output_dir", str(cut), *longer])
    assert f"continuing from {cut}/step-16" in capsys.readouterr().out
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (cut / "model.safetensors").read_bytes() != (finished[0] / "model.safetensors").read_bytes()
    run_pretrain.main(["--output_dir", str(cut), *longer])
    assert "finished; nothing to do" in capsys.readouterr().out


def test_what_cannot_be_made_longer_is_refused(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    for folder, steps, message in (
        ("none", "20", "extend_to: .*none holds no run; leave it out to start one"),
        ("run", "12", "has 12 steps, not fewer than 12"),
        ("run", "5", "has 12 steps, not fewer than 5"),
    ):
        with pytest.raises(ValueError, match=message):
            run_pretrain.main(["--output_dir", str(tmp_path / folder), *SHORT, "--extend_to", steps])
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"finished": False}))
    with pytest.raises(ValueError, match="is not finished; finish it first, by the same command alone"):
        run_pretrain.main(["--output_dir", str(tmp_path / "run"), *SHORT, "--extend_to", "20"])


def test_training_images_that_are_evaluated_do_not_find_themselves_among_their_neighbours(tmp_path, monkeypatch):
    """A folder without a test split, however it is read; with one, or with a share held out, there is no such index."""
    made, make_monitor = [], pretrain.make_monitor
    monkeypatch.setattr(pretrain, "make_monitor", lambda job: made.append(make_monitor(job)) or made[-1])
    monkeypatch.setattr(pretrain, "finish", lambda *rest: None)
    for name in ("alone", "split"):
        (tmp_path / name).mkdir()
    alone = folder_of_parquet(tmp_path / "alone", train=[0, 1] * 4)
    split = folder_of_parquet(tmp_path / "split", train=[0, 1] * 4, test=[0, 1])
    for number, (name, flags) in enumerate(((alone, ()), (alone, ("--heldout", "25%")), (split, ()))):
        words = [*small_model(name).split(), "--output_dir", str(tmp_path / str(number)), *flags, "--num_channels", "1"]
        run_pretrain.main([*words, "--per_device_train_batch_size", "4", "--max_train_steps", "1"])
    indices = [monitor.probe_images.trained_on for monitor in made]
    assert sorted(indices[0].tolist()) == list(range(8)) and indices[1:] == [None, None]
