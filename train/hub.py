"""Putting a folder on the Hugging Face Hub, as a private repository that its owner may open."""

from pathlib import Path

from skipit.router.checkpoint import OLD_GATES_FILE
from skipit.router.errors import CheckpointError, InputError, short


def check_repository(repository: str) -> None:
    """Refuse what cannot be the name of a repository, before any work is done for it.

    Raises:
        InputError: not of the form name or owner/name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"`--push-to-hub`: got {short(repository)}, expected owner/name: {error}") from error


def push(folder: str | Path, repository: str) -> str:
    """Upload a checkpoint. A new repository is private; who may see an existing one stays as it is.

    Args:
        folder: made by `skipit export`.
        repository: owner/name.

    Returns:
        Its address.

    Raises:
        CheckpointError: the Hub refuses or cannot be reached; the folder stays.
    """
    import huggingface_hub

    hub = huggingface_hub.HfApi(library_name="skipit")
    try:
        address = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload a checkpoint made by skipit",
            delete_patterns=[OLD_GATES_FILE],  # of an older format, which no engine could load
        )
    except Exception as error:  # of names, of permissions, of the network
        raise CheckpointError(
            f"{folder} is written, but not uploaded to {repository}: {error}\n"
            f"Log in with `hf auth login`, then: hf upload {repository} {folder}"
        ) from error
    return str(address)
