"""Requests that send JSON to a server with the user's key: patient, and careful with the key.

The key is in the environment. It goes into one header of requests to the server that the user
named, and nowhere else: nothing that leaves this module, an answer or an error, has it, even where
the server repeats it. For the same reason errors are raised where no other error is being handled:
they have no context in which it could be.
"""

import datetime
import email.utils
import http.client
import ipaddress
import json
import math
import os
import random
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from absl import logging

from sae_jax.errors import UserError, one_line

T = TypeVar("T")

TRIES = 8
_LONGEST_PAUSE, _LONGEST_ASKED = 120.0, 600.0  # seconds; of our own choice, of the server's
_AGAIN = (408, 409, 425, 429)  # and all of 5xx
_MOST_BYTES = 2**26  # of an answer


class Key:
    """The key of a user. It does not show in what is printed.

    Attributes:
      text: the key itself, "" where the server needs none.
    """

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        """Returns stars."""
        return "***"

    def hidden(self, value):
        """Returns a text, or a JSON value, with stars wherever the key was."""
        if isinstance(value, str):
            return value.replace(self.text, "***") if self.text else value
        if isinstance(value, dict):
            return {self.hidden(name): self.hidden(v) for name, v in value.items()}
        if isinstance(value, list):
            return [self.hidden(v) for v in value]
        return value


class Reply(NamedTuple):
    """What a server answered. status: of HTTP; value: the JSON in it, None if there is none that is
    whole."""

    status: int
    value: object


class Again(Exception):
    """Is raised for an answer after which a request is worth another try.

    Attributes:
      wait: how long the server asks to wait, in seconds; None if it does not say.
      value: the JSON of its answer, or None.
    """

    def __init__(self, what: str, wait: float | None = None, value: object = None):
        super().__init__(what)
        self.wait, self.value = wait, value


class Refused(Exception):
    """Is raised for an answer after which the same request would be refused again.

    Attributes:
      status: the status of HTTP.
      value: the JSON of the answer, or None.
    """

    def __init__(self, what: str, status: int, value: object = None):
        super().__init__(what)
        self.status, self.value = status, value


def read_key(variable: str, whose: str, advice: str) -> Key:
    """Returns the key that an environment variable holds.

    Raises UserError if there is none. No message has the variable's name, for which a key may be
    mistaken.
    """
    text = os.environ.get(variable, "").strip()
    if not text:
        raise UserError(f"the environment variable for {whose} key is not set; {advice}")
    if not (text.isascii() and text.isprintable()) or " " in text:
        raise UserError(f"the environment variable for {whose} key holds what is no key")
    return Key(text)


def check_address(url: str, example: str) -> None:
    """Raises UserError if `url` is no address of a server, or holds a secret."""
    wrong = f"is no address of a server; write one such as {example}"
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port  # noqa: B018
    except ValueError:
        raise UserError(f"the server's address {wrong}") from None
    if parts.username is not None or parts.password is not None:
        raise UserError("the server's address holds a password; the key belongs in the environment")
    if parts.query or parts.fragment:  # which may be a key, and so is not shown
        raise UserError(f"the server's address has a part after ? or #; write {example}")
    readable = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("https", "http") or not parts.hostname or not readable:
        raise UserError(f"{url} {wrong}")


def check_secrecy(url: str) -> None:
    """Raises UserError if a key that is sent there would go over the network in the clear."""
    if urllib.parse.urlsplit(url).scheme == "http" and not is_here(url):
        raise UserError(f"{url}: the key would go over the network in the clear; write https://")


def is_here(url: str) -> bool:
    """Whether an address is of this machine."""
    host = urllib.parse.urlsplit(url).hostname
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would take the key to another server and drop the body."""

    def redirect_request(self, *_):
        """Returns None, for which urllib raises the answer as an error."""


def post(address: str, body: bytes, key: Key, header: str, timeout: float) -> Reply:
    """Sends a body of JSON to a server and returns what it answered.

    Args:
      address: where it goes.
      body: what is sent.
      key: goes into the header, if there is one.
      header: the header's name; "authorization" for "Bearer KEY".
      timeout: how long the server may take to say anything, and to say all, in seconds.

    Raises Again where another try may help, Refused where it does not, and UserError for a
    redirect and for a server that cannot prove who it is.
    """
    headers = {"content-type": "application/json"}
    if key.text:
        headers[header] = f"Bearer {key.text}" if header == "authorization" else key.text
    request = urllib.request.Request(address, body, headers, method="POST")
    # A proxy would be another machine.
    direct = [urllib.request.ProxyHandler({})] if is_here(address) else []
    opener = urllib.request.build_opener(_NoRedirects, *direct)
    deadline, failure, unproven = time.monotonic() + timeout, None, False
    status, given, data = 0, {}, b""
    try:
        with opener.open(request, timeout=timeout) as answer:
            status = answer.status
            data = _read(answer, deadline)
    except urllib.error.HTTPError as error:
        status, given = error.code, dict(error.headers.items())
        with error:
            data = _read_if_it_can(error, deadline)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        unproven = isinstance(reason, ssl.SSLCertVerificationError)
        failure = key.hidden(str(reason) or type(reason).__name__)
    if unproven:
        raise UserError(f"{address} cannot prove who it is: {failure}")
    if failure is not None:
        raise Again(f"did not answer ({failure})")
    value = _json(data, key)
    if 200 <= status < 300:
        return Reply(status, value)
    given = {name.lower(): key.hidden(text) for name, text in given.items()}
    if 300 <= status < 400:
        to = given.get("location", "elsewhere")
        raise UserError(f"{address} points to {to}; give the address that it has now")
    what = f"answered {status}{said(value)}"
    if may_pass(status):
        raise Again(what, asked_to_wait(given), value)
    raise Refused(what, status, value)


def may_pass(status: int) -> bool:
    """Whether a request that was answered with a status of HTTP is worth another try."""
    return status in _AGAIN or status >= 500


def _read(answer, deadline: float) -> bytes:
    """Returns what a server says until it ends. A body that is cut is seen by its JSON."""
    parts, size = [], 0
    while part := answer.read1(2**16):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError("it took too long")
        if size > _MOST_BYTES:
            raise OSError("its answer has no end")
    return b"".join(parts)


def _read_if_it_can(answer, deadline: float) -> bytes:
    try:
        return _read(answer, deadline)
    except (OSError, http.client.HTTPException):
        return b""


def _json(data: bytes, key: Key) -> object:
    try:
        return key.hidden(json.loads(data))
    except (ValueError, RecursionError):
        return None  # a page of HTML, or cut


def said(value: object) -> str:
    """Returns what the JSON of an error says, in brackets, or "" where it says nothing."""
    if isinstance(value, dict) and isinstance(value.get("error"), dict):
        value = value["error"]
    if not isinstance(value, dict):
        return ""
    names = ("error", "message", "detail", "path", "param")
    parts = [str(value[name])[:300] for name in names if value.get(name)]
    return f" ({', '.join(parts)})" if parts else ""


def asked_to_wait(headers: Mapping[str, str]) -> float | None:
    """Returns how many seconds the header retry-after asks to wait, or None if it does not.

    The header holds seconds or a date. A date is told from the server's own clock where it says
    the time. `headers` has its names in lower case.
    """
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        until, now = _date(text), _date(headers.get("date", ""))
        if until is None:
            return None
        seconds = (until - (now or datetime.datetime.now(datetime.UTC))).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _date(text: str) -> datetime.datetime | None:
    try:
        date = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    return date if date.tzinfo else date.replace(tzinfo=datetime.UTC)


def until_answered(
    ask: Callable[[], T],
    address: str,
    wait: float,
    advice: str,
    pause: Callable[[float], None] = time.sleep,
) -> T:
    """Returns what `ask` returns, and calls it up to 8 times while it raises Again.

    Between calls are pauses that double, in part by chance, or as long as the server asks for.

    Args:
      ask: makes the request.
      address: the server, for messages.
      wait: how long the first pause is, in seconds.
      advice: what the user should do if the last call fails too.
      pause: waits for so many seconds.

    Raises UserError if the last call fails, and if the server asks for more than ten minutes.
    """
    for tried in range(1, TRIES + 1):
        try:
            return ask()
        except Again as error:
            told, asked = str(error), error.wait or 0.0
        if tried == TRIES:
            raise UserError(f"{address} {told} {tried} times; {advice}")
        if asked > _LONGEST_ASKED:
            raise UserError(f"{address} {told} and asks to wait {asked:.0f} s; go on then")
        seconds = min(_LONGEST_PAUSE, wait * 2 ** (tried - 1)) * random.uniform(0.5, 1.0)
        seconds = max(seconds, asked)
        logging.warning("%s %s; again in %.1f s", address, one_line(told), seconds)
        pause(seconds)
    raise AssertionError("not reached")
