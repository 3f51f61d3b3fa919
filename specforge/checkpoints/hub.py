"""Upload of an export to the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from specforge.errors import SpecforgeError


def push(folder: Path, repository: str) -> str:
    """Upload a folder as a model; the repository is created if needed.

    Args:
        folder: The export, which is kept.
        repository: ``owner/name``.

    Returns:
        URL of the repository.

    Raises:
        SpecforgeError: The upload failed; the local export is complete.
    """
    api = HfApi()
    try:
        api.create_repo(repository, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Draft for speculative decoding")
    except Exception as error:  # the hub, the network and the login fail in different ways
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise SpecforgeError(
            f"{folder} is written, but cannot be uploaded to {repository}: {reason}. Log in with: hf auth login; then "
            f"upload it with: hf upload {repository} {folder}"
        ) from error
    return f"{api.endpoint}/{repository}"
