"""A user's mistake is told in one line, whatever names and values the line has."""

import os
import subprocess
import sys

import pytest

from sae_jax.errors import UserError


@pytest.mark.parametrize("text, shown", [
    ("no file at /home/Zoë/דוגמה 🙂; give one", None),
    ("two\nlines\r\n", "two lines"),
    ("a\u2028b\x85c", "a b c"),
    ("half \ud800 of a character", r"half \ud800 of a character"),
    ("a terminal's \x1b[2J own", r"a terminal's \x1b[2J own"),
])  # fmt: skip
def test_a_message_is_one_line_that_any_terminal_shows(text, shown):
    assert str(UserError(text)) == (shown or text)
    str(UserError(text)).encode()


def test_of_a_long_message_the_beginning_and_the_end_are_kept():
    text = str(UserError(f"{'the file'} {'x' * 10**6}; make it again"))
    assert len(text) < 1600 and text.startswith("the file x") and text.endswith("x; make it again")


def test_a_reader_that_has_ended_is_no_error():
    """As `head` has, which read enough."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "sae_jax", "compare", "--help"]
    ended = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE)
    os.close(writes)
    assert (ended.returncode, ended.stderr) == (141, b"")
