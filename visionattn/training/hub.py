"""The best model of a run on the Hugging Face hub, through the hub's own library."""

import textwrap
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id


def check_hub(repository: str) -> None:
    """Raises ValueError where `repository` is no USER/NAME or nobody is logged in; asks the hub nothing."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"push_to_hub is {repository!r}, wanted USER/NAME: {error}") from error
    if "/" not in repository:
        raise ValueError(f"push_to_hub is {repository!r}, wanted USER/NAME")
    if get_token() is None:
        raise ValueError(f"push_to_hub={repository} needs a login, wanted `hf auth login` or the variable HF_TOKEN")


def push(folder: Path, repository: str) -> str:
    """Uploads what `folder` holds, to a new private repository where there is none yet.

    Returns:
        What happened. Nothing is raised: the training is done, and its files lie in `folder`.
    """
    try:
        api = HfApi(library_name="visionattn")
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Add the best model of a training")
    except Exception as error:  # network, rights, quota: whatever it is, a trained model outweighs it
        reason = textwrap.shorten(str(error), 200) or type(error).__name__
        return f"warning: cannot push to {repository}: {reason}; the model is in {folder}, resume=true tries again"
    return f"pushed to {repository} on the Hugging Face hub"
