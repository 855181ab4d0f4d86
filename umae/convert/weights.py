"""The tensors of a checkpoint's files, checked; the one module that opens pickles."""

import argparse
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a file, safetensors or a pickle by `torch.save`, and the settings that a pickle may contain.

    No code in a pickle is run. Of the original's settings, `argparse.Namespace`, only plain values are read.

    Raises:
        ValueError: the file cannot be read; it is a pickle that asks for more than tensors and plain values (the
            message names it); a key is no name of a tensor; a tensor is empty or holds NaN or infinite values.
    """
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = _wanted_global(path, error)
        if wanted is None:
            raise ValueError(f"{path} is no checkpoint: neither safetensors nor written by torch.save") from error
        raise ValueError(
            f"{path} was not opened: it is a pickle that asks for {wanted}, which could run code. Ask its author for "
            f"safetensors; there is no flag that opens it"
        ) from error
    except (OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, struct.error,
            SafetensorError) as error:  # fmt: skip  # the errors of damaged files
        raise ValueError(f"{path} cannot be read: {type(error).__name__} {error}; expected a checkpoint") from error
    settings = getattr(content.get("args"), "__dict__", {}) if isinstance(content, dict) else {}
    tensors = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError(f"{path} holds a {type(tensors).__name__}, expected tensors by their names")
    _check_tensors(path, tensors)
    return tensors, settings


def _wanted_global(path: Path, error: pickle.UnpicklingError) -> str | None:
    """The global that a pickle asks for and torch does not allow: `posix.system`; None if there is none."""
    if named := re.search(r"GLOBAL (\S+)", str(error)):
        return named[1]
    words: list[str] = []  # protocol 4, which torch does not read, puts module and name on the stack
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                stream = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        else:
            stream = path.read_bytes()
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STACK_GLOBAL":
                return ".".join(words[-2:])
            words += [argument] if isinstance(argument, str) else []
    except (ValueError, StopIteration):
        pass
    return None


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized


def _check_tensors(path: Path, tensors: dict) -> None:
    """Raise `ValueError`, with the first five keys, where keys are no names or values no finite, complete tensors."""

    def is_short(tensor: torch.Tensor) -> bool:  # strides of 0: one number, expanded to a billion
        return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()

    def is_name(key: object) -> bool:
        return isinstance(key, str) and re.fullmatch(r"\w+(\.\w+)*", key, re.ASCII) is not None

    problems = {
        "keys that are no names of tensors": [key for key in tensors if not is_name(key)],
        "values that are no tensors": [key for key, value in tensors.items() if not _is_plain(value)],
    }
    if not any(problems.values()):
        problems["tensors that are empty"] = [key for key, value in tensors.items() if value.numel() == 0]
        short = [key for key, value in tensors.items() if is_short(value)]
        problems["tensors that are larger than what is stored"] = short
        problems["tensors with NaN or infinite values"] = [
            key for key, value in tensors.items() if key not in short and not value.isfinite().all()
        ]
    wrong_keys = "; ".join(f"{problem}: {first_five(keys)}" for problem, keys in problems.items() if keys)
    if wrong_keys:
        raise ValueError(f"{path} is no valid checkpoint; {wrong_keys}")


def first_five(names: Collection[object]) -> str:
    first_names = ", ".join(sorted(f"{name!s:.80}" for name in names)[:5])
    return first_names + (f" and {len(names) - 5} more" if len(names) > 5 else "")
