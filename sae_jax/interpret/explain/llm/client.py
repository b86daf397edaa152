"""A client of servers with OpenAI's chat protocol, which pays for no answer twice."""

import dataclasses
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Request:
    """One question: all that decides its answer, and so the key in the cache.

    Attributes:
      messages: (role, text) of each message.
      schema: the JSON schema of the answer; None for free text.
      schema_name: the schema's name, which some models are told.
      prompt: the name and version of the prompt's file; not sent.
      max_tokens: how long the answer may be.
      temperature: of the draw of tokens.
      seed: of the draw of tokens.
      logprobs: of how many tokens at each place the log-probabilities are wanted, 0 for none.
    """

    messages: tuple[tuple[str, str], ...]
    schema: dict | None = None
    schema_name: str = "answer"
    prompt: str = ""
    max_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    logprobs: int = 0


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
      text: the answer; "" if it was refused or cut.
      value: the JSON value in it, where a schema was asked for and it fits that; None elsewhere.
      status: "ok"; "unparsable", where no value could be read or `check` found it wrong, however
        often it was asked; "cut", where it was longer than `max_tokens`; "refused".
      prompt_tokens: how many tokens the question has.
      completion_tokens: how many tokens the answer has.
      logprobs: as the server gives it: of each token {"token", "logprob", "top_logprobs"}.
    """

    text: str
    value: object | None
    status: str
    prompt_tokens: int
    completion_tokens: int
    logprobs: list | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What asking would take at most, if each question is asked once; str() says it in words.

    Attributes:
      calls: how many questions would be sent.
      cached: how many more are answered in the cache.
      prompt_tokens: about how many tokens would be sent.
      completion_tokens: how many tokens may come back.
      money: what that costs at most, by the price; None without a price.
    """

    calls: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    money: float | None


class Client:
    """Asks a model questions, several at a time, and keeps each answer in a file."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        cache,
        key_variable: str | None = "OPENAI_API_KEY",
        concurrency: int = 8,
        tokens_per_minute: int | None = None,
        timeout: float = 300.0,
        budget: float | None = None,
        price: tuple[float, float] | None = None,
        retries: int = 2,
        count_tokens: Callable[[str], int] | None = None,
        wait: float = 1.0,
    ):
        """Takes the server's address up to /chat/completions, and the file of answers."""
        raise NotImplementedError

    def ask(
        self,
        requests: Sequence[Request],
        check: Callable[[object], str | None] | None = None,
        what: str = "",
    ) -> list[Answer]:
        """Returns the answers in the order of the requests."""
        raise NotImplementedError

    def planned(self, requests: Sequence[Request]) -> Plan:
        """Returns what `ask` would send; it sends nothing and needs no key."""
        raise NotImplementedError
