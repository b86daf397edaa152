"""Uploading an export to the Hugging Face hub, through huggingface_hub (extra `hub`)."""

import pathlib
import re

from sae_jax.errors import UserError


def check(repo: str) -> None:
    """What can be known before anything is written. UserError where `push` could not work."""
    _import()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"--push_to={repo} is no name on the hub; write --push_to=user/name")


def push(directory: pathlib.Path, repo: str, public: bool = False) -> str:
    """Uploads the folder's content to the model repository `repo`; returns its address. Where it
    is not there it is made, private unless `public`; one that is stays as visible as it is.

    UserError in one line where the hub refuses or cannot be reached; the folder stays."""
    api = _import().HfApi()
    try:
        url = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=directory,
            commit_message="sae-jax export",
            ignore_patterns=[".*", "**/.*"],  # what an export that was stopped left
        )
    except Exception as error:  # its own classes, and requests' or httpx's, as its version goes
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise UserError(
            f"the hub did not take {directory} as {repo}: {reason}. The folder is written; to try "
            f"again: sae-jax export --out={directory} --push_to={repo}"
        ) from error
    return str(url)


def _import():
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            '--push_to needs the package huggingface_hub: pip install "sae-jax[hub]"'
        ) from None
    return huggingface_hub
