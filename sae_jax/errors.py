"""The kind of error that is shown to users, and what refuses a wrong choice with it."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence

_LONGEST, _END = 1500, 400  # characters of a message, and of its end, which says what to do


class UserError(Exception):
    """A mistake that the user can mend.

    Its text is one line that says what is wrong, where, and what to do. The command line prints it
    without a trace and ends with exit code 2.

    The text may quote names and values from files of others; it is shown as `one_line` does.
    """

    def __init__(self, text: str):
        super().__init__(one_line(text))


def one_line(message: object) -> str:
    """Returns a message as one line for a terminal, whatever names it quotes.

    Line breaks become spaces, and characters that are not printable their escapes. Of what is
    longer than any message the middle is left out, since the end says what to do.
    """
    line = " ".join(str(message).splitlines())
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
    if len(line) <= _LONGEST:
        return line
    return f"{line[: _LONGEST - _END]} ... {line[-_END:]}"


def choose(value: str, choices: Iterable[str], what: str) -> str:
    """Returns `value` if it is one of `choices`.

    Raises UserError if it is not; the text names `what` was chosen and the nearest choice.
    """
    if value not in choices:
        raise UserError(f"{what} is {value!r}; {nearest(value, choices)}")
    return value


def known_arguments(function: Callable) -> Callable:
    """Makes `function` refuse a keyword that it does not have as it refuses other mistakes.

    It then raises UserError, which names the argument that is spelt most like it.
    """
    known = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*values, **named):
        for name in named:
            if name not in known:
                what = f"{function.__name__} has no argument {name!r}"
                raise UserError(f"{what}; {nearest(name, known)}")
        return function(*values, **named)

    return call


def nearest(value: str, choices: Iterable[str]) -> str:
    """Returns a hint for a message: the choice that is spelt most like `value`.

    If none is much like it, the hint lists the choices, at most 32 of them.
    """
    choices = list(choices)
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"it must be one of: {some(choices, 32)}"


def some(names: Sequence[str], shown: int = 8) -> str:
    """Returns the first few of `names` for a message, and how many more there are."""
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def on_one_line(error: BaseException) -> str:
    """Returns the text of another library's error for a message: on one line, and not too long."""
    return " ".join(str(error).split())[:200]
