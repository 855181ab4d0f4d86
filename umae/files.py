"""Files that are whole whenever they exist: written beside their place, made durable, then renamed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a temporary folder, make its bytes durable, then rename it to `target`."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed here
    temporary.mkdir(parents=True)
    write(temporary)
    for path in [*temporary.rglob("*"), temporary]:
        _fsync(path)
    if target.exists():  # the same step again: the same content, so it may go first
        shutil.rmtree(target)
    os.rename(temporary, target)
    _fsync(target.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    _fsync(temporary)
    os.replace(temporary, path)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], identity: dict[str, Any]) -> None:
    """Replace a file of tensors atomically; `identity` says what they are the state of."""
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata={"identity": json.dumps(identity, sort_keys=True)})
    _fsync(temporary)
    os.replace(temporary, path)


def read_tensors(path: Path, identity: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What `write_tensors` wrote, on the CPU; raises `ValueError` if it is damaged, or the state of something else."""
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {}).get("identity", "{}"))
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and the same command starts anew") from error
    expected = json.loads(json.dumps(identity))
    if found != expected:
        names = [name for name in expected if found.get(name) != expected[name]]
        raise ValueError(
            f"{path} is half of the same work with other {', '.join(names)}; start it as before, delete the file, or "
            f"give another output_dir"
        )
    return tensors


def copy_file(source: Path, target: Path) -> None:
    """Replace a file by a copy of another, atomically."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.copyfile(source, temporary)
    _fsync(temporary)
    os.replace(temporary, target)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
