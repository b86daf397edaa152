"""Reads prompts, which are Markdown files, and fills them in.

A prompt's turns begin with the lines `# system`, `# user` and `# assistant`; a file without any is
one turn of the user's. `{{name}}` stands for something of the latent's, such as its examples. The
version of a prompt is a hash of its file, so that an answer is never taken for that of another one.
"""

import dataclasses
import functools
import hashlib
import pathlib
import re
from collections.abc import Iterable, Mapping

from sae_jax import paths
from sae_jax.errors import UserError, nearest

FOLDER = pathlib.Path(__file__).with_name("prompts")
_TURN = re.compile(r"^# (system|user|assistant)[ \t]*$", re.MULTILINE)
_PLACE = re.compile(r"\{\{\s*(\w+)\s*\}\}")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation with places to fill in.

    Attributes:
      name: the name of its file, without .md.
      version: 12 hexadecimal digits of the hash of the file.
      turns: role and text of each turn.
    """

    name: str
    version: str
    turns: tuple[tuple[str, str], ...]

    @property
    def title(self) -> str:
        """The name and the version, as NAME@VERSION."""
        return f"{self.name}@{self.version}"

    @functools.cached_property
    def places(self) -> frozenset[str]:
        """The names of what is filled in."""
        return frozenset(name for _, text in self.turns for name in _PLACE.findall(text))

    def messages(self, values: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
        """Returns role and text of each message of a chat, with a value for each place.

        Values are not read again, so that braces in them are only text.
        """
        return tuple(
            (role, _PLACE.sub(lambda place: str(values[place[1]]), text))
            for role, text in self.turns
        )


@functools.cache
def built_in(name: str) -> Prompt:
    """Returns the prompt of that name that comes with the package."""
    return _parsed(name, (FOLDER / f"{name}.md").read_bytes())


def from_file(file, known: Iterable[str]) -> Prompt:
    """Returns the prompt in a user's file.

    Args:
      file: its path.
      known: the places that a prompt may have; it must have one of them.

    Raises UserError if the file cannot be read, has no user's turn, or has unknown places or none.
    """
    path, known = paths.local(file), list(known)
    try:
        data = path.read_bytes()
        prompt = _parsed(path.stem, data)
    except OSError as error:
        raise UserError(f"cannot read the prompt {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the prompt {path} is no text in UTF-8") from None
    for place in sorted(prompt.places - set(known)):
        raise UserError(f"the prompt {path} has {{{{{place}}}}}; {nearest(place, known)}")
    if not prompt.places:
        raise UserError(
            f"the prompt {path} shows nothing of a latent; write one of these where it is to: "
            + ", ".join(f"{{{{{name}}}}}" for name in known)
        )
    if not prompt.turns or prompt.turns[-1][0] != "user":
        raise UserError(f"the prompt {path} must end with a turn of the user's, `# user`")
    return prompt


def _parsed(name: str, data: bytes) -> Prompt:
    text = data.decode()
    first, *others = _TURN.split(text)
    turns = zip(others[::2], others[1::2], strict=True) if others else [("user", first)]
    turns = tuple((role, content.strip()) for role, content in turns)
    return Prompt(name, hashlib.sha256(data).hexdigest()[:12], turns)
