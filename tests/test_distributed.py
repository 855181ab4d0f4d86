"""Pre-training on several processes and machines: what one would have done."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from processes import ROOT, TIMEOUT, environment, run, together, torchrun
from training_runs import SHORT, TEN, assert_same_curve, metrics

from umae.training.checkpoints import newest_whole


def test_two_processes_see_in_the_features_what_one_sees(finished, tmp_path):
    folder, _ = finished
    together(2, "run_pretrain.py", "--output_dir", tmp_path / "run", *SHORT, "--per_device_train_batch_size", 64)
    for mine, expected in zip(metrics(tmp_path / "run"), metrics(folder), strict=True):
        assert mine.keys() == expected.keys()
        for name in expected:
            accuracy = name.startswith("online")  # in which one image more or less counts 1 / 359
            assert mine[name] == pytest.approx(expected[name], rel=1e-3, abs=0.01 if accuracy else 1e-9), name


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_processes_at_the_same_global_batch_train_the_same(ten_steps, tmp_path, processes):
    batch = ("--per_device_train_batch_size", 128 // processes)
    together(processes, "run_pretrain.py", "--output_dir", tmp_path / "run", *TEN, *batch)
    assert_same_curve(metrics(tmp_path / "run"), ten_steps)


WRAPPED = """
import os, sys, warnings
from pathlib import Path
from golden_models import fresh_config
from torch.nn.parallel import DistributedDataParallel
from modeling_umae import UMAEForPreTraining
from umae.training.hardware import close, make_accelerator
from umae.training.state import State
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    warnings.simplefilter("ignore", DeprecationWarning)  # which Python shows to nobody
    accelerator = make_accelerator(os.environ, "no", 1, "none", Path(sys.argv[1]))
    model = UMAEForPreTraining(fresh_config())
    groups = [{"params": model.parameters()}]
    state = State.begin(accelerator, model, groups, (0.9, 0.95), ["loss"], False, "no")
assert isinstance(state.model, DistributedDataParallel) and not state.model.will_sync_module_buffers()
assert not caught, [str(warning.message) for warning in caught]
close(accelerator)
"""


def test_several_processes_send_no_buffers_and_start_without_a_warning(tmp_path):
    (tmp_path / "wrapped.py").write_text(WRAPPED)
    together(2, tmp_path / "wrapped.py", tmp_path)


@pytest.mark.slow
def test_two_machines_train_as_one_process_does(ten_steps, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1")
    script = ("run_pretrain.py", "--output_dir", str(tmp_path / "run"), *TEN, "--per_device_train_batch_size", "64")
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
    assert_same_curve(metrics(tmp_path / "run"), ten_steps)


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
    refused = together(2, *command, check=False)
    assert any(result.returncode == 1 for result in refused)
    expected = "holds a run with pictures_per_step 128, not 256; use another --output_dir"
    assert expected in "".join(result.stderr for result in refused)
    resumed, _ = together(2, *command, "--per_device_train_batch_size", 64)
    assert f"continuing from {mine}/step-8" in resumed.stdout
    assert_same_curve(metrics(mine), metrics(folder))


PATIENT = """
import datetime, os, sys, time
from pathlib import Path
from umae.training import hardware
hardware.PATIENCE = datetime.timedelta(seconds=1)  # of an ordinary barrier
accelerator = hardware.make_accelerator(os.environ, "no", 1, "none", Path("."))
cache = Path(sys.argv[1])
with hardware.main_process_first(accelerator):
    if accelerator.is_main_process:
        time.sleep(3)
        cache.write_text("downloaded")
    print(cache.read_text())
hardware.close(accelerator)
"""


def test_the_others_wait_for_a_download_that_takes_longer_than_their_patience(tmp_path):
    results = together(2, "-c", PATIENT, tmp_path / "cache")
    assert [result.stdout for result in results] == ["downloaded\n"] * 2


DYING = """
import os, signal, sys, datetime, run_pretrain, umae.training.hardware
from umae.training import loop
how, when = sys.argv.pop(1), 6
umae.training.hardware.PATIENCE = datetime.timedelta(seconds=15)
optimizer_step = loop.optimizer_step
def dying(*arguments):
    if arguments[6] == when and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)
    return optimizer_step(*arguments)
loop.optimizer_step = dying
if __name__ == "__main__":
    run_pretrain.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("how", "seconds", "named"),
    [
        ("dies", 120, r"rank +: 1 \(local_rank: 1\)\n +exitcode +: -9"),
        ("stops", 180, "Timed out waiting 15000ms"),
    ],
)
@pytest.mark.slow
def test_a_process_that_dies_or_stops_ends_the_others_and_spoils_nothing(tmp_path, how, seconds, named):
    (tmp_path / "dying.py").write_text(DYING)
    flags = ("--output_dir", tmp_path / "run", *SHORT, "--per_device_train_batch_size", 64)
    start = time.monotonic()
    result = torchrun(2, tmp_path / "dying.py", how, *flags, check=False)
    assert result.returncode != 0 and time.monotonic() - start < seconds
    assert re.search(named, result.stderr), result.stderr[-3000:]
    assert newest_whole(tmp_path / "run") == (tmp_path / "run" / "step-4", [])


def test_the_process_left_alone_ends_by_itself_and_spoils_nothing(tmp_path):
    """The same without a launcher that would end it."""
    (tmp_path / "dying.py").write_text(DYING)
    flags = ("--output_dir", tmp_path / "run", *SHORT, "--per_device_train_batch_size", 64)
    left, died = together(2, tmp_path / "dying.py", "dies", *flags, check=False)
    assert died.returncode == -9 and left.returncode == 1 and "RuntimeError" in left.stderr
    assert newest_whole(tmp_path / "run") == (tmp_path / "run" / "step-4", [])


@pytest.mark.slow  # in the fast suite `test_modeling` has this law for the terms, `test_processes` for two processes
def test_accumulated_exactly_a_batch_trains_as_it_does_at_once(ten_steps, tmp_path):
    batch = ("--per_device_train_batch_size", "32", "--gradient_accumulation_steps", "4")
    exact = run("run_pretrain.py", "--output_dir", tmp_path / "run", *TEN, *batch, "--exact_uniformity")
    assert "mean over the cls features of 128 images\n" in exact.stdout
    assert_same_curve(metrics(tmp_path / "run"), ten_steps)
    default = run("run_pretrain.py", "--output_dir", tmp_path / "default", *TEN, *batch)
    assert "mean over the cls features of 32 images, then over 4 micro-batches" in default.stdout
    assert_same_curve(metrics(tmp_path / "default"), ten_steps, ["reconstruction_loss"])
    with pytest.raises(AssertionError):
        assert_same_curve(metrics(tmp_path / "default"), ten_steps, ["uniformity_loss"])


def test_a_launch_of_independent_copies_is_refused(tmp_path):
    command = ("run_pretrain.py", "--output_dir", tmp_path / "run", *SHORT)
    results = together(2, *command, check=False, ACCELERATE_USE_CPU="false")
    assert all(result.returncode != 0 for result in results)
    assert any("started 2 processes, but Accelerate sees 1" in result.stderr for result in results)
    assert not (tmp_path / "run").exists()
