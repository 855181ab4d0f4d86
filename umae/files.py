"""Atomic writes: to a temporary file or folder beside the target, flushed to disk (fsync), then renamed."""

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
    """Have `write` fill a temporary folder, flush it to disk, then rename it to `target`."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed while writing
    temporary.mkdir(parents=True)
    write(temporary)
    for path in [*temporary.rglob("*"), temporary]:
        _fsync(path)
    if target.exists():  # from the same step, with the same content, so it can be removed first
        shutil.rmtree(target)
    os.rename(temporary, target)
    _fsync(target.parent)


def write_file(target: Path, write: Callable[[Path], object], temporary: Path | None = None) -> None:
    """Have `write` make a temporary file, flush it to disk, then rename it to `target`.

    Args:
        temporary: its path, on the same file system; by default beside the target, for one process at a time.
    """
    temporary = temporary or target.with_name(target.name + ".tmp")
    try:
        write(temporary)
        _fsync(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, target)


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    write_file(path, lambda temporary: temporary.write_text(text))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], identity: dict[str, Any]) -> None:
    """Replace a file of tensors atomically; `identity`, JSON values, says which work they belong to."""
    metadata = {"identity": json.dumps(identity, sort_keys=True)}
    write_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def read_tensors(path: Path, identity: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of `write_tensors`, on the CPU; raises `ValueError` if damaged, or of another identity."""
    try:
        with safe_open(path, "pt") as file:
            stored = json.loads((file.metadata() or {}).get("identity", "{}"))
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run the same command again") from error
    expected = json.loads(json.dumps(identity))
    if stored != expected:
        names = [name for name in expected if stored.get(name) != expected[name]]
        raise ValueError(
            f"{path} belongs to a run with other {', '.join(names)}; use the same ones, delete the file, or give "
            f"another output_dir"
        )
    return tensors


def copy_file(source: Path, target: Path, temporary: Path | None = None) -> None:
    """Replace a file by a copy of another, atomically; `temporary` as of `write_file`."""
    write_file(target, lambda path: shutil.copyfile(source, path), temporary)


def write_bytes(target: Path, content: bytes, temporary: Path) -> None:
    """Replace a file atomically, by way of `temporary`, a path on the same file system that no other process uses."""
    write_file(target, lambda path: path.write_bytes(content), temporary)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
