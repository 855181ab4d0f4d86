"""Checkpoints as folders: written beside, made durable, renamed into place; only then are older ones removed.

A folder is the unit. `step-N/` is a model that `from_pretrained` loads, plus what training needs to continue. Whatever
moment a process is killed at, the newest `step-N/` is whole; what a disk does to it later is seen by its checksums.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from umae.files import copy_file, write_folder

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer_state.json"
CHECKSUMS_FILE = "checksums.json"
ONLY_FOR_TRAINING = (OPTIMIZER_FILE, STATE_FILE, CHECKSUMS_FILE)  # of a checkpoint's files
_WHOLE = StateDictOptions(full_state_dict=True)  # not one process' shard of it
_WHOLE_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on the main process; empty on the others


class Writer:
    """Writes checkpoints in a thread, one after the other, so that training goes on meanwhile."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._pool.shutdown()  # what is being written is completed, whatever has happened beside

    def start(self, write: Callable[[], None]) -> None:
        """Begin to write, once the one before is whole."""
        self.wait()
        self._writing = self._pool.submit(write)

    def wait(self) -> None:
        """Until all is written; raises what has made that fail."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def check(self) -> None:
        """Raise what has made the last one fail, if it has."""
        if self._writing is not None and self._writing.done():
            self.wait()


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the whole checkpoints in a run folder, ascending."""
    matches = (re.fullmatch(r"step-(\d+)", entry.name) for entry in folder.glob("step-*") if entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def save_checkpoint(folder: Path, step: int, write: Callable[[Path], None], keep: int, size: int = 0) -> Path:
    """Write `folder/step-N` atomically and remove all but the newest `keep` checkpoints.

    Args:
        write: fills an empty folder with the checkpoint's files.
        size: about how many bytes that will be.

    Raises:
        ValueError: the disk is full, or does not take the files; the checkpoints before stand as they are.
    """
    target = folder / f"step-{step}"

    def write_with_checksums(temporary: Path) -> None:
        write(temporary)
        (temporary / CHECKSUMS_FILE).write_text(json.dumps(_checksums(temporary), indent=2) + "\n")

    free = shutil.disk_usage(folder).free
    try:
        if free < size:
            raise OSError("the disk is full")
        write_folder(target, write_with_checksums)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(f"{target}.tmp", ignore_errors=True)
        raise ValueError(
            f"cannot save {target} ({error}): it needs {size / 1e6:.0f} MB, {free / 1e6:.0f} MB are free in {folder}. "
            f"Make room and start the same command again"
        ) from error
    for old in checkpoint_steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old}")
    return target


def newest_whole(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint whose files are as they were written (None if there is none), and the damaged newer ones.

    What a killed run left half written (`*.tmp`) is no checkpoint.
    """
    damaged: list[Path] = []
    for step in reversed(checkpoint_steps(folder)):
        checkpoint = folder / f"step-{step}"
        try:
            if json.loads((checkpoint / CHECKSUMS_FILE).read_text()) == _checksums(checkpoint):
                return checkpoint, damaged
        except (OSError, ValueError):
            pass
        damaged.append(checkpoint)
    return None, damaged


def clear_leftovers(folder: Path) -> None:
    """Remove what runs that were killed while they wrote have left behind."""
    for entry in folder.glob("*.tmp"):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def copy_model(checkpoint: Path, folder: Path) -> None:
    """Copy what others can use of a checkpoint to the top of a run folder, file by file."""
    for path in checkpoint.iterdir():
        if path.name not in ONLY_FOR_TRAINING:
            copy_file(path, folder / path.name)


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a checkpoint but that of the checksums."""
    sums = {}
    for path in sorted(folder.iterdir()):
        if path.name != CHECKSUMS_FILE:
            with open(path, "rb") as file:
                sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights on the CPU, by name, whole whatever engine has wrapped or sharded the model.

    Every process calls it; the main one receives the tensors, the others nothing.
    """
    tensors = cast(dict[str, torch.Tensor], get_model_state_dict(model, options=_WHOLE_ON_CPU))
    return {name: tensor.clone() for name, tensor in tensors.items()}  # those of a CPU are the model's own


def restore_model(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `model_tensors` returned; every process has the tensors."""
    set_model_state_dict(model, dict[str, Any](tensors), options=_WHOLE)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """A copy of the optimiser's state on the CPU, by parameter name (`vit.layernorm.weight/exp_avg`).

    Every process calls it; the main one receives the tensors, the others nothing.
    """
    state = cast(dict[str, Any], get_optimizer_state_dict(model, optimizer, options=_WHOLE_ON_CPU).get("state", {}))
    tensors = ((f"{name}/{key}", tensor) for name, values in state.items() for key, tensor in values.items())
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors}


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` returned. Raises `ValueError` where names or shapes do not fit."""
    current = cast(dict[str, Any], get_optimizer_state_dict(model, optimizer, options=_WHOLE))
    state: dict[str, Any] = {}
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition("/")
        state.setdefault(name, {})[moment] = tensor
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {name.removeprefix("module.") for name in expected}  # DistributedDataParallel's own prefix
    if set(state) != expected:
        wrong = sorted(set(state) ^ expected)[:5]
        raise ValueError(f"the optimiser state does not belong to this model; it differs in {', '.join(wrong)}")
    set_optimizer_state_dict(model, optimizer, {**current, "state": state}, options=_WHOLE)


def write_training_state(folder: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """The part of a checkpoint that only training needs: tensors, and a few plain values."""
    save_file(tensors, folder / OPTIMIZER_FILE)
    (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")


def read_training_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `write_training_state` wrote."""
    return load_file(folder / OPTIMIZER_FILE), json.loads((folder / STATE_FILE).read_text())
