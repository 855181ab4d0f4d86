"""Share a folder on the Hugging Face Hub. Who one is there, huggingface_hub knows; no token passes through here.

umae push runs/mine name/model
"""

import argparse
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

# What of a folder is for others. Checkpoints, optimiser, lock, logs and whatever else lies there stay at home.
PUBLISHED = (
    "model*.safetensors", "model.safetensors.index.json", "config.json", "preprocessor_config.json",
    "configuration_umae.py", "modeling_umae.py", "image_processing_umae.py", "README.md", "metrics.jsonl",
    "linear_probe.json", "finetune.json", "curve.png", "spectrum.png", "spectrum.json", "reconstructions.png",
    "progress.png", "neighbours.png", "attention.png",
)  # fmt: skip
WAITS = (1, 4, 16, 60)  # seconds before another attempt, where the Hub is down, slow or asks for patience
TIMEOUT = 60  # seconds without a byte
_TransportError = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")  # httpx's or httpx2's
_REFUSALS = (LocalTokenNotFoundError, HFValidationError, _TransportError, OSError)


def check_access(repo_id: str, private: bool = False) -> str:
    """Create the model repository, or see that it is there; called before training, not after.

    Returns:
        The repository's whole name: `name/model`.

    Raises:
        ValueError: nobody is logged in, or may not write there, or the Hub does not answer.
    """
    try:
        return _patiently(HfApi().create_repo, repo_id, private=private or None, exist_ok=True).repo_id
    except _REFUSALS as error:
        raise ValueError(
            f"cannot write to {repo_id} on the Hub: {_one_line(error)}. Log in with `hf auth login`"
        ) from error


def push(files: Mapping[str, Path | bytes], repo_id: str, message: str, tag: str | None = None) -> str:
    """Put files into a repository that exists, in one commit: all of them become visible, or none.

    Args:
        files: what they are called there, and a path or the content.
        tag: a name for the state after this commit, for `from_pretrained(..., revision=tag)`.

    Returns:
        The repository's address.

    Raises:
        ValueError: the Hub refuses, or has not answered in all attempts.
    """
    api = HfApi()
    contents = {name: str(file) if isinstance(file, Path) else file for name, file in files.items()}
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    try:
        commit = _patiently(api.create_commit, repo_id, operations, commit_message=message)
        if tag is not None:
            _patiently(api.create_tag, repo_id, tag=tag, revision=commit.oid, exist_ok=True)
    except _REFUSALS as error:
        raise ValueError(f"cannot push to {repo_id}: {_one_line(error)}") from error
    return f"{api.endpoint}/{repo_id}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def published(folder: Path) -> dict[str, Path]:
    """What of a run's or a probe's folder is for others, by name.

    Raises:
        ValueError: the folder holds no finished model.
    """
    if not (folder / "model.safetensors").exists():
        raise ValueError(f"{folder} holds no model.safetensors; give the folder of a finished run")
    return {path.name: path for pattern in PUBLISHED for path in sorted(folder.glob(pattern))}


def push_finished(folder: Path, repo_id: str) -> None:
    """Push the folder of a run that has ended; a refusal says that it stands, and how to try again."""
    try:
        print("pushed to", push(published(folder), repo_id, "Upload U-MAE model"))
    except ValueError as error:
        raise ValueError(
            f"{folder} is finished and whole, but {error}. To try again: `umae push {folder} {repo_id}`"
        ) from error


def _patiently(call: Callable, *args, **kwargs) -> Any:
    """`call`, again and again where the Hub is down or busy; huggingface_hub repeats some of its requests only."""
    get_session().timeout = TIMEOUT  # by default there is none
    for wait in (*WAITS, None):
        try:
            return call(*args, **kwargs)
        except (_TransportError, OSError) as error:
            response = getattr(error, "response", None)
            status = getattr(response, "status_code", None)
            if wait is None or (status is not None and status < 500 and status not in (408, 429)):
                raise
            asked = response.headers.get("Retry-After", "") if status is not None else ""
            time.sleep(max(wait, min(int(asked), 300)) if asked.isdecimal() else wait)


class BackgroundPush:
    """Pushes while training continues: one at a time, what comes meanwhile is left out, and a failure is only told.

    What is being pushed may be removed meanwhile: until the push has ended it is also in `folder/push-*.tmp`, which is
    removed then, or by the next run where this one is killed.
    """

    def __init__(self, repo_id: str, folder: Path, log: Callable[[str], None]):
        self.repo_id, self.folder, self.log, self.thread = repo_id, folder, log, None

    def start(self, files: Mapping[str, Path | bytes], message: str, tag: str) -> None:
        """Push, unless the push before is still under way."""
        if self.thread is not None and self.thread.is_alive():
            return
        try:
            kept = tempfile.TemporaryDirectory(
                prefix="push-", suffix=".tmp", dir=self.folder, ignore_cleanup_errors=True
            )
            files = {name: _keep(file, Path(kept.name) / name) for name, file in files.items()}
        except OSError as error:
            self._failed(tag, error)
            return
        self.thread = threading.Thread(target=self._push, args=(kept, files, message, tag), daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until the push that is under way, if any, has ended."""
        if self.thread is not None:
            self.thread.join()

    def _push(
        self, kept: tempfile.TemporaryDirectory, files: Mapping[str, Path | bytes], message: str, tag: str
    ) -> None:
        with kept:
            try:
                push(files, self.repo_id, message, tag)
            except ValueError as error:
                self._failed(tag, error)

    def _failed(self, tag: str, error: Exception) -> None:
        self.log(f"{tag} is not on the Hub ({error}); training continues")


def _keep(file: Path | bytes, target: Path) -> Path | bytes:
    """The file under another name that stays when the first is removed; a copy where the disk has no hard links."""
    if isinstance(file, bytes):
        return file
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
    return target


def main(argv: Sequence[str]) -> None:
    """Put the folder of a finished run, or of a probe, on the Hugging Face Hub. Log in first: `hf auth login`."""
    parser = argparse.ArgumentParser(prog="umae push", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="folder of a finished run, or of a probe")
    parser.add_argument("repo_id", help="repository to push to: `name/model`")
    parser.add_argument("--private", action="store_true", help="a repository that is made is private")
    parser.add_argument("--dry_run", action="store_true", help="list the files and show the card; nothing is sent")
    arguments = parser.parse_args(argv)
    files = published(arguments.folder)
    for name, path in files.items():
        print(f"{path.stat().st_size / 1e6:10.2f} MB  {name}")
    if arguments.dry_run:
        print(f"\n{files['README.md'].read_text() if 'README.md' in files else 'no card'}")
        return
    repo_id = check_access(arguments.repo_id, arguments.private)
    print("pushed to", push(files, repo_id, "Upload U-MAE model"))
