"""What errors of files, folders and object stores mean, in one line that says what to do."""

import contextlib
import errno
import os
import re
import textwrap

from sae_jax.errors import UserError

CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or gcloud auth application-default login",
}
"""Where credentials are looked for, by scheme."""

_WHAT_TO_DO = {
    errno.EACCES: "give another place, or get the right to use this one",
    errno.EPERM: "give another place, or get the right to use this one",
    errno.EROFS: "give another place, which can be written to",
    errno.ENOTDIR: "a part of this path is a file; correct the path",
    errno.EISDIR: "this is a folder where a file must be; correct the path",
    errno.ELOOP: "a link leads back to itself; correct the path",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ENOSPC: "make room, and start again",
    errno.EDQUOT: "make room, and start again",
}


@contextlib.contextmanager
def explained(where):
    """Raises what the system or TensorStore raises within as a UserError that names `where`."""
    try:
        yield
    except (OSError, ValueError) as error:  # TensorStore has no class of its own
        reason = explanation(where, error) or f"{where}: {textwrap.shorten(str(error), 200)}"
        raise UserError(reason) from error


def explanation(where, error: OSError | ValueError) -> str | None:
    """Returns what kept something from being read or written, in words, with what to do.

    Returns None for an error that is not one of the place: what is read may be damaged.
    """
    scheme, is_remote, _ = str(where).partition("://")
    if not is_remote:
        return _local_explanation(where, error)
    error = str(error)
    names = CREDENTIALS[scheme]
    if "NoSuchBucket" in error or "bucket does not exist" in error:
        return f"{where}: there is no such bucket; make it, or correct its name"
    if "credentials" in error.lower() or "UNAUTHENTICATED" in error or "'401'" in error:
        return f"{where}: no credentials, or wrong ones; set {names}"
    if "PERMISSION_DENIED" in error or "'403'" in error:
        return f"{where}: these credentials may not do this; set others ({names}), or their rights"
    if "CURL error" in error or "UNAVAILABLE" in error:
        server = s3_endpoint() if scheme == "s3" else None
        what = f"the server {server} (AWS_ENDPOINT_URL)" if server else "the object store"
        return f"{where}: cannot reach {what}; correct it or the network, and start again"
    return None


def _local_explanation(where, error: OSError | ValueError) -> str | None:
    """Returns an error of this machine's files in words, with what to do."""
    number = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"os_error_code='(\d+)'", str(error)):  # TensorStore's
        number = int(found[1])
    if number is None:
        return None
    hint = f"; {_WHAT_TO_DO[number]}" if number in _WHAT_TO_DO else ""
    return f"{where}: {os.strerror(number)}{hint}"


def s3_endpoint() -> str | None:
    """Returns the server that the environment names for S3, if any."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
