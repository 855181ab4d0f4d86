"""The programs in short runs, each in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.items import ROOT, Bench, Item

PATIENCE = 400  # seconds for a program


def items(bench: Bench) -> list[Item]:
    return [
        Item("digits: pretrain", partial(digits_pretrain, bench), 60),
        Item("digits: probe, attentive, too", partial(digits_probe, bench), 60),
        Item("digits: probe by MAE's protocol", partial(digits_mae_probe, bench), 60),
        Item("digits: finetune", partial(digits_finetune, bench), 60),
        Item("DDP", partial(ddp, bench), 60),
        Item("FSDP2", partial(fsdp2, bench), 60),
    ]


def run(bench: Bench, folder: Path, *words: str, launcher: tuple[str, ...] = ()) -> str:
    """Run `umae *words --output_dir folder`, a new folder; what it printed.

    Raises:
        RuntimeError: it failed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, *launcher, "-m", "umae", *words, "--output_dir", str(folder)]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    if bench.device == "cpu":
        environ |= {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def pretrain_flags(bench: Bench) -> list[str]:
    """Of a run on the digits."""
    steps = bench.pick(60, 4)
    return [
        "pretrain", "--max_train_steps", str(steps), "--logging_steps", str(steps // 4), "--eval_steps", str(steps),
        "--checkpointing_steps", str(steps // 2), "--mixed_precision", "bf16",
    ]  # fmt: skip


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def digits_pretrain(bench: Bench) -> dict[str, Any]:
    run(bench, bench.folder / "digits", *pretrain_flags(bench))
    last = metrics(bench.folder / "digits")[-1]
    return {name: last[name] for name in ("reconstruction_loss", "uniformity_loss", "online_top1")}


def digits_probe(bench: Bench) -> dict[str, Any]:
    return probe(bench, "digits_probe", "--attentive")


def digits_mae_probe(bench: Bench) -> dict[str, Any]:
    return probe(bench, "digits_mae", "--protocol", "mae", "--num_train_epochs", "3", "--warmup_epochs", "1")


def probe(bench: Bench, name: str, *flags: str) -> dict[str, Any]:
    """Accuracies of the heads in percent."""
    folder = bench.folder / name
    run(bench, folder, "probe", "--model_name_or_path", str(bench.folder / "digits"), *flags)
    report = json.loads((folder / "linear_probe.json").read_text())
    return {f"top-1 of {head}": result["top1"] for head, result in report.items() if "top1" in result}


def digits_finetune(bench: Bench) -> dict[str, Any]:
    steps = str(bench.pick(60, 2))
    flags = ("--max_train_steps", steps, "--logging_steps", steps, "--mixed_precision", "bf16")
    folder = bench.folder / "digits_finetune"
    run(bench, folder, "finetune", "--model_name_or_path", str(bench.folder / "digits"), *flags)
    last = metrics(folder)[-1]
    return {name: last[name] for name in ("loss", "test_top1")}


def ddp(bench: Bench) -> dict[str, Any]:
    """One process over NCCL; on a CPU, where one is not distributed, two over gloo."""
    processes = bench.pick(1, 2)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    return compared(bench, "ddp", launcher, "--per_device_train_batch_size", str(128 // processes))


def fsdp2(bench: Bench) -> dict[str, Any]:
    """One process by the shipped recipe; on a CPU Accelerate leaves FSDP out."""
    recipe = str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml")
    cpu = ("--cpu",) if bench.device == "cpu" else ()
    launcher = ("-m", "accelerate.commands.launch", "--config_file", recipe, "--num_processes", "1", *cpu)
    return compared(bench, "fsdp2", launcher)


def compared(bench: Bench, name: str, launcher: tuple[str, ...], *flags: str) -> dict[str, Any]:
    """The largest relative difference of the logged losses from those of `digits: pretrain`."""
    run(bench, bench.folder / name, *pretrain_flags(bench), *flags, launcher=launcher)
    mine, plain = metrics(bench.folder / name), metrics(bench.folder / "digits")
    pairs = [(one["loss"], other["loss"]) for one, other in zip(mine, plain, strict=True)]
    return {"loss": mine[-1]["loss"], "largest relative difference": max(abs(one / other - 1) for one, other in pairs)}
