"""Questions to a language model, and what comes back."""

import dataclasses


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
      prompt_tokens: how many tokens were sent for it, over all times that it was asked.
      completion_tokens: how many tokens came back for it, over all times.
      logprobs: as the server gives it: of each token {"token", "logprob", "top_logprobs"}; None if
        it gives none.
    """

    text: str
    value: object | None
    status: str
    prompt_tokens: int
    completion_tokens: int
    logprobs: list | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What asking takes, if each question is asked once; str() says it in words.

    Attributes:
      calls: how many questions would be sent.
      cached: how many more are answered in the cache.
      prompt_tokens: about how many tokens would be sent.
      completion_tokens: how many tokens may come back at most.
      money: what that costs at most, in the unit of the price; None without a price.
    """

    calls: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    money: float | None

    def __str__(self) -> str:
        """Returns the plan in words."""
        cost = "" if self.money is None else f", which costs at most {shown_money(self.money)}"
        return (
            f"{self.calls:,} calls ({self.cached:,} more are in the cache): about "
            f"{self.prompt_tokens:,} tokens to send and at most {self.completion_tokens:,} to get"
            f"{cost}; questions whose answers cannot be read are asked again on top"
        )


def shown_money(money: float) -> str:
    """Returns an amount for a message, with two decimals, or four below 1."""
    return f"{money:,.2f}" if money >= 1 else f"{money:.4f}"
