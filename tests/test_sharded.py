"""Training under FSDP2 by Accelerate's own path: what an unsharded run does, and leaves.

Accelerate shards on GPUs only, though torch can on CPUs. So the programs here let it believe that it has some.
"""

import json
import os
import shutil

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from PIL import Image
from processes import ROOT, run, together
from safetensors.torch import load_file
from training_runs import assert_same_curve, folder_of_parquet, metrics, small_model

PLAIN = """
import importlib, sys
from umae import speed
from umae.sharing import gallery
speed.matmul_rate, gallery.draw = lambda *arguments: 1e9, lambda *arguments: None  # seconds, and nothing of FSDP2's
importlib.import_module(sys.argv.pop(1)).main(sys.argv[1:])
"""

SHARDED = (
    """
import torch
from accelerate import DistributedType, PartialState
from torch.distributed.tensor import DTensor
from umae.training import loop
PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
optimizer_step = loop.optimizer_step
def step(accelerator, model, *arguments):
    values = optimizer_step(accelerator, model, *arguments)
    assert accelerator.is_fsdp2 and {(type(p), p.dtype) for p in model.parameters()} == {(DTensor, torch.float32)}
    return values
loop.optimizer_step = step
"""
    + PLAIN
)

SPOILED = """
import os, torch, modeling_umae
from torch.distributed.tensor import DTensor
from umae.training import loop
forward, calls = modeling_umae.UMAEForPreTraining.forward, []
def spoiled(self, *arguments, **named):
    output = forward(self, *arguments, **named)
    calls.append(output)
    if len(calls) == 6 and os.environ["RANK"] == "1":
        output.reconstruction_loss = output.reconstruction_loss + torch.inf  # loss and gradients stay as they are
    return output
modeling_umae.UMAEForPreTraining.forward = spoiled
plain_step = loop.optimizer_step
def noting_step(accelerator, model, *arguments):
    values = plain_step(accelerator, model, *arguments)
    with open(f"weights_{os.environ['RANK']}", "a") as file:
        print(sum(p.to_local().double().abs().sum().item() for p in model.parameters()), file=file)
    return values
loop.optimizer_step = noting_step
"""

# Accumulated and checkpointed, with an evaluation, in bf16, with gradients that are scaled down
BITS = (
    "--max_train_steps", "3", "--checkpointing_steps", "2", "--logging_steps", "1", "--eval_steps", "3",
    "--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "2", "--gradient_checkpointing",
    "--mixed_precision", "bf16", "--max_grad_norm", "0.1",
)  # fmt: skip


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory) -> tuple[str, ...]:
    """The program and its flags, on few images."""
    folder = tmp_path_factory.mktemp("images")
    images = folder_of_parquet(folder, train=[0, 1] * 24, test=[0, 1] * 8)
    return ("run_pretrain", *small_model(images).split(), *BITS, "--exact_uniformity")


@pytest.fixture(scope="module")
def launched() -> dict[str, str]:
    """What `accelerate launch` with the recipe tells the processes that it starts."""
    words = ["--config_file", str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml"), "run_pretrain.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    told = {name: value for name, value in prepare_multi_gpu_env(args).items() if os.environ.get(name) != value}
    assert all(name.startswith(("ACCELERATE_", "FSDP_")) for name in told)
    return told


@pytest.fixture(scope="module")
def unsharded(pretraining, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unsharded") / "run"
    run("-c", PLAIN, *pretraining, "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def sharded(launched, pretraining, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "run"
    together(1, "-c", SHARDED, *pretraining, "--output_dir", folder, **launched)
    return folder


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_run(mine, expected) -> None:
    assert metrics(mine) == metrics(expected)
    for step in ("step-2", "step-3"):
        assert contents(mine / step) == contents(expected / step)


def forget_the_last_step(folder) -> None:
    shutil.rmtree(folder / "step-3")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "finished": False}))


def test_a_sharded_run_measures_and_saves_the_bits_of_an_unsharded_one(sharded, unsharded):
    assert_same_run(sharded, unsharded)


def test_a_sharded_run_continues_to_the_same_bits(launched, pretraining, sharded, unsharded, tmp_path):
    mine = tmp_path / "run"
    shutil.copytree(sharded, mine)
    forget_the_last_step(mine)
    (resumed,) = together(1, "-c", SHARDED, *pretraining, "--output_dir", mine, **launched)
    assert f"continuing from {mine}/step-2" in resumed.stdout
    assert_same_run(mine, unsharded)


STRANGER = """
import sys
from transformers import AutoImageProcessor, AutoModelForPreTraining
for auto in (AutoImageProcessor, AutoModelForPreTraining):
    assert type(auto.from_pretrained("step-2", trust_remote_code=True)).__module__.startswith("transformers_modules.")
assert not {"umae", "modeling_umae", "configuration_umae", "image_processing_umae"} & set(sys.modules)
"""


def test_a_stranger_loads_a_checkpoint_of_a_sharded_run_without_the_package(sharded):
    run("-c", STRANGER, cwd=sharded, PYTHONPATH="")


@pytest.mark.slow
def test_sharded_fine_tuning_saves_the_bits_of_an_unsharded_one_and_continues_to_them(launched, unsharded, tmp_path):
    mine, expected = tmp_path / "sharded", tmp_path / "unsharded"
    flags = ("run_finetune", "--model_name_or_path", unsharded, *BITS, "--output_dir")
    run("-c", PLAIN, *flags, expected)
    together(1, "-c", SHARDED, *flags, mine, **launched)
    assert_same_run(mine, expected)
    forget_the_last_step(mine)
    together(1, "-c", SHARDED, *flags, mine, **launched)
    assert_same_run(mine, expected)


@pytest.mark.slow
def test_two_sharded_processes_pretrain_as_one_unsharded_does(launched, tmp_path):
    flags = (
        "run_pretrain", *small_model("digits").split(), "--max_train_steps", "4", "--logging_steps", "1",
        "--eval_steps", "2", "--mixed_precision", "no", "--gradient_checkpointing", "--per_device_train_batch_size",
    )  # fmt: skip
    run("-c", PLAIN, *flags, "32", "--output_dir", tmp_path / "one")
    usual = {**launched, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}  # as `accelerate config` proposes
    together(2, "-c", SHARDED, *flags, "16", "--output_dir", tmp_path / "two", **usual)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert_same_curve(two, one)
    names = ("effective_rank_cls", "uniformity_mean", "grad_norm_reconstruction", "grad_norm_uniformity")
    assert_same_curve(two[1::2], one[1::2], names)
    saved, expected = (load_file(tmp_path / name / "step-4" / "model.safetensors") for name in ("two", "one"))
    for name in expected:
        assert torch.allclose(saved[name], expected[name], atol=1e-5), name


@pytest.mark.slow
def test_two_sharded_processes_finetune_as_one_where_one_of_them_can_read_no_test_image(launched, unsharded, tmp_path):
    """It calls the model nevertheless: the weights of a layer are gathered by all processes together."""
    for split, count in {"train": 16, "test": 4}.items():
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (9, 9), (60 * number + i, 200 - i, 0)).save(folder / f"{i}.png")
    (tmp_path / "images" / "test" / "dog" / "1.png").write_text("<html>")
    flags = (
        "run_finetune", "--model_name_or_path", unsharded, "--dataset_name", tmp_path / "images",
        "--mixed_precision", "no", "--max_train_steps", "2", "--logging_steps", "1", "--eval_steps", "1",
        "--per_device_eval_batch_size", "1", "--drop_path_rate", "0", "--per_device_train_batch_size",
    )  # fmt: skip
    run("-c", PLAIN, *flags, "8", "--output_dir", tmp_path / "one")
    together(2, "-c", SHARDED, *flags, "4", "--output_dir", tmp_path / "two", **launched)
    assert_same_curve(metrics(tmp_path / "two"), metrics(tmp_path / "one"), ("loss", "grad_norm", "test_top1"))
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert len(record["unreadable_test"]) == 1


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_sharded_process_freezes_the_weights_of_all(launched, tmp_path):
    """By the common gradient, as without FSDP2; the fused optimiser leaves the shards as they are."""
    flags = (
        *small_model("digits").split(), "--per_device_train_batch_size", "4", "--max_train_steps", "12",
        "--checkpointing_steps", "4", "--logging_steps", "8", "--eval_steps", "0", "--mixed_precision", "bf16",
    )  # fmt: skip
    command = ("-c", SPOILED + SHARDED, "run_pretrain", "--output_dir", tmp_path / "run", *flags)
    results = together(2, *command, cwd=tmp_path, check=False, **launched)
    assert any("reconstruction_loss was not finite at step 6" in result.stderr for result in results)
    weights = [(tmp_path / f"weights_{rank}").read_text().split() for rank in (0, 1)]
    for own in weights:
        assert len(own) == 8 and len(set(own[:5])) == 5 and set(own[5:]) == {own[4]}
    assert [entry.name for entry in (tmp_path / "run").glob("step-*")] == ["step-4"]


@pytest.mark.slow
def test_compiled_layers_train_the_same_when_sharded(launched, pretraining, tmp_path):
    flags = (*pretraining, "--mixed_precision", "no", "--output_dir")
    run("-c", PLAIN, *flags, tmp_path / "plain")
    together(1, "-c", SHARDED, *flags, tmp_path / "compiled", "--torch_compile", "layers", **launched)
    assert_same_curve(metrics(tmp_path / "compiled"), metrics(tmp_path / "plain"))
