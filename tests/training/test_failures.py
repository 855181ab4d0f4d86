"""Pre-training on what cannot be: refused in one line before anything is written, or ended with nothing spoiled."""

import json
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from golden_models import fresh_config
from processes import ROOT, run, together
from training_runs import SHORT, folder_with_bad_images

import run_pretrain
import umae
from modeling_umae import UMAEModel
from umae import seeding
from umae.data import inputs
from umae.data.inputs import evaluation_processor
from umae.programs import pretrain
from umae.training import failures, loop, pretraining

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_left_out_named_once_and_counted(tmp_path, capsys, workers):
    settings = folder_with_bad_images(tmp_path / "images", 40, bad=2)
    run_pretrain.main(
        f"{settings} --output_dir {tmp_path / 'run'} --num_train_epochs 3 --per_device_train_batch_size 8 "
        f"--max_unreadable_share 0.05 --dataloader_num_workers {workers} --eval_steps 15".split()
    )
    printed = capsys.readouterr()
    assert printed.out.count("left out: 000.jpg: 0 bytes") == printed.out.count("left out: 003.jpg: ") == 1
    assert "images left out because they cannot be read: 2" in printed.out
    assert set(json.loads((tmp_path / "run" / "run.json").read_text())["unreadable"]) == {"0", "3"}


def test_too_many_unreadable_images_end_the_run_with_their_names(tmp_path):
    settings = folder_with_bad_images(tmp_path / "images", 40, bad=2)
    settings += " --per_device_train_batch_size 8 --max_train_steps 20 --eval_steps 0"
    command = f"{settings} --output_dir {tmp_path / 'run'}".split()
    with pytest.raises(ValueError, match=r"[12] of 40 images cannot be read, more than max_unreadable_share 0\.01"):
        run_pretrain.main(command)


def test_nothing_but_unreadable_images_is_refused_before_anything_is_written(tmp_path):
    settings = folder_with_bad_images(tmp_path / "images", 3, bad=1)
    for file in (tmp_path / "images").iterdir():
        file.write_text("<html>")
    with pytest.raises(ValueError, match=r"none of the 3 images of .* can be read: 000.jpg: .*001.jpg.*002.jpg"):
        run_pretrain.main(f"{settings} --output_dir {tmp_path / 'run'}".split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mask_ration", "0.5"], r"unknown argument --mask_ration; did you mean --mask_ratio\?"),
        (["--mask_ratio", "1.0"], r"mask_ratio must lie in \[0, 1\), got 1.0"),
        (["--patch_size", "3"], "patch_size 3 does not divide image_size 8"),
        (["--config_overrides", "hidden_sise=64"], "did you mean hidden_size"),
        (["--config_overrides", "hidden_act=relux"], "hidden_act 'relux' is not known; use one of .*relu"),
        (["--per_device_train_batch_size", "2000"], "holds 1438 images, fewer than one step of 2000"),
        (["--warmup_epochs", "101"], "longer than the whole run"),
        (["--train_split", "dev"], "digits has no split 'dev'; it has train, test"),
        (["--report_to", "wandbb"], "wandbb: not installed or not known"),
        (["--model_name_or_path", "./nowhere"], "nowhere"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_before_anything_is_written(tmp_path, argv, message):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        run_pretrain.main(["--output_dir", str(folder), *argv])
    assert not folder.exists()


def test_a_refusal_is_one_line_and_a_status(tmp_path):
    result = run("run_pretrain.py", "--output_dir", tmp_path / "run", "--mask_ratio", "1.0", check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "run_pretrain.py: --mask_ratio must lie in [0, 1), got 1.0" in result.stderr


def test_a_folder_that_is_no_run_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        run_pretrain.main(["--output_dir", str(tmp_path), *SHORT])
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("folder", ["/proc/run", "/dev/null/run", "{read_only}/run"])
def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path, folder):
    if "read_only" in folder:
        (tmp_path / "disk").mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path / "disk"]  # root may write where others may not
        if subprocess.run(mount, capture_output=True).returncode != 0:
            pytest.skip("may not mount a file system here")
    folder = folder.format(read_only=tmp_path / "disk")
    try:
        with pytest.raises(ValueError, match=f"cannot write to {folder}: .*; give another output_dir"):
            run_pretrain.main(["--output_dir", folder, *SHORT])
    finally:
        subprocess.run(["umount", tmp_path / "disk"], capture_output=True)


def test_a_file_is_no_output_folder(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ValueError, match="is a file; give a new or empty folder"):
        run_pretrain.main(["--output_dir", str(tmp_path / "run"), *SHORT])


def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_no_weight(tmp_path, monkeypatch):
    """From step 5 on one image holds NaN; the weights of step 4 must stand."""
    steps = iter(range(100))

    def spoil(pixel_values, mean, std, normalize=inputs.normalize):
        values = normalize(pixel_values, mean, std)
        return values if next(steps) < 5 else values.index_fill(0, torch.tensor([3]), float("nan"))

    monkeypatch.setattr(inputs, "normalize", spoil)
    settings = ["--max_train_steps", "12", "--checkpointing_steps", "4", "--logging_steps", "6", "--eval_steps", "0"]
    with pytest.raises(FloatingPointError) as failure:
        run_pretrain.main(["--output_dir", str(tmp_path / "run"), *settings])
    message = str(failure.value)
    assert message.startswith("loss, reconstruction_loss, uniformity_loss, feature_norm was not finite at step 6")
    assert "and 112 more of digits (train); the weights have not changed since" in message  # of 128
    assert [entry.name for entry in (tmp_path / "run").glob("step-*")] == ["step-4"]
    model = umae.UMAEForPreTraining.from_pretrained(tmp_path / "run" / "step-4")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


SPOILED = """
import os, sys, torch, arguments_umae, command_line_umae, run_pretrain, modeling_umae
from umae.training import loop
plain, calls = modeling_umae.UMAEForPreTraining.forward, [0]
def forward(self, *arguments, **named):
    output = plain(self, *arguments, **named)
    calls[0] += 1
    if calls[0] == 6 and os.environ["RANK"] == "1":
        output.reconstruction_loss = output.reconstruction_loss + torch.inf  # loss and gradients stay as they are
    return output
modeling_umae.UMAEForPreTraining.forward = forward
optimizer_step = loop.optimizer_step
def step(accelerator, model, *arguments, **named):
    values = optimizer_step(accelerator, model, *arguments, **named)
    with open(f"weights_{os.environ['RANK']}", "a") as file:
        print(sum(parameter.double().abs().sum().item() for parameter in model.parameters()), file=file)
    return values
loop.optimizer_step = step
with command_line_umae.one_line_refusals("run_pretrain.py", arguments_umae.PRETRAIN):
    run_pretrain.main(sys.argv[1:])
"""


def test_a_loss_that_is_not_finite_on_one_process_ends_all_at_that_step(tmp_path):
    (tmp_path / "spoiled.py").write_text(SPOILED)
    results = together(
        2, tmp_path / "spoiled.py", "--output_dir", tmp_path / "run", "--per_device_train_batch_size", "4",
        "--max_train_steps", "12", "--eval_steps", "0", "--checkpointing_steps", "4", "--logging_steps", "8",
        cwd=tmp_path, check=False,
    )  # fmt: skip
    assert [result.returncode for result in results] == [1, 1]
    weights, others = ((tmp_path / f"weights_{rank}").read_text().split() for rank in (0, 1))
    assert weights == others and len(set(weights[:5])) == 5, "steps 1 to 5 train"
    assert len(weights) == 8 and set(weights[5:]) == {weights[4]}, "the others freeze, on both processes"
    order = seeding.permutation(0, 0, 1438)[5 * 8 + 4 : 6 * 8].tolist()  # the sixth step's part of process 1
    expected = f"reconstruction_loss was not finite at step 6, with the images {', '.join(map(str, order))} of digits"
    assert all(expected in result.stderr for result in results)  # both processes say it, and end
    assert [entry.name for entry in (tmp_path / "run").glob("step-*")] == ["step-4"]


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        ("run_pretrain", "--per_device_train_batch_size 2000", "lower --per_device_train_batch_size"),
        ("run_finetune", "--train_split test --test_split test", "--train_split and --test_split are both test"),
        ("run_linear_probe", "--train_split test --test_split test", "--train_split and --test_split are both test"),
    ],
)
def test_a_program_refuses_with_the_flag_that_would_help(program, words, message, tmp_path, monkeypatch):
    UMAEModel(fresh_config(image_size=8, patch_size=2)).save_pretrained(tmp_path / "model")
    evaluation_processor((8, 8)).save_pretrained(tmp_path / "model")
    model = [] if program == "run_pretrain" else ["--model_name_or_path", str(tmp_path / "model")]
    monkeypatch.setattr(sys, "argv", [program, "--output_dir", str(tmp_path / "run"), *model, *words.split()])
    with pytest.raises(SystemExit, match=f"^{program}.py: .*{message}"):
        runpy.run_path(str(ROOT / f"{program}.py"), run_name="__main__")


CRAMPED = """
import resource, sys, arguments_umae, command_line_umae, run_pretrain
from umae.training import loop
optimizer_step = loop.optimizer_step
def cramped(*arguments, **named):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, -1))
    return optimizer_step(*arguments, **named)
loop.optimizer_step = cramped
with command_line_umae.one_line_refusals("run_pretrain.py", arguments_umae.PRETRAIN):
    run_pretrain.main(sys.argv[1:])
"""


def test_too_little_memory_is_named_with_the_flags_that_help(tmp_path):
    (tmp_path / "cramped.py").write_text(CRAMPED)
    command = ("--output_dir", tmp_path / "run", "--per_device_train_batch_size", "1024", "--max_train_steps", "2")
    result = run(tmp_path / "cramped.py", *command, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "out of memory with --per_device_train_batch_size 1024; lower it" in result.stderr


def test_what_libraries_say_of_too_little_memory_on_a_cpu_is_known_and_other_errors_pass():
    for words, kind in (
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", ValueError),  # torch
        ("could not create a primitive", ValueError),  # oneDNN
        ("mat1 and mat2 shapes cannot be multiplied", RuntimeError),
    ):
        with pytest.raises(kind, match=words[:20]), failures.explained_out_of_memory(8):
            raise RuntimeError(words)


def test_features_of_zeros_are_warned_of(capsys):
    for norm, warned in ((0.0, True), (0.5, False)):
        means = {**dict.fromkeys(pretraining.VALUES, 1.0), "feature_norm": norm}
        pretrain.line_of(SimpleNamespace(print=print), means)
        assert ("the features are zero" in capsys.readouterr().out) == warned


def test_weights_freeze_from_the_first_value_that_is_not_finite(tmp_path, monkeypatch):
    kept = {}

    def observed(accelerator, model, *arguments, optimizer_step=loop.optimizer_step):
        step = len(kept)
        if step == 2:
            model.get_parameter("vit.layernorm.bias").register_hook(lambda grad: grad * float("inf"))
        values = optimizer_step(accelerator, model, *arguments)
        kept[step] = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        return values

    monkeypatch.setattr(loop, "optimizer_step", observed)
    with pytest.raises(FloatingPointError):
        run_pretrain.main(
            [
                "--output_dir",
                str(tmp_path / "run"),
                "--max_train_steps",
                "6",
                "--logging_steps",
                "5",
                "--eval_steps",
                "0",
            ]
        )
    assert not torch.equal(kept[0], kept[1])  # step 0 has learning rate 0
    assert all(torch.equal(kept[1], kept[step]) for step in (2, 3, 4))
