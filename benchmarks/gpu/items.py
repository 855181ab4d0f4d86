"""Items of a part: what they run on, running them one after the other, and the records that they leave."""

import gc
import json
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.measure import synchronize
from benchmarks.memory import MODELS
from umae.training.hardware import own_state

ROOT = Path(__file__).resolve().parents[2]

TINY = {
    "image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 64, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32,
}  # fmt: skip


def recipe_fields(name: str) -> dict[str, Any]:
    """Fields of UMAEConfig that a recipe sets."""
    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    sizes = {key: recipe[key] for key in ("image_size", "patch_size")}
    return {**sizes, **recipe["config_overrides"]}


@dataclass(frozen=True)
class Bench:
    """What all items run on.

    Args:
        device: `cuda`, or `cpu` for tiny sizes.
        tiny: the same items in sizes that take a CPU seconds.
        folder: for the items' own files.
        images: a folder of photographs, None for made ones.
    """

    device: str
    tiny: bool
    folder: Path
    images: Path | None

    def pick(self, full: Any, tiny: Any) -> Any:
        return tiny if self.tiny else full

    def fields(self, model: str) -> dict[str, Any]:
        """Fields of a model's configuration that differ from ViT-B/16."""
        if self.tiny:
            return TINY
        return recipe_fields("cifar10_tiny") if model == "CIFAR recipe" else MODELS[model]


@dataclass(frozen=True)
class Item:
    """Args:
    run: measures; what it returns is recorded, what it raises as a failure.
    seconds: how long it may take on an H100, generously; it is not started with less time left.
    """

    name: str
    run: Callable[[], dict[str, Any]]
    seconds: float


class Records:
    """A file of JSON lines: the commands that were given, and one line for each item that ended."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.lines = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be half written

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    def commands(self) -> list[str]:
        return list(dict.fromkeys(line["command"] for line in self.lines if "command" in line))

    def of(self, part: str) -> dict[str, dict[str, Any]]:
        """The newest record of every item of a part."""
        return {line["item"]: line for line in self.lines if line.get("part") == part}


def run_items(part: str, items: Iterable[Item], records: Records, device: str, seconds: float) -> None:
    """Run what is not done yet and fits into the time; what failed before comes last."""
    start, before = time.monotonic(), records.of(part)
    todo = [item for item in items if before.get(item.name, {}).get("status") != "done"]
    for item in sorted(todo, key=lambda item: item.name in before):
        if time.monotonic() - start + item.seconds > seconds:
            continue
        print(f"{part}: {item.name} ...", flush=True)
        record = outcome(item.run)
        print(f"    {record['status']} in {record['seconds']:.1f} s", flush=True)
        records.add({"part": part, "item": item.name, **record})
        clean_up(device)


def outcome(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The record of a call: its result, or the traceback of what it raised."""
    start = time.perf_counter()
    try:
        with own_state():
            record = {"status": "done", "result": run()}
    except Exception:  # whatever it is, the next item shall run
        record = {"status": "failed", "error": traceback.format_exc()}
    now = datetime.now().isoformat(timespec="seconds")
    return {**record, "seconds": round(time.perf_counter() - start, 2), "date": now}


def clean_up(device: str) -> None:
    """Let go of memory and compiled code, which would change what the next item measures.

    Raises:
        SystemExit: the last item broke the device's state, which only a new process repairs.
    """
    gc.collect()
    torch._dynamo.reset()
    try:
        synchronize(device)
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    except RuntimeError as error:
        raise SystemExit(f"the device does not answer any more ({error}); start the same command again") from error
