"""Downloads from the Hugging Face hub, by names such as hf://org/repository, and uploads to it.

A name is `hf://org/repository[@revision][/folder]`. The revision is a branch, a tag or a commit,
with %2F for a slash in it; without one it is the repository's main branch.

Everything here goes through the package huggingface_hub (extra `hub`), which obeys HF_ENDPOINT,
HF_HOME, HF_HUB_OFFLINE and HF_TOKEN. It reads most of them when it is first imported, so they are
set before Python starts. What is downloaded is data only: nothing here runs a file of a repository.
"""

import contextlib
import dataclasses
import glob
import pathlib
import re
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence

from absl import logging

from sae_jax.errors import UserError, nearest, some

SCHEME = "hf://"

_LOG_AFTER = 2.0  # seconds of a download
_LOG_IN = "log in (`hf auth login`, or HF_TOKEN=...)"


class MissingFileError(UserError):
    """Is raised if a repository exists but does not have the files that were asked for."""


@dataclasses.dataclass(frozen=True)
class HubName:
    """Names a folder, or a file, of a repository on the hub.

    Attributes:
      repo: org/repository; repositories of the hub's first days have no org.
      revision: a branch, a tag or a commit; None for the main branch.
      folder: the path in the repository; "" for the repository itself.
    """

    repo: str
    revision: str | None = None
    folder: str = ""

    def __str__(self) -> str:
        at = f"@{urllib.parse.quote(self.revision, safe='')}" if self.revision else ""
        return f"{SCHEME}{self.repo}{at}" + (f"/{self.folder}" if self.folder else "")

    def file(self, name: str) -> str:
        """Returns the path in the repository of a file in this folder."""
        return f"{self.folder}/{name}" if self.folder else name


def is_hub_name(text) -> bool:
    """Returns whether `text` begins with hf://."""
    return str(text).startswith(SCHEME)


def parse(text) -> HubName:
    """Returns the parts of hf://org/repository[@revision][/folder].

    Raises UserError for a text that is not of this form.
    """
    if isinstance(text, HubName):
        return text
    pattern = r"([\w.-]+(?:/[\w.-]+)?)(?:@([^/]+))?((?:/[^/]+)*)/?"
    found = re.fullmatch(pattern, str(text).removeprefix(SCHEME))
    if not is_hub_name(text) or not found or ".." in found[3].split("/"):
        raise UserError(
            f"{text} is no name on the hub; write hf://org/repository[@revision]/folder"
        )
    revision = found[2] and urllib.parse.unquote(found[2])
    return HubName(found[1], revision, found[3].strip("/"))


def fetch(name, files: Sequence[str], needed: Sequence[str] = ()) -> pathlib.Path:
    """Downloads the given files of a folder on the hub, and returns the local copy of the folder.

    If `name` is itself a file, that file is downloaded and its path returned. Files that are in the
    cache are not downloaded again, and if the hub cannot be reached only the cache is used. A
    download of more than two seconds is shown by a progress bar on a terminal, and by a line in the
    log.

    Raises UserError for a repository or revision that does not exist or may not be read, if the hub
    cannot be reached and the cache does not have the files, and if the download stops. Raises
    MissingFileError if the folder has none of `files`, or lacks one of `needed`.

    Args:
      name: a text that `parse` takes, or a HubName.
      files: the names of files in the folder itself. Those that it does not have are left out.
      needed: those of `files` that the folder must have.
    """
    name = parse(name)
    there, commit, trouble = _look(name)
    wanted = [file for file in [name.folder, *map(name.file, files)] if file]
    if there is not None:
        wanted = [file for file in wanted if file in there]
        _check_there(name, wanted, files, needed, there)
        if snapshot := _cached(name, commit, wanted):
            return snapshot / name.folder
    snapshot = _download(name, wanted, trouble)
    local = snapshot / name.folder
    if there is None and not local.is_file():
        found = [file for file in files if (local / file).is_file()]
        if not found or set(needed) - set(found):
            raise _stopped(name, trouble, trouble)
    return local


def pinned(name, local: pathlib.Path) -> HubName:
    """Returns `name` with the commit of `local`, the path that `fetch` returned for it."""
    name = parse(name)
    depth = len(pathlib.PurePosixPath(name.folder).parts)
    return dataclasses.replace(name, revision=[local, *local.parents][depth].name)


def list_files(name) -> list[str]:
    """Returns the paths of all files of the repository, at the revision of `name`.

    Raises UserError for a repository or revision that does not exist or may not be read, and if the
    hub cannot be reached.
    """
    name = parse(name)
    there, _, trouble = _look(name)
    if there is None:
        raise _stopped(name, trouble, trouble)
    return there


def check_repo(text: str) -> str:
    """Returns the repository user/name of the flag --push_to, which may begin with hf://.

    Raises UserError for another text, and if huggingface_hub is not installed.
    """
    _import()
    repo = text.removeprefix(SCHEME)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"--push_to={text} is no name on the hub; write --push_to=user/name")
    return repo


def push(directory: pathlib.Path, repo: str, public: bool = False) -> str:
    """Uploads the content of a folder to a model repository, and returns the repository's address.

    A repository that does not exist is made. The folder is kept in any case. Raises UserError if
    the hub refuses or cannot be reached.

    Args:
      directory: the folder.
      repo: the repository, as user/name.
      public: whether a repository that is made is public. One that exists stays as it is.
    """
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
        raise UserError(
            f"the hub did not take {directory} as {repo}: {_reason(error)}. The folder is written; "
            f"to try again: sae-jax export --out={directory} --push_to={repo}"
        ) from error
    return str(url)


def _import():
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise UserError(
            'the hub needs the package huggingface_hub: pip install "sae-jax[hub]"'
        ) from None
    return huggingface_hub


def _cached(name: HubName, commit: str, files: Sequence[str]) -> pathlib.Path | None:
    """Returns the cached copy of the repository if it is of this commit and has all the files."""
    for file in files:
        revision = name.revision or "main"
        found = _import().try_to_load_from_cache(name.repo, file, revision=revision)
        if not isinstance(found, str):
            return None
        depth = len(pathlib.PurePosixPath(file).parts)
        snapshot = pathlib.Path(found).parents[depth - 1]
        if snapshot.name != commit:
            return None
    return snapshot


def _download(name: HubName, files: Sequence[str], trouble: Exception | None) -> pathlib.Path:
    """Downloads files, and returns the copy of the repository in the cache.

    If there is `trouble` with reaching the hub, the cache alone is used.
    """
    hub, shown = _import(), sys.stderr.isatty() or "ipykernel" in sys.modules

    class SilentBar(hub.utils.tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options | {"disable": True})

    with _logged(f"{name}: downloading"):
        try:
            snapshot = hub.snapshot_download(
                name.repo,
                revision=name.revision,
                allow_patterns=list(map(glob.escape, files)),
                local_files_only=trouble is not None,
                tqdm_class=hub.utils.tqdm if shown else SilentBar,
            )
        except Exception as error:  # its own classes, and requests' or httpx's, as its version goes
            if answer := _answer(error):
                raise _refused(name, answer) from error
            raise _stopped(name, trouble, error) from error
    return pathlib.Path(snapshot)


def _look(name: HubName) -> tuple[list[str] | None, str | None, Exception | None]:
    """Asks the hub for a repository's files.

    Returns all files, the commit and None, or None, None and the error if the hub does not answer.
    """
    hub = _import()
    try:
        timeout = hub.constants.HF_HUB_ETAG_TIMEOUT
        info = hub.HfApi().model_info(name.repo, revision=name.revision, timeout=timeout)
    except hub.errors.HFValidationError as error:
        raise UserError(f"{name} is no name on the hub: {_reason(error)}") from error
    except Exception as error:  # its own classes, and requests' or httpx's, as its version goes
        if answer := _answer(error):
            raise _refused(name, answer) from error
        return None, None, error
    return [file.rfilename for file in info.siblings], info.sha, None


def _answer(error: BaseException | None):
    """Returns the hub's answer that led to `error`: its nearest cause with a status of 4xx."""
    while error is not None:
        if isinstance(error, _import().errors.HfHubHTTPError):
            response = error.response  # None in what early versions raise without asking the hub
            if response is not None and response.status_code < 500:
                return error
        error = error.__cause__
    return None


def _refused(name: HubName, error) -> UserError:
    """Returns the error that says what the hub's answer to a request means to the user."""
    hub = _import()
    if isinstance(error, hub.errors.GatedRepoError):
        where = f"{hub.constants.ENDPOINT}/{name.repo}"
        return UserError(f"{name} is gated: ask for access at {where}, then {_LOG_IN}")
    if isinstance(error, hub.errors.RepositoryNotFoundError):
        return UserError(
            f"{name}: there is no model repository {name.repo}, or it is private: correct the "
            f"name, or {_LOG_IN}"
        )
    if isinstance(error, hub.errors.RevisionNotFoundError):
        return UserError(
            f"{name}: {name.repo} has no revision {name.revision!r}{_nearest_revision(name)}"
        )
    if error.response.status_code in (401, 403):
        return UserError(f"{name}: the hub refuses: {_reason(error)}; {_LOG_IN}")
    return UserError(f"{name}: the hub does not give it: {_reason(error)}")


def _nearest_revision(name: HubName) -> str:
    try:
        refs = _import().HfApi().list_repo_refs(name.repo)
    except Exception:  # it only adds to a message that is shown in any case
        return ""
    return f"; {nearest(name.revision, [ref.name for ref in (*refs.branches, *refs.tags)])}"


def _check_there(name: HubName, wanted, files, needed, there: list[str]) -> None:
    lacking = [file for file in needed if name.file(file) not in wanted]
    if wanted and not lacking:
        return
    inside = [file for file in there if file.startswith(name.file(""))]
    if name.folder and not inside:
        folders = sorted({file.rpartition("/")[0] for file in there} - {""})
        hint = nearest(name.folder, folders) if folders else f"it has the files {some(there)}"
        raise MissingFileError(f"{name}: {name.repo} has no folder {name.folder!r}; {hint}")
    what = ", ".join(lacking) or f"any of {', '.join(files)}"
    raise MissingFileError(f"{name} has not {what}; it has {some(inside) or 'no files'}")


def _stopped(name: HubName, trouble: Exception | None, error: Exception) -> UserError:
    """Returns the error that says why a download stopped.

    trouble: why the hub could not be reached; None if it was reached, and `error` came later.
    """
    constants = _import().constants
    if trouble is None:
        return UserError(
            f"{name}: the download stopped: {_reason(error)}; start it again to go on: files that "
            "have arrived are kept"
        )
    absent = f"{name} is not, or not wholly, in the cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        return UserError(f"{absent}, and HF_HUB_OFFLINE is set; unset it to download")
    return UserError(
        f"{absent}, and {constants.ENDPOINT} cannot be reached ({_reason(trouble)}); correct the "
        "network, or HF_ENDPOINT, and start again"
    )


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip().rstrip(".")[:200] if lines else type(error).__name__


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    """Logs `what` is being done if it takes more than two seconds, and how long it took.

    On a terminal huggingface_hub also shows progress bars.
    """
    start = time.monotonic()
    timer = threading.Timer(_LOG_AFTER, logging.info, [what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if (seconds := time.monotonic() - start) > _LOG_AFTER:
        logging.info("%s took %.0f s", what, seconds)
