"""Share a folder on the Hugging Face Hub. huggingface_hub handles the login; no token passes through this module.

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

from huggingface_hub import CommitOperationAdd, HfApi, get_session, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from umae.sharing import notebook

# The files of a folder that are published. Checkpoints, optimiser states, locks, logs and all others are not
PUBLISHED = (
    "model*.safetensors", "model.safetensors.index.json", "config.json", "preprocessor_config.json",
    "configuration_umae.py", "modeling_umae.py", "image_processing_umae.py", "README.md", "metrics.jsonl",
    "linear_probe.json", "finetune.json", "curve.png", "spectrum.png", "spectrum.json", "reconstructions.png",
    "progress.png", "neighbours.png", "attention.png", notebook.NAME,
)  # fmt: skip
WAITS = (1, 4, 16, 60)  # seconds before the next attempt, if the Hub is down, slow or asks to retry later
TIMEOUT = 60  # seconds without a byte
# HTTPError of httpx or httpx2
_TransportError: type[Exception] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
_REFUSALS = (LocalTokenNotFoundError, HFValidationError, _TransportError, OSError)


def check_access(repo_id: str, private: bool = False, space_sdk: str | None = None) -> str:
    """Create the model repository unless it exists; called before training, so that a refusal comes early.

    Args:
        space_sdk: `gradio` for a Space instead of a model.

    Returns:
        The repository's full name: `name/model`.

    Raises:
        ValueError: not logged in, no write access, or the Hub does not answer.
    """
    kind = {} if space_sdk is None else {"repo_type": "space", "space_sdk": space_sdk}
    try:
        return _patiently(HfApi().create_repo, repo_id, private=private or None, exist_ok=True, **kind).repo_id
    except _REFUSALS as error:
        raise ValueError(
            f"cannot write to {repo_id} on the Hub: {_one_line(error)}. Log in with `hf auth login`"
        ) from error


def push(
    files: Mapping[str, Path | bytes], repo_id: str, message: str, tag: str | None = None, repo_type: str = "model"
) -> str:
    """Commit files to an existing repository, in one commit: all of them become visible, or none.

    Args:
        files: by name in the repository, a path or the content.
        tag: a tag for this commit, for `from_pretrained(..., revision=tag)`.
        repo_type: `model` or `space`.

    Returns:
        The repository's URL.

    Raises:
        ValueError: the Hub refuses, or did not answer at any attempt.
    """
    api = HfApi()
    contents = {name: str(file) if isinstance(file, Path) else file for name, file in files.items()}
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    try:
        commit = _patiently(api.create_commit, repo_id, operations, commit_message=message, repo_type=repo_type)
        if tag is not None:
            _patiently(api.create_tag, repo_id, tag=tag, revision=commit.oid, exist_ok=True)
    except _REFUSALS as error:
        raise ValueError(f"cannot push to {repo_id}: {_one_line(error)}") from error
    return f"{api.endpoint}/{'' if repo_type == 'model' else 'spaces/'}{repo_id}"


def read_card(repo_id: str) -> str:
    """The card of a model on the Hub.

    Raises:
        ValueError: there is no such model or card, or the Hub does not answer.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:  # a Hub that does not answer is not replaced by the cache
            return Path(_patiently(hf_hub_download, repo_id, "README.md", local_dir=folder)).read_text()
    except _REFUSALS as error:
        raise ValueError(f"cannot read the card of {repo_id} on the Hub: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def published(folder: Path, repo_id: str) -> dict[str, Path | bytes]:
    """The files of a run's or a probe's folder that are published, by name.

    Args:
        repo_id: that they are for, the name of the model in its notebook.

    Raises:
        ValueError: the folder holds no finished model.
    """
    if not (folder / "model.safetensors").exists():
        raise ValueError(f"{folder} holds no model.safetensors; give the folder of a finished run")
    files: dict[str, Path | bytes] = {path.name: path for name in PUBLISHED for path in sorted(folder.glob(name))}
    if notebook.NAME in files:
        files[notebook.NAME] = notebook.model_notebook(repo_id).encode()
    return files


def push_finished(folder: Path, repo_id: str) -> None:
    """Push the folder of a finished run; the error message of a failed push gives the command that repeats it."""
    try:
        print("pushed to", push(published(folder, repo_id), repo_id, "Upload U-MAE model"))
    except ValueError as error:
        raise ValueError(
            f"{folder} is finished and whole, but {error}. To try again: `umae push {folder} {repo_id}`"
        ) from error


def _patiently(call: Callable, *args, **kwargs) -> Any:
    """`call`, repeated while the Hub is down or busy; huggingface_hub itself repeats only some requests."""
    get_session().timeout = TIMEOUT  # there is none by default
    for wait in (*WAITS, None):
        try:
            return call(*args, **kwargs)
        except (_TransportError, OSError) as error:
            response = getattr(error, "response", None)
            status = getattr(response, "status_code", None)
            if wait is None or (status is not None and status < 500 and status not in (408, 429)):
                raise
            retry_after = response.headers.get("Retry-After", "") if response is not None else ""
            time.sleep(max(wait, min(int(retry_after), 300)) if retry_after.isdecimal() else wait)


class BackgroundPush:
    """Pushes while training continues: one at a time, pushes requested meanwhile are skipped, failures only logged.

    The files may be removed during the push: it uses links or copies of them in `folder/push-*.tmp`, which is removed
    after the push, or by the next run if this one is killed.
    """

    def __init__(self, repo_id: str, folder: Path, log: Callable[[str], None]):
        self.repo_id, self.folder, self.log = repo_id, folder, log
        self.thread: threading.Thread | None = None

    def start(self, files: Mapping[str, Path | bytes], message: str, tag: str) -> None:
        """Push, unless the previous push is still running."""
        if self.thread is not None and self.thread.is_alive():
            return
        try:
            copies = tempfile.TemporaryDirectory(
                prefix="push-", suffix=".tmp", dir=self.folder, ignore_cleanup_errors=True
            )
            files = {name: _link_or_copy(file, Path(copies.name) / name) for name, file in files.items()}
        except OSError as error:
            self._failed(tag, error)
            return
        self.thread = threading.Thread(target=self._push, args=(copies, files, message, tag), daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Wait until the running push, if any, has ended."""
        if self.thread is not None:
            self.thread.join()

    def _push(
        self, copies: tempfile.TemporaryDirectory, files: Mapping[str, Path | bytes], message: str, tag: str
    ) -> None:
        with copies:
            try:
                push(files, self.repo_id, message, tag)
            except ValueError as error:
                self._failed(tag, error)

    def _failed(self, tag: str, error: Exception) -> None:
        self.log(f"{tag} is not on the Hub ({error}); training continues")


def _link_or_copy(file: Path | bytes, target: Path) -> Path | bytes:
    """Link the file to `target`, so that it outlives the original; copy it if the disk has no hard links."""
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
    parser.add_argument("--private", action="store_true", help="if the repository is new, make it private")
    parser.add_argument("--dry_run", action="store_true", help="list the files and show the card, without pushing")
    args = parser.parse_args(argv)
    for name, file in published(args.folder, args.repo_id).items():
        size = len(file) if isinstance(file, bytes) else file.stat().st_size
        print(f"{size / 1e6:10.2f} MB  {name}")
    if args.dry_run:
        card = args.folder / "README.md"
        print(f"\n{card.read_text() if card.exists() else 'no card'}")
        return
    repo_id = check_access(args.repo_id, args.private)
    print("pushed to", push(published(args.folder, repo_id), repo_id, "Upload U-MAE model"))
