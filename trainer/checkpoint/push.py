"""`--push-to-hub OWNER/NAME`: an exported folder goes to the hub, through its own client."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from configs.errors import ConfigError, EnvironmentProblem, OutputFailed, first_line


def check_push(repo: str) -> None:
    """Check, before hours of exporting, whether a push is possible. Raises ConfigError or EnvironmentProblem."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub {repo}: {first_line(error)}; give OWNER/NAME") from None
    if constants.HF_HUB_OFFLINE:
        raise EnvironmentProblem(f"--push-to-hub {repo}: HF_HUB_OFFLINE is set; unset it, or push later with hf upload")
    if get_token() is None:
        raise EnvironmentProblem(f"--push-to-hub {repo}: there is no token; run hf auth login, or set HF_TOKEN")


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Create the repository if needed, and upload the folder in one commit. Returns its address.

    Raises OutputFailed; the folder stays.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by python -m trainer"))
    except Exception as error:  # of the hub, of its client, of the network below
        raise OutputFailed(
            f"--push-to-hub {repo}: the hub did not take it ({first_line(error)}); {folder} is written: push it later"
            f" with hf upload {repo} {folder}"
        ) from None
