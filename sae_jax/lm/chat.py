"""Writes conversations as the prompts that a chat model was trained on, by its own template.

Templates are Jinja programs of others, so they run in jinja2's sandbox, with what transformers
gives them.
"""

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence

import jinja2
import jinja2.ext
import jinja2.sandbox

from sae_jax.errors import UserError, on_one_line, some
from sae_jax.json_files import checked, read_json
from sae_jax.lm.directory import model_directory
from sae_jax.lm.text import SpecialToken, Tokenizer, well_formed

_CONFIG = "tokenizer_config.json"
_OWN_FILE = "chat_template.jinja"  # comes before the field of tokenizer_config.json
_DEFAULT = "default"  # of several templates


@dataclasses.dataclass(frozen=True)
class _Named:
    name: str
    template: str


@dataclasses.dataclass(frozen=True)
class _Fields:
    """The fields of tokenizer_config.json that concern templates."""

    chat_template: str | list[_Named] | None = None
    bos_token: str | SpecialToken | None = None
    eos_token: str | SpecialToken | None = None
    unk_token: str | SpecialToken | None = None
    sep_token: str | SpecialToken | None = None
    pad_token: str | SpecialToken | None = None
    cls_token: str | SpecialToken | None = None
    mask_token: str | SpecialToken | None = None


def chat_prompt(
    tokenizer: Tokenizer | str | pathlib.Path,
    messages: str | Sequence[Mapping],
    add_generation_prompt: bool = True,
    **variables,
) -> str:
    """Returns a conversation as the text that a chat model goes on from.

    The text has the template's special tokens in it, which the tokenizer knows. `lm.generate` puts
    BOS before a text that does not begin with it; tokenizer.encode(text) gives the template's
    tokens and no other.

    Raises UserError if there is no chat template, or if it is damaged or refuses the messages.

    Args:
      tokenizer: a tokenizer that `lm.load_tokenizer` loaded, its directory, or a name on the hub.
        The template is in chat_template.jinja or in tokenizer_config.json, of which several may be
        there; the one of the name default is taken.
      messages: dicts such as {"role": "user", "content": "Hello"}, or a text that a user says.
      add_generation_prompt: whether the text ends with the start of the model's answer.
      **variables: what else the template knows, such as tools.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    messages = [dict(message) for message in messages]
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise UserError(f"message {number} of the chat has no role, such as user or assistant")
    is_loaded = isinstance(tokenizer, Tokenizer)
    directory = tokenizer.directory if is_loaded else model_directory(tokenizer)
    if directory is None:
        raise UserError(f"the tokenizer {tokenizer.name} was not read from files; name a directory")
    template, where, tokens = _template(directory)
    try:
        text = (
            _environment()
            .from_string(template)
            .render(
                messages=messages, add_generation_prompt=add_generation_prompt, **tokens | variables
            )
        )
    except Exception as error:  # of any class: a template is a program
        reason = on_one_line(error) or type(error).__name__
        raise UserError(f"the chat template in {where} fails on these messages: {reason}") from None
    return well_formed(text)


def _template(directory: pathlib.Path) -> tuple[str, pathlib.Path, dict[str, str]]:
    """Returns the template, the file that it is in, and the texts of special tokens by name."""
    file = directory / _CONFIG
    fields = checked(read_json(file, default={}), _Fields, file)
    tokens = {}
    for name in (field.name for field in dataclasses.fields(_Fields)):
        token = getattr(fields, name)
        if name != "chat_template" and token is not None:
            tokens[name] = token.content if isinstance(token, SpecialToken) else token
    own = directory / _OWN_FILE
    if own.is_file():
        return own.read_text(encoding="utf-8", errors="replace"), own, tokens
    template = fields.chat_template
    if isinstance(template, list):
        named = {entry.name: entry.template for entry in template}
        if _DEFAULT not in named:
            raise UserError(f"{file} has chat templates {some(sorted(named))}, and no {_DEFAULT}")
        template = named[_DEFAULT]
    if template is None:
        raise UserError(
            f"{directory} has no chat template, neither {_OWN_FILE} nor chat_template in "
            f"{_CONFIG}; it is no chat model, or write the prompt as its card says"
        )
    return template, file, tokens


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment


class _Generation(jinja2.ext.Extension):
    """Reads the blocks that mark what the model says, {% generation %}, which change no text."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller):
        return caller()


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Returns JSON as it is; jinja2's own filter escapes it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message):
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
