"""OpenAI's chat protocol, as far as servers of it agree: requests, answers, and what each refuses.

Servers differ in how they take a schema, what they call the limit of tokens, and whether they take
a seed. What one refuses is seen by what it says of it, and then left out or put another way.
"""

import dataclasses
import json
import re

from sae_jax.errors import UserError
from sae_jax.http_posts import Refused, said
from sae_jax.interpret.explain.llm.questions import Request

_SCHEMAS = ("json_schema", "json_object", "text")  # how it is asked for, the strictest first
_ABOUT_SCHEMAS = re.compile(r"response_format|schema|json_object|grammar|structured", re.IGNORECASE)
_OPTIONS = {  # a field that can be left out, and how refusals name it
    "logprobs": re.compile(r"log_?prob", re.IGNORECASE),
    "temperature": re.compile(r"\btemperature\b", re.IGNORECASE),
    "seed": re.compile(r"\bseed\b", re.IGNORECASE),
}
_TOO_LONG = re.compile(r"exceed_context_size|context_length_exceeded|context (length|size|window)")


@dataclasses.dataclass(frozen=True)
class Form:
    """How a server wants requests.

    Attributes:
      schema: how a schema is asked for: "json_schema", "json_object" or "text".
      limit: the name of the field that says how long an answer may be.
      without: the fields that are left out.
    """

    schema: str = "json_schema"
    limit: str = "max_tokens"
    without: frozenset[str] = frozenset()


def request_body(request: Request, model: str, form: Form) -> bytes:
    """Returns the body of a request, in the form that the server wants."""
    messages = [{"role": role, "content": text} for role, text in request.messages]
    fields = {"model": model, "messages": messages, form.limit: request.max_tokens}
    if "temperature" not in form.without:
        fields["temperature"] = request.temperature
    if "seed" not in form.without:
        fields["seed"] = request.seed
    if request.logprobs and "logprobs" not in form.without:
        fields |= {"logprobs": True, "top_logprobs": request.logprobs}
    if request.schema is not None:
        if form.schema == "json_schema":
            named = {"name": request.schema_name, "strict": True, "schema": request.schema}
            fields["response_format"] = {"type": "json_schema", "json_schema": named}
        else:
            wanted = json.dumps(request.schema)
            messages[-1]["content"] += f"\n\nAnswer with JSON of this schema only: {wanted}"
        if form.schema == "json_object":
            fields["response_format"] = {"type": "json_object"}
    return json.dumps(fields).encode()


def next_form(form: Form, request: Request, refused: Refused) -> Form | None:
    """Returns the form to try after a refusal, or None if the form is not what was refused.

    Raises UserError if the question is too long for the model.
    """
    if refused.status not in (400, 422):
        return None
    fields = refused.value.get("error", refused.value) if isinstance(refused.value, dict) else {}
    text = json.dumps(fields)
    _check_length(fields, text)
    if "max_completion_tokens" in text and form.limit == "max_tokens":
        return dataclasses.replace(form, limit="max_completion_tokens")
    if request.schema is not None and form.schema != "text" and _ABOUT_SCHEMAS.search(text):
        return _with_weaker_schema(form)
    for name, pattern in _OPTIONS.items():
        was_sent = name not in form.without and (name != "logprobs" or request.logprobs)
        if was_sent and pattern.search(text):
            return dataclasses.replace(form, without=form.without | {name})
    if request.schema is not None and form.schema != "text" and not said(refused.value):
        return _with_weaker_schema(form)  # it does not say what it refuses
    return None


def _with_weaker_schema(form: Form) -> Form:
    return dataclasses.replace(form, schema=_SCHEMAS[_SCHEMAS.index(form.schema) + 1])


def _check_length(fields: object, text: str) -> None:
    """Raises UserError if a refusal says that the question is too long."""
    if not _TOO_LONG.search(text):
        return
    fields = fields if isinstance(fields, dict) else {}
    if isinstance(fields.get("n_ctx"), int):
        asked = fields.get("n_prompt_tokens")
        raise UserError(
            f"a question of {asked if isinstance(asked, int) else 'too many'} tokens does not fit "
            f"into the server's context, n_ctx = {fields['n_ctx']}; start the server with a larger "
            "one (llama-server: -c, which is divided by --parallel), or ask with fewer or shorter "
            "examples"
        )
    raise UserError(
        f"a question does not fit into the model's context: {fields.get('message', text)}; ask "
        "with fewer or shorter examples"
    )


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a server answered.

    Attributes:
      text: what it said, or why it refused.
      status: "ok", "cut" or "refused".
      prompt_tokens: by the server; None if it does not say.
      completion_tokens: by the server; None if it does not say.
      logprobs: as it gives them, or None.
    """

    text: str
    status: str
    prompt_tokens: int | None
    completion_tokens: int | None
    logprobs: list | None


def read_completion(value: object) -> Completion | None:
    """Returns what the JSON of an answer holds, or None if it is no whole answer."""
    try:
        # Without halves of characters, which JSON may hold and no file does.
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
        choice = value["choices"][0]
        message = choice["message"]
        finish, refusal = choice.get("finish_reason"), message.get("refusal")
        text = _text(message.get("content"))
        logprobs = (choice.get("logprobs") or {}).get("content")
        usage = value.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None
    status = "ok"
    if refusal or finish == "content_filter":
        text, status = str(refusal or text), "refused"
    elif finish == "length":
        status = "cut"
    counts = [count if isinstance(count, int) and count >= 0 else None for count in counts]
    return Completion(text, status, *counts, logprobs if isinstance(logprobs, list) else None)


def _text(content: object) -> str:
    """Returns the text of a message, which may be in parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return content if isinstance(content, str) else ""
