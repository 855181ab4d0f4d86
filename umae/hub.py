"""Share a run folder on the Hugging Face Hub. Who one is there, huggingface_hub knows; no token passes through here."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

# Checkpoints of a run in progress, its optimiser, and local logs stay at home.
STAYS_HOME = ["step-*", "*.tmp", "*.tmp/*", "logs/*", "run.json", "run.lock", ".*"]


def check_access(repo_id: str) -> None:
    """Create the model repository, or see that it is there; called before training, not after.

    Raises:
        ValueError: nobody is logged in, or may not write there, or the Hub does not answer.
    """
    try:
        HfApi().create_repo(repo_id, exist_ok=True)
    except (LocalTokenNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"cannot write to {repo_id} on the Hub: {error}. Log in with `hf auth login`") from error


def push_folder(folder: Path, repo_id: str) -> str:
    """Upload a run folder in one commit; returns the repository's address."""
    api = HfApi()
    api.create_repo(repo_id, exist_ok=True)
    api.upload_folder(
        repo_id=repo_id, folder_path=folder, ignore_patterns=STAYS_HOME, commit_message="Upload U-MAE model"
    )
    return f"{api.endpoint}/{repo_id}"
