"""Buckets of S3 and Google Cloud Storage, opened through TensorStore.

All that goes to object stores goes through TensorStore, which reads the arrays too: one client, one
set of credentials, and no further package. (etils.epath reaches S3 through s3fs, which caches
listings, so that a worker does not see another's files; and an epath.Path cannot be created
exclusively.)

Credentials are the usual ones. For S3 they are AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or
~/.aws, or the instance's role, with AWS_REGION; AWS_ENDPOINT_URL names another server that speaks
S3. For Google they are GOOGLE_APPLICATION_CREDENTIALS, or gcloud's, or the instance's.
"""

import contextlib
import functools
import math
import os
import re
import sys
import tempfile
import threading
import time

import tensorstore as ts

from sae_jax.errors import UserError
from sae_jax.place_errors import CREDENTIALS, explained, s3_endpoint

DRIVERS = {"s3": "s3", "gs": "gcs"}
_FIRST_LOOK = {"max_retries": 3, "initial_delay": "200ms", "max_delay": "1s"}

# A request that was lost is sent again soon, because those after it may wait for it: TensorStore's
# own first delay is a second. After about ten minutes it is given up.
_RETRIES = {"max_retries": 128, "initial_delay": "50ms", "max_delay": "5s"}

REQUESTS = {
    setting: value
    for driver in DRIVERS.values()
    for setting, value in (
        (f"{driver}_request_retries", _RETRIES),
        (f"{driver}_request_concurrency", {"limit": 64}),
    )
}
"""How object stores are asked, as settings of a TensorStore context."""


def make_spec(scheme: str, bucket: str) -> dict:
    """Returns TensorStore's spec of a bucket."""
    spec = {"driver": DRIVERS[scheme], "bucket": bucket}
    if scheme != "s3":
        return spec
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint := s3_endpoint():  # TensorStore does not look for it by itself
        spec["endpoint"] = endpoint.rstrip("/")
        region = region or "us-east-1"
    if region:
        spec["aws_region"] = region
    if "AWS_ACCESS_KEY_ID" in os.environ:  # else ~/.aws, a role, the instance
        spec["aws_credentials"] = {"type": "environment"}
    return spec


_opening = threading.Lock()
_failures: dict[tuple[str, str], tuple[float, UserError]] = {}


def open_bucket(scheme: str, bucket: str):
    """Opens a bucket, or returns it where it is open.

    One thread at a time does, since each diverts what the process writes to standard error, and a
    cache alone would let them all begin. Those that have waited for one that failed do not try
    again, one after the other.
    """
    began = time.monotonic()
    with _opening:
        when, failure = _failures.get((scheme, bucket), (-math.inf, None))
        if when > began:
            raise UserError(str(failure)) from failure
        try:
            return _open(scheme, bucket)
        except UserError as error:
            _failures[scheme, bucket] = time.monotonic(), error
            raise


@functools.cache
def _open(scheme: str, bucket: str):
    """Opens a bucket, after a first look with few retries found it usable."""
    where, log = f"{scheme}://{bucket}", []
    spec = make_spec(scheme, bucket)
    try:
        with explained(where), library_log(log):
            context = ts.Context({f"{DRIVERS[scheme]}_request_retries": _FIRST_LOOK})
            look = ts.KvStore.open(spec, context=context).result()
            look.list(key_range("sae-jax-looks", "sae-jax-lookt")).result()
    except UserError as error:
        if "cannot reach" in str(error) and any("credentials" in line for line in log):
            raise UserError(
                f"{where}: found no credentials, and without them cannot reach the object store; "
                f"set {CREDENTIALS[scheme]}"
            ) from error
        raise
    return ts.KvStore.open(spec, context=ts.Context(REQUESTS)).result()


_LOG_LINE = re.compile(r"[IWEF]\d{4,} \d\d:\d\d:\d\d\.\d+ +\d+ ")


@contextlib.contextmanager
def library_log(lines: list[str]):
    """Keeps from the terminal what TensorStore's C++ logs within, and adds it to `lines`.

    TensorStore lists the places without credentials there, and has no switch for it. What others
    write to standard error meanwhile is written when all is done. Yields `lines`.
    """
    try:
        terminal = os.dup(2)
    except OSError:  # there is no standard error
        yield lines
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            held.seek(0)
            for line in held.read().decode(errors="replace").splitlines(keepends=True):
                if _LOG_LINE.match(line):
                    lines.append(line)
                else:
                    sys.stderr.write(line)


def key_range(start: str, end: str):
    """Returns TensorStore's range of the keys from `start` to before `end`."""
    return ts.KvStore.KeyRange(start, end)
