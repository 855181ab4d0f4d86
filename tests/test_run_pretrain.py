"""Pre-training as people start it: other processes, real pictures, a real kill."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import golden_inputs
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from golden_models import original_file
from PIL import Image
from processes import ROOT, SHARED, TIMEOUT, environment, run, torchrun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoImageProcessor

import run_pretrain
import umae
from umae import launch, seeding, training
from umae.checkpoints import newest_whole
from umae.convert import read_weights
from umae.progress import Progress
from umae.runs import SPEED

# The width of ViT-B, whose heads are known, and little else
SETUP_OF_768 = dataclasses.replace(
    golden_inputs.SETUPS["golden"], hidden_size=768, num_hidden_layers=1, num_attention_heads=12, image_size=8,
    patch_size=2, mlp_ratio=1, decoder_hidden_size=64, decoder_num_attention_heads=16,
)  # fmt: skip
SHORT = ("--max_train_steps", "12", "--checkpointing_steps", "4", "--logging_steps", "3", "--eval_steps", "4")


def metrics(folder) -> list[dict]:
    """The lines of `metrics.jsonl` without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in SPEED} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run on the digits, undisturbed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    result = run("run_pretrain.py", "--output_dir", folder, *SHORT)
    return folder, result.stdout


def test_a_run_says_what_it_will_do_and_leaves_a_whole_folder(finished):
    folder, printed = finished
    for text in ("1,438 from digits (train)", "effective batch  128", "weight 0.01, mean over the cls features of 128"):
        assert text in printed
    assert {entry.name for entry in folder.iterdir()} == {
        "README.md", "attention.png", "config.json", "configuration_umae.py", "curve.png", "metrics.jsonl",
        "model.safetensors", "modeling_umae.py", "neighbours.png", "preprocessor_config.json", "progress.png",
        "reconstructions", "reconstructions.png", "run.json", "spectrum.json", "spectrum.png", "step-8", "step-12",
    }  # fmt: skip
    assert [line["step"] for line in metrics(folder)] == [3, 6, 9, 12]
    for line in metrics(folder):
        assert line["participation_ratio"] == pytest.approx(1 / line["uniformity_loss"])
        assert line["loss"] == pytest.approx(line["reconstruction_loss"] + 0.01 * line["uniformity_loss"], rel=1e-5)
    width, height = Image.open(folder / "reconstructions.png").size
    assert width > 400 and height > 200
    for name in ("attention.png", "curve.png", "neighbours.png", "progress.png", "spectrum.png"):
        with Image.open(folder / name) as picture:
            assert picture.width > 400 and len(set(picture.convert("L").tobytes())) > 20, "something is drawn"
    card = (folder / "README.md").read_text()
    for name in ("attention", "curve", "neighbours", "progress", "reconstructions", "spectrum"):
        assert f"({name}.png)" in card
    assert "| Steps | 12, each of 128 pictures, seed 0 |" in card
    assert "1,438 pictures" in card and str(folder.parent) not in card


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
    assert "looked at        digits (test), every 4 steps" in printed
    assert len(re.findall(r"^step \d+: effective rank .* nearest neighbours \d+.\d%, gradient of", printed, re.M)) == 3
    assert re.search(r"\d% on diagnostics", printed)
    assert sorted(tile.name for tile in (folder / "reconstructions").iterdir())[0] == "step-00000006.png"


def test_looking_leaves_the_weights_as_they_are(finished, tmp_path):
    folder, _ = finished
    never = run("run_pretrain.py", "--output_dir", tmp_path / "run", *SHORT[:-1], "0")
    assert "looked at" not in never.stdout and not (tmp_path / "run" / "reconstructions").exists()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    lines = metrics(tmp_path / "run")
    assert lines == [{name: value for name, value in line.items() if name in lines[0]} for line in metrics(folder)]


def test_a_test_split_that_cannot_be_read_is_not_looked_at(tmp_path):
    (tmp_path / "pictures").mkdir()
    settings = folder_with_bad_pictures(tmp_path / "pictures" / "train", 16, bad=0).replace("/train", "")
    (tmp_path / "pictures" / "test").mkdir()
    for i in range(4):
        (tmp_path / "pictures" / "test" / f"{i}.jpg").write_bytes(b"<html>")
    command = f"{settings} --output_dir {tmp_path / 'run'} --per_device_train_batch_size 8 --max_train_steps 2".split()
    printed = run("run_pretrain.py", *command).stdout
    assert "held-out pictures cannot be loaded, so those of training are looked at: none of the 4" in printed
    assert "looked at        folder pictures (train)" in printed and "effective rank" in printed


def test_two_processes_see_in_the_features_what_one_sees(finished, tmp_path):
    folder, _ = finished
    torchrun(2, "run_pretrain.py", "--output_dir", tmp_path / "run", *SHORT, "--per_device_train_batch_size", 64)
    for mine, expected in zip(metrics(tmp_path / "run"), metrics(folder), strict=True):
        assert mine.keys() == expected.keys()
        for name in expected:
            accuracy = name.startswith("online")  # in which one picture more or less counts 1 / 359
            assert mine[name] == pytest.approx(expected[name], rel=1e-3, abs=0.01 if accuracy else 1e-9), name


def test_the_code_on_the_card_runs_as_it_stands(finished, tmp_path):
    code = re.search(r"```python\n(.*?)```", (finished[0] / "README.md").read_text(), re.DOTALL)[1]
    shutil.copytree(finished[0], tmp_path / "run")
    Image.new("L", (20, 10), 200).save(tmp_path / "run" / "picture.jpg")
    run("-c", code + "assert features.shape == (1, 64)", cwd=tmp_path / "run", PYTHONPATH="")


def test_the_processor_in_the_folder_gives_the_model_its_pictures(finished):
    processor = AutoImageProcessor.from_pretrained(finished[0])
    picture = Image.new("L", (20, 10), 255)
    pixel_values = processor(picture, return_tensors="pt")["pixel_values"]
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert pixel_values.shape == (1, 3, 8, 8)
    assert torch.allclose(pixel_values[0, :, 0, 0], white, atol=1e-5)
    assert umae.UMAEModel.from_pretrained(finished[0])(pixel_values).pooler_output.shape == (1, 64)


def test_a_finished_run_changes_nothing_when_started_again(finished, capsys):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run_pretrain.main(["--output_dir", str(folder), *SHORT])
    assert "finished; nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_bits(finished, tmp_path, workers):
    folder, _ = finished
    mine = tmp_path / "run"
    command = ("run_pretrain.py", "--output_dir", str(mine), *SHORT, "--dataloader_num_workers", workers)
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (mine / "step-4").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (mine / "model.safetensors").exists()
    resumed = run(*command)
    assert "continuing from" in resumed.stdout
    assert (mine / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert metrics(mine) == metrics(folder)


KILLED = """
import os, signal, sys, run_pretrain
from umae import checkpoints
moment = sys.argv.pop(1)
module, name = (checkpoints.os, "rename") if moment == "rename" else (checkpoints, moment)
plain = getattr(module, name)
def killed(path, *arguments):
    if "step-8" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(path, *arguments)
setattr(module, name, killed)
if __name__ == "__main__":
    run_pretrain.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("moment", "workers", "left"),
    [
        ("write_training_state", "0", {"step-4", "step-8.tmp"}),  # the weights are written, the optimiser is not
        pytest.param("_fsync", "0", {"step-4", "step-8.tmp"}, marks=pytest.mark.slow),
        ("rename", "2", {"step-4", "step-8.tmp"}),
    ],
)
def test_a_run_that_is_killed_while_it_saves_ends_with_the_same_bits(finished, tmp_path, moment, workers, left):
    folder, _ = finished
    mine = tmp_path / "run"
    (tmp_path / "killed.py").write_text(KILLED)
    flags = ("--output_dir", mine, *SHORT, "--dataloader_num_workers", workers)
    process = subprocess.Popen(
        [sys.executable, *map(str, (tmp_path / "killed.py", moment, *flags))], cwd=ROOT, env=environment(),
        start_new_session=True,
    )  # fmt: skip
    assert process.wait(TIMEOUT) == -signal.SIGKILL
    assert {entry.name for entry in mine.glob("step-*")} == left
    for _ in range(300):  # the loader's workers end, too
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("workers are left over")
    run("run_pretrain.py", *flags)
    assert (mine / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert metrics(mine) == metrics(folder)
    assert {entry.name for entry in mine.glob("step-*")} == {"step-8", "step-12"}


def started(folder, *flags) -> subprocess.Popen:
    """A run in a process of its own, once it has a checkpoint and more steps to do."""
    process = subprocess.Popen(
        [sys.executable, "run_pretrain.py", "--output_dir", str(folder), *flags], cwd=ROOT, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(folder.glob("step-?")) and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


LONG = ("--max_train_steps", "3000", "--checkpointing_steps", "4", "--logging_steps", "3")


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, "0"), (signal.SIGINT, "2")])
def test_a_signal_ends_the_run_after_its_step_and_the_next_start_goes_on(tmp_path, number, workers):
    process = started(tmp_path / "run", *LONG, "--dataloader_num_workers", workers)
    group = process.pid
    os.killpg(group, number)  # as a terminal does: the workers get it too
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    (step,) = re.findall(r"stopped by a signal after step (\d+); the same command goes on", printed)
    assert "Traceback" not in printed
    assert not (tmp_path / "run" / "run.lock").exists()
    with pytest.raises(ProcessLookupError):  # nobody is left
        os.killpg(group, 0)
    process = started(tmp_path / "run", *LONG)
    assert any(f"continuing from {tmp_path / 'run'}/step-{step}\n" == line for line in process.stdout)
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_a_signal_to_the_launcher_ends_two_processes_after_the_same_step(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    process = subprocess.Popen(
        [sys.executable, *launcher, "run_pretrain.py", "--output_dir", str(tmp_path / "run"), *LONG], cwd=ROOT,
        env=environment(ACCELERATE_USE_CPU="1"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/step-?")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=40)
    (step,) = re.findall(r"stopped by a signal after step (\d+); the same command goes on", printed)
    assert process.returncode != 0 and (tmp_path / "run" / f"step-{step}" / "checksums.json").exists()
    assert not (tmp_path / "run" / "run.lock").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_stopped_run_ends_with_the_same_bits(finished, tmp_path, monkeypatch):
    folder, _ = finished
    steps = iter(range(100))

    def interrupted(*arguments, train_step=run_pretrain.train_step, **named):
        if next(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*arguments, **named)

    monkeypatch.setattr(run_pretrain, "train_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        run_pretrain.main(["--output_dir", str(tmp_path / "run"), *SHORT])
    assert stop.value.code == 143 and not (tmp_path / "run" / "model.safetensors").exists()
    run("run_pretrain.py", "--output_dir", tmp_path / "run", *SHORT)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert metrics(tmp_path / "run") == metrics(folder)


def test_a_second_run_on_the_same_folder_is_refused(tmp_path):
    process = started(tmp_path / "run", *LONG)
    try:
        second = run("run_pretrain.py", "--output_dir", tmp_path / "run", *LONG, check=False)
        assert second.returncode == 1
        assert f"is being trained by process {process.pid}; wait for it" in second.stderr
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(finished, tmp_path, capsys):
    folder, _ = finished
    mine = tmp_path / "run"
    shutil.copytree(folder, mine)
    record = json.loads((mine / "run.json").read_text())
    (mine / "run.json").write_text(json.dumps({**record, "finished": False}))
    (mine / "step-13.tmp").mkdir()  # left by a run that was killed while it wrote
    weights = mine / "step-12" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # one bit
    weights.write_bytes(data)
    run_pretrain.main(["--output_dir", str(mine), *SHORT])
    printed = capsys.readouterr().out
    assert f"{mine}/step-12 is damaged" in printed and f"continuing from {mine}/step-8" in printed
    assert (mine / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert metrics(mine) == metrics(folder)
    assert not (mine / "step-13.tmp").exists()


@pytest.mark.slow
def test_compiled_and_checkpointed_layers_train_the_same(finished, tmp_path):
    folder, _ = finished
    run("run_pretrain.py", "--output_dir", tmp_path / "run", *SHORT, "--torch_compile", "--gradient_checkpointing")
    for mine, expected in zip(metrics(tmp_path / "run"), metrics(folder), strict=True):
        for name in ("reconstruction_loss", "uniformity_loss", "grad_norm"):
            assert mine[name] == pytest.approx(expected[name], rel=1e-4), name
    assert umae.UMAEForPreTraining.from_pretrained(tmp_path / "run")


def assert_same_curve(mine, expected, names=("reconstruction_loss", "uniformity_loss", "grad_norm")) -> None:
    assert len(mine) == len(expected)
    for one, other in zip(mine, expected, strict=True):
        for name in names:
            assert one[name] == pytest.approx(other[name], rel=1e-4), (one["step"], name)


TWENTY = ("--max_train_steps", "20", "--logging_steps", "1", "--checkpointing_steps", "20")


@pytest.fixture(scope="module")
def twenty_steps(tmp_path_factory):
    """The curve of a run on one process, every step of it."""
    folder = tmp_path_factory.mktemp("twenty") / "run"
    run("run_pretrain.py", "--output_dir", folder, *TWENTY)
    return metrics(folder)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_processes_at_the_same_global_batch_train_the_same(twenty_steps, tmp_path, processes):
    batch = ("--per_device_train_batch_size", 128 // processes)
    torchrun(processes, "run_pretrain.py", "--output_dir", tmp_path / "run", *TWENTY, *batch)
    assert_same_curve(metrics(tmp_path / "run"), twenty_steps)


@pytest.mark.slow
def test_two_machines_train_as_one_process_does(twenty_steps, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1")
    script = ("run_pretrain.py", "--output_dir", str(tmp_path / "run"), *TWENTY, "--per_device_train_batch_size", "64")
    machines = [
        subprocess.Popen(
            [sys.executable, *launcher, "--master_port", port, "--node_rank", str(rank), *script], cwd=ROOT,
            env=environment(ACCELERATE_USE_CPU="1"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    printed = [machine.communicate(timeout=TIMEOUT)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], printed
    assert "128 = 64 per device x 2 processes x 1" in printed[0] and "finished in" not in printed[1]
    assert_same_curve(metrics(tmp_path / "run"), twenty_steps)


SLURM = {  # what a job on one machine has, as far as the script asks
    "srun": 'exec "$@"',
    "scontrol": 'if [ "$1" = requeue ]; then echo "$2" >> requeued; else echo 127.0.0.1; fi',
}


@pytest.mark.slow
def test_the_slurm_script_goes_back_into_the_queue_until_the_run_is_finished(tmp_path):
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in SLURM.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin_folder / name).chmod(0o755)
    (tmp_path / "run_pretrain.py").symlink_to(ROOT / "run_pretrain.py")
    path = f"{bin_folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    env = environment(PATH=path, ACCELERATE_USE_CPU="1", SLURM_GPUS_ON_NODE="2", **job)
    steps = ("--max_train_steps", "300", "--checkpointing_steps", "4", "--logging_steps", "100")
    command = ["bash", str(ROOT / "recipes" / "slurm.sh"), "--output_dir", str(tmp_path / "run"), *steps]
    where = {"cwd": tmp_path, "env": env, "text": True}
    first = subprocess.Popen(command, **where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/step-?")) and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    printed, _ = first.communicate(timeout=60)
    assert first.returncode == 0 and (tmp_path / "requeued").read_text() == "7\n", printed
    assert "stopped by a signal after step" in printed
    second = subprocess.run(command, **where, capture_output=True, timeout=TIMEOUT)
    assert second.returncode == 0 and "continuing from" in second.stdout, second.stdout + second.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"]
    assert (tmp_path / "requeued").read_text() == "7\n"
    refused = subprocess.run([*command, "--seed", "1"], **where, capture_output=True, timeout=TIMEOUT)
    assert refused.returncode != 0 and (tmp_path / "requeued").read_text() == "7\n", "a failure is not tried again"


@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_knows_every_line_of_the_configurations(file):
    config = load_config_from_file(str(file))
    assert config.num_processes == {"one_gpu": 1, "two_machines": 16}.get(file.stem, 8)
    assert (config.distributed_type == "NO") == (file.stem == "one_gpu")


def test_another_number_of_processes_goes_on_with_the_same_run(finished, tmp_path):
    folder, _ = finished
    mine = tmp_path / "run"
    shutil.copytree(folder, mine)
    record = json.loads((mine / "run.json").read_text())
    (mine / "run.json").write_text(json.dumps({**record, "finished": False}))
    shutil.rmtree(mine / "step-12")
    command = ("run_pretrain.py", "--output_dir", mine, *SHORT)
    refused = torchrun(2, *command, check=False)
    assert refused.returncode != 0
    assert "holds a run with pictures_per_step 128, not 256; use another --output_dir" in refused.stderr
    resumed = torchrun(2, *command, "--per_device_train_batch_size", 64)
    assert f"continuing from {mine}/step-8" in resumed.stdout
    assert_same_curve(metrics(mine), metrics(folder))


DYING = """
import os, signal, sys, datetime, run_pretrain, umae.launch
how, when = sys.argv.pop(1), 6
umae.launch.PATIENCE = datetime.timedelta(seconds=15)
train_step = run_pretrain.train_step
def dying(*arguments, step, **named):
    if step == when and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)
    return train_step(*arguments, step=step, **named)
run_pretrain.train_step = dying
if __name__ == "__main__":
    run_pretrain.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("how", "seconds", "named"),
    [
        ("dies", 120, r"rank +: 1 \(local_rank: 1\)\n +exitcode +: -9"),
        pytest.param("stops", 180, "Timed out waiting 15000ms", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_dies_or_stops_ends_the_others_and_spoils_nothing(tmp_path, how, seconds, named):
    (tmp_path / "dying.py").write_text(DYING)
    flags = ("--output_dir", tmp_path / "run", *SHORT, "--per_device_train_batch_size", 64)
    start = time.monotonic()
    result = torchrun(2, tmp_path / "dying.py", how, *flags, check=False)
    assert result.returncode != 0 and time.monotonic() - start < seconds
    assert re.search(named, result.stderr), result.stderr[-3000:]
    assert newest_whole(tmp_path / "run") == (tmp_path / "run" / "step-4", [])


def test_accumulated_exactly_a_batch_trains_as_it_does_at_once(twenty_steps, tmp_path):
    batch = ("--per_device_train_batch_size", "32", "--gradient_accumulation_steps", "4")
    exact = run("run_pretrain.py", "--output_dir", tmp_path / "run", *TWENTY, *batch, "--exact_uniformity")
    assert "mean over the cls features of 128 pictures\n" in exact.stdout
    assert_same_curve(metrics(tmp_path / "run"), twenty_steps)
    default = run("run_pretrain.py", "--output_dir", tmp_path / "default", *TWENTY, *batch)
    assert "mean over the cls features of 32 pictures, then over 4 micro-batches" in default.stdout
    assert_same_curve(metrics(tmp_path / "default"), twenty_steps, ["reconstruction_loss"])
    with pytest.raises(AssertionError):
        assert_same_curve(metrics(tmp_path / "default"), twenty_steps, ["uniformity_loss"])


def test_a_launch_of_independent_copies_is_refused(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    result = run(*launcher, "run_pretrain.py", "--output_dir", tmp_path / "run", *SHORT, check=False)
    assert result.returncode != 0
    assert "started 2 processes, but Accelerate sees 1" in result.stderr
    assert not (tmp_path / "run").exists()


def small_recipe(tmp_path) -> list[str]:
    """The digits' sizes, with nothing said about precision."""
    lines = run_pretrain.DIGITS_RECIPE.read_text().splitlines()
    (tmp_path / "recipe.yaml").write_text("\n".join(line for line in lines if not line.startswith("mixed_precision")))
    return ["--recipe", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "run"), "--max_train_steps", "2"]


def test_accelerate_launches_the_script(tmp_path):
    launcher = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", "--mixed_precision", "bf16")
    result = run(*launcher, "run_pretrain.py", *small_recipe(tmp_path))
    assert "bf16 on 1 x CPU" in result.stdout
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("launcher", "fast", "flags", "expected"),
    [
        ("no", True, (), "bf16"),
        ("no", False, (), "no"),
        ("no", True, ("--mixed_precision", "no"), "no"),
        ("bf16", False, (), "bf16"),
    ],
)
def test_precision_is_what_was_said_or_what_the_hardware_has(monkeypatch, tmp_path, launcher, fast, flags, expected):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    monkeypatch.setattr(launch, "has_fast_bf16", lambda device: fast)
    run_pretrain.main([*small_recipe(tmp_path), *flags])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["identity"]["mixed_precision"] == expected


def test_real_pictures_in_a_folder_train_and_report_to_a_tracker(tmp_path):
    source = SHARED / "data" / "imagenet_sample"
    if not source.is_dir():
        pytest.skip("needs the ImageNet sample beside the project")
    (tmp_path / "pictures").mkdir()
    for file in sorted(source.glob("*.JPEG"))[:12]:
        shutil.copy(file, tmp_path / "pictures")
    sizes = (
        "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,decoder_hidden_size=16,decoder_num_hidden_layers=1"
    )
    run_pretrain.main(
        f"--dataset_name {tmp_path / 'pictures'} --output_dir {tmp_path / 'run'} --config_overrides {sizes} "
        "--image_size 64 --patch_size 16 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 "
        "--num_train_epochs 2 --pooling mean --report_to tensorboard --logging_steps 1".split()
    )
    assert [line["epoch"] for line in metrics(tmp_path / "run")] == [1.0, 2.0]
    files = (tmp_path / "run" / "logs").rglob("events.out.tfevents.*")
    tags = [EventAccumulator(str(file)).Reload().Tags() for file in files]
    assert ["reconstructions"] in [found["images"] for found in tags]
    tracked = {name for found in tags for name in found["scalars"]}
    assert {"loss", "effective_rank_cls"} <= tracked and "online_top1" not in tracked, "there are no labels"
    assert "folder pictures (train)" in (tmp_path / "run" / "README.md").read_text()


def test_training_starts_from_given_weights(finished, tmp_path):
    folder, _ = finished
    run_pretrain.main(
        f"--output_dir {tmp_path / 'run'} --model_name_or_path {folder} --uniformity_weight 0.5 --max_train_steps 1 "
        "--base_learning_rate 0".split()
    )
    before, after = (umae.UMAEForPreTraining.from_pretrained(one) for one in (folder, tmp_path / "run"))
    assert after.config.uniformity_weight == 0.5
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_training_starts_from_a_file_of_the_original_code(tmp_path, capsys):
    source = original_file(tmp_path / "mae.pth", SETUP_OF_768)
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        Image.new("RGB", (9, 9), (i, 99, 9)).save(tmp_path / "pictures" / f"{i}.png")
    run_pretrain.main(
        f"--output_dir {tmp_path / 'run'} --model_name_or_path {source} --max_train_steps 1 --base_learning_rate 0 "
        f"--dataset_name {tmp_path / 'pictures'} "
        "--per_device_train_batch_size 4".split()
    )
    assert f"from {source}" in capsys.readouterr().out
    tensors, _ = read_weights(source)
    after = umae.UMAEForPreTraining.from_pretrained(tmp_path / "run")
    assert torch.equal(after.vit.embeddings.cls_token, tensors["cls_token"])
    assert (after.config.uniformity_weight, after.config.mask_ratio) == (0.01, 0.6), "from the settings in the file"


def folder_with_bad_pictures(folder, count: int, bad: int) -> str:
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (9, 9), (i, 2 * i, 255 - i)).save(folder / f"{i:03}.jpg")
    for i in range(bad):
        path = folder / f"{3 * i:03}.jpg"
        path.write_bytes(path.read_bytes()[: 200 * i])
    sizes = (
        "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,decoder_hidden_size=16,decoder_num_hidden_layers=1"
    )
    return f"--dataset_name {folder} --image_size 8 --patch_size 2 --config_overrides {sizes} --logging_steps 2"


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_left_out_named_once_and_counted(tmp_path, capsys, workers):
    settings = folder_with_bad_pictures(tmp_path / "pictures", 40, bad=2)
    run_pretrain.main(
        f"{settings} --output_dir {tmp_path / 'run'} --num_train_epochs 3 --per_device_train_batch_size 8 "
        f"--max_unreadable_share 0.05 --dataloader_num_workers {workers}".split()
    )
    printed = capsys.readouterr()
    assert printed.out.count("left out: 000.jpg: 0 bytes") == printed.out.count("left out: 003.jpg: ") == 1
    assert "pictures left out because they cannot be read: 2" in printed.out
    assert set(json.loads((tmp_path / "run" / "run.json").read_text())["unreadable"]) == {"0", "3"}


def test_too_many_unreadable_pictures_end_the_run_with_their_names(tmp_path):
    settings = folder_with_bad_pictures(tmp_path / "pictures", 40, bad=2)
    command = f"{settings} --output_dir {tmp_path / 'run'} --per_device_train_batch_size 8 --max_train_steps 20".split()
    with pytest.raises(ValueError, match=r"[12] of 40 pictures cannot be read, more than --max_unreadable_share 0\.01"):
        run_pretrain.main(command)


def test_nothing_but_unreadable_pictures_is_refused_before_anything_is_written(tmp_path):
    settings = folder_with_bad_pictures(tmp_path / "pictures", 3, bad=1)
    for file in (tmp_path / "pictures").iterdir():
        file.write_text("<html>")
    with pytest.raises(ValueError, match=r"none of the 3 pictures of .* can be read: 000.jpg: .*001.jpg.*002.jpg"):
        run_pretrain.main(f"{settings} --output_dir {tmp_path / 'run'}".split())
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mask_ration", "0.5"], r"unknown argument --mask_ration; did you mean --mask_ratio\?"),
        (["--mask_ratio", "1.0"], r"mask_ratio must lie in \[0, 1\), got 1.0"),
        (["--patch_size", "3"], "patch_size 3 does not divide image_size 8"),
        (["--config_overrides", "hidden_sise=64"], "did you mean hidden_size"),
        (["--config_overrides", "hidden_act=relux"], "hidden_act 'relux' is not known; use one of .*relu"),
        (["--per_device_train_batch_size", "2000"], "holds 1438 pictures, fewer than one step of 2000"),
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
    assert "run_pretrain.py: mask_ratio must lie in [0, 1), got 1.0" in result.stderr


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
        with pytest.raises(ValueError, match=f"cannot write to {folder}: .*; give another --output_dir"):
            run_pretrain.main(["--output_dir", folder, *SHORT])
    finally:
        subprocess.run(["umount", tmp_path / "disk"], capture_output=True)


def test_a_file_is_no_output_folder(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ValueError, match="is a file; give a new or empty folder"):
        run_pretrain.main(["--output_dir", str(tmp_path / "run"), *SHORT])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "1"], "seed 0, not 1"),
        (["--uniformity_weight", "0.1"], "uniformity_weight 0.01, not 0.1"),
        (["--per_device_train_batch_size", "64"], "pictures_per_step 128, not 64"),
        (
            ["--per_device_train_batch_size", "64", "--gradient_accumulation_steps", "2"],
            "gradient_accumulation_steps 1, not 2",
        ),
        (["--max_train_steps", "13"], "total_steps 12, not 13"),
        (["--base_learning_rate", "1"], "learning_rate 0.0005, not 0.5"),
        (["--weight_decay", "0"], "weight_decay 0.05, not 0.0"),
        (["--mixed_precision", "bf16"], "mixed_precision no, not bf16"),
        (["--train_split", "test"], r"dataset digits \(train\), not digits \(test\)"),
    ],
    ids=str,
)
def test_another_runs_folder_is_refused_with_the_value_that_differs(finished, flags, message):
    folder, _ = finished
    way_out = f"; use another --output_dir (and --model_name_or_path {folder} to start from its weights)"
    with pytest.raises(ValueError, match=f"{folder} holds a run with {message}{re.escape(way_out)}"):
        run_pretrain.main(["--output_dir", str(folder), *SHORT, *flags])


def test_a_run_from_other_weights_is_another(finished):
    folder, _ = finished
    with pytest.raises(ValueError, match=f"holds a run with initial_weights None, not {folder}"):
        run_pretrain.main(["--output_dir", str(folder), *SHORT, "--model_name_or_path", str(folder)])


def test_other_pictures_of_the_same_name_and_number_are_another_run(tmp_path):
    settings = folder_with_bad_pictures(tmp_path / "pictures", 16, bad=0)
    command = f"{settings} --output_dir {tmp_path / 'run'} --per_device_train_batch_size 8 --max_train_steps 2".split()
    run_pretrain.main(command)
    Image.new("RGB", (9, 9)).save(tmp_path / "pictures" / "000.jpg")
    with pytest.raises(ValueError, match="holds a run with dataset_fingerprint"):
        run_pretrain.main(command)


def test_a_run_from_before_a_field_existed_goes_on(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["identity"]["config"].pop("drop_path_rate") == 0.0
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    run_pretrain.main(["--output_dir", str(tmp_path / "run"), *SHORT])
    assert "finished; nothing to do" in capsys.readouterr().out


def test_what_does_not_make_the_run_another_may_change(finished, capsys):
    folder, _ = finished
    run_pretrain.main(
        f"--output_dir {folder} {' '.join(SHORT[:2])} --checkpointing_steps 5 --logging_steps 2 "
        "--checkpoints_total_limit 1 --dataloader_num_workers 1 --report_to tensorboard".split()
    )
    assert "finished; nothing to do" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_no_weight(tmp_path, monkeypatch):
    """From step 5 on one picture holds NaN; the weights of step 4 must stand."""
    steps = iter(range(100))

    def spoil(pixel_values, mean, std, normalize=training.normalize):
        values = normalize(pixel_values, mean, std)
        return values if next(steps) < 5 else values.index_fill(0, torch.tensor([3]), float("nan"))

    monkeypatch.setattr(training, "normalize", spoil)
    settings = ["--max_train_steps", "12", "--checkpointing_steps", "4", "--logging_steps", "6"]
    with pytest.raises(FloatingPointError) as failure:
        run_pretrain.main(["--output_dir", str(tmp_path / "run"), *settings])
    message = str(failure.value)
    assert message.startswith("loss, reconstruction_loss, uniformity_loss, feature_norm was not finite at step 6")
    assert "and 112 more of digits (train); the weights have not changed since" in message  # of 128
    assert [entry.name for entry in (tmp_path / "run").glob("step-*")] == ["step-4"]
    model = umae.UMAEForPreTraining.from_pretrained(tmp_path / "run" / "step-4")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


SPOILED = """
import os, sys, torch, run_pretrain, modeling_umae
plain, calls = modeling_umae.UMAEForPreTraining.forward, [0]
def forward(self, *arguments, **named):
    output = plain(self, *arguments, **named)
    calls[0] += 1
    if calls[0] == 6 and os.environ["RANK"] == "1":
        output.reconstruction_loss = output.reconstruction_loss + torch.inf  # loss and gradients stay as they are
    return output
modeling_umae.UMAEForPreTraining.forward = forward
train_step = run_pretrain.train_step
def step(accelerator, model, *arguments, **named):
    values = train_step(accelerator, model, *arguments, **named)
    with open(f"weights_{os.environ['RANK']}", "a") as file:
        print(sum(parameter.double().abs().sum().item() for parameter in model.parameters()), file=file)
    return values
run_pretrain.train_step = step
with run_pretrain.one_line_refusals("run_pretrain.py"):
    run_pretrain.main(sys.argv[1:])
"""


def test_a_loss_that_is_not_finite_on_one_process_ends_all_at_that_step(tmp_path):
    (tmp_path / "spoiled.py").write_text(SPOILED)
    result = run(
        "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", tmp_path / "spoiled.py",
        "--output_dir", tmp_path / "run", "--per_device_train_batch_size", "4", "--max_train_steps", "12",
        "--checkpointing_steps", "4", "--logging_steps", "8", cwd=tmp_path, check=False, ACCELERATE_USE_CPU="1",
        PYTHONPATH=str(ROOT),
    )  # fmt: skip
    assert result.returncode != 0
    weights, others = ((tmp_path / f"weights_{rank}").read_text().split() for rank in (0, 1))
    assert weights == others and len(set(weights[:5])) == 5, "steps 1 to 5 train"
    assert len(weights) == 8 and set(weights[5:]) == {weights[4]}, "the others freeze, on both processes"
    order = seeding.permutation(0, 0, 1438)[5 * 8 + 4 : 6 * 8].tolist()  # the sixth step's part of process 1
    expected = f"reconstruction_loss was not finite at step 6, with the pictures {', '.join(map(str, order))} of digits"
    assert result.stderr.count(expected) == 2  # both processes say it, and end
    assert [entry.name for entry in (tmp_path / "run").glob("step-*")] == ["step-4"]


CRAMPED = """
import resource, sys, run_pretrain
train_step = run_pretrain.train_step
def cramped(*arguments, **named):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, -1))
    return train_step(*arguments, **named)
run_pretrain.train_step = cramped
with run_pretrain.one_line_refusals("run_pretrain.py"):
    run_pretrain.main(sys.argv[1:])
"""


def test_too_little_memory_is_named_with_the_flags_that_help(tmp_path):
    (tmp_path / "cramped.py").write_text(CRAMPED)
    command = ("--output_dir", tmp_path / "run", "--per_device_train_batch_size", "1024", "--max_train_steps", "2")
    result = run(tmp_path / "cramped.py", *command, check=False, PYTHONPATH=str(ROOT))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "out of memory with --per_device_train_batch_size 1024; lower it" in result.stderr


def test_features_of_zeros_are_warned_of(capsys):
    accelerator = SimpleNamespace(reduce=lambda window, kind: window, print=print)
    names = list(training.LOGGED)
    for norm, warned in ((0.0, True), (0.5, False)):
        window = torch.ones(2, len(names))
        window[0, names.index("feature_norm")] = norm
        run_pretrain.logged(Progress(accelerator, 1, None, None, None, names, window))
        assert ("the features are zero" in capsys.readouterr().out) == warned


def test_weights_freeze_from_the_first_value_that_is_not_finite(tmp_path, monkeypatch):
    kept = {}

    def look(accelerator, model, optimizer, micro_batches, failed, train_step=run_pretrain.train_step, **arguments):
        step = len(kept)
        if step == 2:
            model.get_parameter("vit.layernorm.bias").register_hook(lambda grad: grad * float("inf"))
        values = train_step(accelerator, model, optimizer, micro_batches, failed, **arguments)
        kept[step] = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        return values

    monkeypatch.setattr(run_pretrain, "train_step", look)
    with pytest.raises(FloatingPointError):
        run_pretrain.main(["--output_dir", str(tmp_path / "run"), "--max_train_steps", "6", "--logging_steps", "5"])
    assert not torch.equal(kept[0], kept[1])  # step 0 has learning rate 0
    assert all(torch.equal(kept[1], kept[step]) for step in (2, 3, 4))
