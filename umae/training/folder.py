"""A run folder: what it is a run of, whether it may be continued, and who trains in it."""

import json
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from transformers import PreTrainedModel

import modeling_umae
from configuration_umae import UMAEConfig
from umae.data.inputs import IMAGENET_MEAN, IMAGENET_STD
from umae.files import write_text
from umae.training.checkpoints import clear_leftovers, newest_whole

RUN_FILE = "run.json"
LOCK_FILE = "run.lock"
METRICS_FILE = "metrics.jsonl"
# Of `run.json`, by a run that is continued
KEPT = ("seconds", "unreadable", "unreadable_test", "eval_steps", "untrained_ranks", "collapsed_at", "finished")
# Of an identity, what changes when a finished run is made longer
OF_LENGTH = ("total_steps", "warmup_steps", "extended_at")
# Of pre-training; the identities of older runs do not name them
USUAL_CROPS = {"min_crop_scale": 0.2, "horizontal_flip": 0.5, "vertical_flip": 0.0}
USUAL_INPUTS = {"intensity_range": "full", "image_mean": [*IMAGENET_MEAN], "image_std": [*IMAGENET_STD]}


@dataclass(frozen=True)
class Run:
    """A run, finished or not, by its folder."""

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, one dictionary each."""
        return [json.loads(line) for line in (self.folder / METRICS_FILE).read_text().splitlines()]

    def model(self) -> PreTrainedModel:
        """The trained model, in evaluation mode on the CPU: `UMAEForPreTraining`, or the classifier."""
        config = UMAEConfig.from_pretrained(self.folder)
        (name,) = config.architectures or ["UMAEForPreTraining"]
        return getattr(modeling_umae, name).from_pretrained(self.folder, config=config).eval()


def open_run(accelerator: Accelerator, folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Start a run in a new or empty folder, or take up the one that it holds; nothing is written yet.

    Args:
        identity: what must stay the same when a run is continued: data, model, seed, batch, schedule, precision.

    Returns:
        What `run.json` holds: `identity`, `hardware`, `versions`, `seconds` of training so far,
        `unreadable` images (index and reason), `finished`.

    Raises:
        ValueError: the folder holds something else, or a run with another identity.
    """
    identity = json.loads(json.dumps(identity))  # as it will be read back
    run = {
        "identity": identity,
        "hardware": f"{accelerator.num_processes} x {_device_name(accelerator.device)}",
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")},
        "seconds": 0.0,
        "unreadable": {},
        "finished": False,
    }
    if (folder / RUN_FILE).exists():
        before = json.loads((folder / RUN_FILE).read_text())
        extends = before["finished"] and identity.get("extended_at") == before["identity"]["total_steps"]
        lengths = {name: identity[name] for name in OF_LENGTH if extends}
        _check_identity(folder, before["identity"] | lengths, identity)
        run |= {name: before[name] for name in KEPT if name in before}
        run["finished"] = before["finished"] and not extends
    elif folder.exists() and (not folder.is_dir() or any(entry.name != LOCK_FILE for entry in folder.iterdir())):
        content = "is not empty and holds no run" if folder.is_dir() else "is a file"
        raise ValueError(f"{folder} {content}; give a new or empty folder as output_dir")
    return run


def length_before(folder: Path, total_steps: int) -> int:
    """The length of the run in a folder before it is, or was, made longer to `total_steps`.

    Raises:
        ValueError: there is no run, it is not finished, or it is longer already.
    """
    if not (folder / RUN_FILE).exists():
        raise ValueError(f"extend_to: {folder} holds no run; leave it out to start one")
    run = json.loads((folder / RUN_FILE).read_text())
    length = run["identity"]["total_steps"]
    if length == total_steps and run["identity"].get("extended_at"):
        return run["identity"]["extended_at"]
    if not run["finished"]:
        raise ValueError(f"extend_to: the run in {folder} is not finished; finish it first, by the same command alone")
    if length >= total_steps:
        raise ValueError(f"extend_to: the run in {folder} has {length:,} steps, not fewer than {total_steps:,}")
    return length


@contextmanager
def hold_folder(accelerator: Accelerator, folder: Path, run: dict[str, Any]) -> Iterator[None]:
    """Make the folder this run's for a while; raises `ValueError` if another process trains in it."""
    accelerator.wait_for_everyone()  # no process may read the folder after the main one has begun to write
    if not accelerator.is_main_process:
        yield
        return
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(folder))
            clear_leftovers(folder)
            write_run(folder, run)
        except OSError as error:
            raise ValueError(f"cannot write to {folder}: {error}; give another output_dir") from error
        yield


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Replace `run.json`."""
    write_text(folder / RUN_FILE, json.dumps(run, indent=2) + "\n")


def newest_checkpoint(accelerator: Accelerator, folder: Path) -> Path | None:
    """The checkpoint to continue from, as the main process sees it; damaged ones are named and put aside.

    Raises:
        ValueError: a process does not see it.
    """
    newest: list[Path | None] = [None]
    if accelerator.is_main_process:
        newest[0], damaged = newest_whole(folder)
        for checkpoint in damaged:
            print(
                f"{checkpoint} is damaged: its files are not those that were written; put aside as {checkpoint}.damaged"
            )
            checkpoint.rename(f"{checkpoint}.damaged")
    (checkpoint,) = broadcast_object_list(newest)
    if checkpoint is not None and not checkpoint.is_dir():
        raise ValueError(
            f"process {accelerator.process_index} does not see {checkpoint}; output_dir must lie where all see it"
        )
    return checkpoint


def _check_identity(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    # Of what is younger than a run
    defaults = UMAEConfig().to_dict() | USUAL_CROPS | USUAL_INPUTS | {"extended_at": 0}
    old, new = ({**defaults, **identity, **identity["config"], "config": None} for identity in (before, now))
    for name, value in new.items():
        if old.get(name) != value:
            raise ValueError(
                f"{folder} holds a run with {name} {old.get(name)}, not {value}; use another output_dir (and "
                f"model_name_or_path {folder} to start from its weights)"
            )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type.upper()} ({platform.machine()})"


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process. The system lets go of it when the process ends, however it ends.

    The file that is left behind holds nothing: only the system's lock on it counts. Over NFS another machine sees that
    lock if the mount passes it on to the server: version 4, or version 3 without `nolock` or `local_lock`.

    Raises:
        ValueError: another process holds it.
    """
    held = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        held.acquire()
    except Timeout as error:
        raise ValueError(
            f"{folder} is being trained by another process; wait for it, or use another output_dir"
        ) from error
    try:
        yield
    finally:
        held.release()
