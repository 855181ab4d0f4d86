"""Runs of pre-training that are killed, stopped, damaged and started again: the same bits, and nothing lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from processes import ROOT, TIMEOUT, environment, run, start
from training_runs import SHORT, folder_with_bad_images, metrics

import run_pretrain
from umae.training.folder import lock

pytestmark = pytest.mark.usefixtures("no_figures")


def test_a_finished_run_changes_nothing_when_started_again(finished, capsys):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run_pretrain.main(["--output_dir", str(folder), *SHORT])
    assert "finished; nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_bits(finished, tmp_path, workers):
    """Other moments of the kill are tested on the loop alone, see test_loop.py."""
    folder, _ = finished
    mine = tmp_path / "run"
    command = ("run_pretrain.py", "--output_dir", str(mine), *SHORT, "--dataloader_num_workers", workers)
    process = start(*command)
    deadline = time.monotonic() + 120
    while not (mine / "step-4").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (mine / "model.safetensors").exists()
    for _ in range(300):  # the loader's workers end, too
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("workers are left over")
    resumed = run(*command)
    assert "continuing from" in resumed.stdout
    assert (mine / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert metrics(mine) == metrics(folder)


def started(folder, *flags):
    """A run in a process of its own, once it has a checkpoint and more steps to do; it prints to `folder`.log."""
    with folder.with_suffix(".log").open("w") as log:
        process = start("run_pretrain.py", "--output_dir", folder, *flags, stdout=log)
    deadline = time.monotonic() + 120
    while not list(folder.glob("step-?")) and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


LONG = ("--max_train_steps", "3000", "--checkpointing_steps", "4", "--logging_steps", "3", "--eval_steps", "0")


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, "0"), (signal.SIGINT, "2")])
def test_a_signal_ends_the_run_after_its_step_and_the_next_start_goes_on(tmp_path, number, workers):
    process = started(tmp_path / "run", *LONG, "--dataloader_num_workers", workers)
    group = process.pid
    os.killpg(group, number)  # as a terminal does: the workers get it too
    assert process.wait(30) == 128 + number
    printed = (tmp_path / "run.log").read_text()
    (step,) = re.findall(r"stopped by a signal after step (\d+); the same command continues", printed)
    assert "Traceback" not in printed
    with lock(tmp_path / "run"):  # the folder is free
        pass
    with pytest.raises(ProcessLookupError):  # nobody is left
        os.killpg(group, 0)
    process = started(tmp_path / "run", *LONG)
    expected, deadline = f"continuing from {tmp_path / 'run'}/step-{step}\n", time.monotonic() + 60
    while expected not in (tmp_path / "run.log").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert expected in (tmp_path / "run.log").read_text()


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
    (step,) = re.findall(r"stopped by a signal after step (\d+); the same command continues", printed)
    assert process.returncode != 0 and (tmp_path / "run" / f"step-{step}" / "checksums.json").exists()
    with lock(tmp_path / "run"):  # the folder is free
        pass
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_second_run_on_the_same_folder_is_refused(tmp_path):
    process = started(tmp_path / "run", *LONG)
    try:
        second = run("run_pretrain.py", "--output_dir", tmp_path / "run", *LONG, check=False)
        assert second.returncode == 1
        assert "is being trained by another process; wait for it" in second.stderr
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "1"], "seed 0, not 1"),
        (["--uniformity_weight", "0.1"], "uniformity_weight 0.01, not 0.1"),
        (["--regularizer", "coding_rate"], "regularizer uniformity, not coding_rate"),
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
    way_out = f"; use another output_dir (and model_name_or_path {folder} to start from its weights)"
    with pytest.raises(ValueError, match=f"{folder} holds a run with {message}{re.escape(way_out)}"):
        run_pretrain.main(["--output_dir", str(folder), *SHORT, *flags])


def test_a_run_from_other_weights_is_another(finished):
    folder, _ = finished
    with pytest.raises(ValueError, match=f"holds a run with initial_weights None, not {folder}"):
        run_pretrain.main(["--output_dir", str(folder), *SHORT, "--model_name_or_path", str(folder)])


def test_other_images_of_the_same_name_and_number_are_another_run(tmp_path):
    settings = folder_with_bad_images(tmp_path / "images", 16, bad=0)
    command = f"{settings} --output_dir {tmp_path / 'run'} --per_device_train_batch_size 8 --max_train_steps 2".split()
    run_pretrain.main(command)
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "000.jpg")
    with pytest.raises(ValueError, match="holds a run with dataset_fingerprint"):
        run_pretrain.main(command)


@pytest.mark.parametrize(("field", "default"), [("drop_path_rate", 0.0), ("regularizer", "uniformity")])
def test_a_run_from_before_a_field_existed_goes_on(finished, tmp_path, capsys, field, default):
    shutil.copytree(finished[0], tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["identity"]["config"].pop(field) == default
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
