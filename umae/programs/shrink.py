"""Copy a folder of images with the large ones made smaller, which loads faster."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch.utils.data import DataLoader

from arguments_umae import PROGRAMS, ShrinkArguments
from image_processing_umae import UnreadableImage
from umae.data.folders import IMAGE_ENDINGS, files_in
from umae.data.shrinking import QUALITY, ShrunkFiles
from umae.files import copy_file, write_bytes
from umae.programs.keywords import keywords
from umae.progress_bar import progress_bar
from umae.training.hardware import usable_cores

RECORD = "shrink.json"  # in `output_dir`: the settings, and at the end what was done
TEMPORARY, LOCK = ".shrink", ".shrink.lock"  # in it, too; hidden files are neither copied nor loaded


@keywords("shrink")
def shrink(**given: Any) -> dict[str, Any]:
    """Copy a folder of images with the large ones resized once: `umae shrink` from Python.

    An image whose shorter side is longer than `shortest_side` pixels is resized to it and written as JPEG, as
    `open_image` reads it: upright, on white, 8 bits. Its name stays, so the order, labels by file name, splits and
    classes do, too; readers look at the content. Other files are copied, hidden ones are not. An image that cannot be
    read is left out. Called again after an interruption it continues, to the same bytes.

    Returns:
        What `shrink.json` in `output_dir` holds: the settings, `images`, `bytes_before` and `bytes_after` of them, and
        `unreadable` (name and reason).

    Raises:
        ValueError: the folder holds no images, or `output_dir` something else.
        OSError: a file cannot be written, or one that is no image cannot be read.
    """
    return run(*PROGRAMS["shrink"][1](given))


def run(args: ShrinkArguments) -> dict[str, Any]:
    """Write the copy that the arguments ask for."""
    folder, output_dir = Path(args.folder), Path(args.output_dir)
    _check_apart(folder, output_dir)
    names = [path.relative_to(folder) for path in files_in(folder)]
    images = [str(name) for name in names if name.suffix.lower() in IMAGE_ENDINGS]
    others = [name for name in names if name.suffix.lower() not in IMAGE_ENDINGS]
    if not images:
        raise ValueError(f"{folder} holds no image files; expected some at any depth ({', '.join(IMAGE_ENDINGS)})")
    settings = {"folder": str(folder.resolve()), "shortest_side": args.shortest_side, "quality": QUALITY}
    _check_settings(output_dir, settings)
    temporary = output_dir / TEMPORARY
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output_dir / LOCK, timeout=0):
            write_bytes(output_dir / RECORD, _text(settings), temporary / "record")
            unreadable = _shrink_images(ShrunkFiles(folder, output_dir, images, args.shortest_side, temporary))
            for name in others:
                if not (output_dir / name).exists():  # as is the record, if `folder` is a copy itself
                    (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
                    copy_file(folder / name, output_dir / name, temporary / "other")
            written = [name for name in images if name not in unreadable]
            before, after = (sum((top / name).stat().st_size for name in written) for top in (folder, output_dir))
            record = {**settings, "images": len(written), "bytes_before": before, "bytes_after": after}
            record["unreadable"] = unreadable
            write_bytes(output_dir / RECORD, _text(record), temporary / "record")
            shutil.rmtree(temporary)
    except Timeout as error:
        raise ValueError(f"{output_dir} is being written by another process; wait for it") from error
    except KeyboardInterrupt:
        print("stopped; the same command continues")
        raise SystemExit(128 + signal.SIGINT) from None
    print(f"{output_dir}: {len(written):,} images, {before / 1e6:,.1f} MB before and {after / 1e6:,.1f} MB after")
    if unreadable:
        print(f"unreadable and left out: {len(unreadable):,} of {len(images):,} images, named in {output_dir / RECORD}")
    return record


def _shrink_images(files: ShrunkFiles) -> dict[str, str]:
    """Write those that are not there yet, on all cores; the name and the reason of those that cannot be read."""
    missing = [index for index, name in enumerate(files.names) if not (files.output_dir / name).exists()]
    loader = DataLoader(
        files,
        sampler=missing,
        batch_size=None,
        num_workers=min(usable_cores(), len(missing)),
        worker_init_fn=_ignore_interrupt,
        in_order=False,
    )
    done = len(files) - len(missing)
    unreadable = {}
    for name, error in progress_bar(loader, "shrinking", initial=done, total=len(files), unit="image"):
        if isinstance(error, UnreadableImage):
            unreadable[name] = str(error)
        elif error is not None:
            raise error
    return dict(sorted(unreadable.items()))


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C is sent to a worker, too, but it ends with the main process, at the latest by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _check_apart(folder: Path, output_dir: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give a folder of image files")
    source, target = folder.resolve(), output_dir.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise ValueError(f"output_dir {output_dir} and {folder} lie within each other; give a folder beside it")


def _check_settings(output_dir: Path, settings: dict[str, Any]) -> None:
    """Raise `ValueError` unless `output_dir` is new, empty or begun with these settings."""
    if (output_dir / RECORD).exists():
        before = json.loads((output_dir / RECORD).read_text())
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{output_dir} holds images shrunk with {name} {before.get(name)}, not {value}; give another "
                    f"output_dir"
                )
    elif output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir {output_dir} is a file; give a new or empty folder")
    elif output_dir.exists() and any(not entry.name.startswith(".") for entry in output_dir.iterdir()):
        raise ValueError(f"{output_dir} is not empty and holds no {RECORD}; give a new or empty folder as output_dir")


def _text(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()
