"""A client of servers with OpenAI's chat protocol, which pays for no answer twice.

Each answer goes into the file of a `Cache` before it is used. So whatever is killed when, the same
program started again asks only what had not been answered.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

from absl import logging

from sae_jax import background, http_posts
from sae_jax.errors import UserError, one_line
from sae_jax.interpret.explain.llm.cache import Cache, Entry
from sae_jax.interpret.explain.llm.chat import (
    Completion,
    Form,
    next_form,
    read_completion,
    request_body,
)
from sae_jax.interpret.explain.llm.json_in_text import find_json
from sae_jax.interpret.explain.llm.pace import Pace
from sae_jax.interpret.explain.llm.questions import Answer, Plan, Request, shown_money
from sae_jax.progress_bar import progress

_AGAIN_TEMPERATURE = 0.5  # at 0 another seed would draw the same answer
_AROUND = 4  # tokens of a message besides its text
_EXAMPLE = "https://api.openai.com/v1"
_ADVICE = {
    401: "is the key right?",
    402: "is the account in credit?",
    403: "may this key use this model?",
    404: "is the address right, up to /chat/completions, and has the server this model?",
}


class _Stopped(Exception):
    """Is raised in threads whose work is no longer wanted."""


class Client:
    """Asks a model questions, several at a time, and keeps each answer in a file.

    Attributes:
      model: the model's name.
      cache: the `Cache` of answers.
    """

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
        """Takes where to ask, and how; it asks nothing yet.

        Args:
          base_url: the server's address, up to /chat/completions, such as
            https://api.openai.com/v1.
          model: the model's name there.
          cache: the path of the file of answers, or a `Cache` that other clients have too.
          key_variable: the name of the environment variable that holds the key; None or "" for a
            server that needs none. On this machine the variable may be absent.
          concurrency: how many questions are under way at a time.
          tokens_per_minute: how many tokens may go in a minute, there and back; None for no limit.
          timeout: how long an answer may take, in seconds, before it is asked for again.
          budget: how much all answers of this model in the cache may cost, those of earlier runs
            too. What is under way when it is spent comes on top.
          price: the cost of a million tokens, (there, back).
          retries: how often a question is asked again whose answer cannot be read. It then has
            another seed, and a temperature of at least 0.5.
          count_tokens: counts the tokens of a text; without it, one for 4 bytes.
          wait: the first pause before a request that failed is sent again, in seconds.

        Raises UserError if the address is none, or a number is out of bounds.
        """
        http_posts.check_address(base_url, _EXAMPLE)
        for name, number in (
            ("concurrency", concurrency),
            ("tokens_per_minute", tokens_per_minute),
        ):
            if number is not None and number < 1:
                raise UserError(f"{name} is {number}; it must be at least 1")
        if price is not None and (len(price) != 2 or not all(0 <= p < float("inf") for p in price)):
            raise UserError(f"the price is {price}; it must be two numbers: there, back")
        if budget is not None and price is None:
            raise UserError("a budget needs the price of tokens: --price=IN,OUT per million")
        self.model, self.cache = model, cache if isinstance(cache, Cache) else Cache(cache)
        self._address = base_url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self._key_variable, self._timeout, self._wait = key_variable, timeout, wait
        self._concurrency, self._retries = concurrency, retries
        self._budget, self._price = budget, price
        self._count = count_tokens or (lambda text: (len(text.encode("utf-8", "replace")) + 3) // 4)
        self._pace, self._form = Pace(tokens_per_minute), Form()
        self._asking, self._lock = threading.Lock(), threading.Lock()
        self._stop = threading.Event()
        self._paid = [0, 0]  # tokens there and back, since this client is
        self._wrong = ""  # with the last answer that cannot be read

    def ask(
        self,
        requests: Sequence[Request],
        check: Callable[[object], str | None] | None = None,
        what: str = "asking",
    ) -> list[Answer]:
        """Returns the answers in the order of the requests.

        Of those that are equal one is sent. What is in the cache is not. Other processes cannot
        write to the cache from then on.

        Args:
          requests: the questions.
          check: says what is wrong with the value of an answer (with its text where no schema was
            asked for), None if nothing is. It is called from several threads.
          what: what is asked, for the progress bar.

        Raises UserError if the key is missing, the server refuses a question or stays away, or the
        budget is spent. Answers that are under way then are waited for and kept.
        """
        with self._asking:
            self.cache.open()
            self._stop.clear()
            keys = [self._hash(request, 0) for request in requests]
            todo = dict(zip(keys, requests, strict=True))
            results = self._results(todo, check)
            shown = progress(results, what, len(todo), "answer", tally=self._tally)
            answers = dict(shown)
            self._warn_of(list(answers.values()))
            return [answers[key] for key in keys]

    def planned(self, requests: Sequence[Request]) -> Plan:
        """Returns what `ask` would send; it sends nothing, and needs no key.

        Raises UserError if the cache is damaged.
        """
        self.cache.read()
        todo = {self._hash(request, 0): request for request in requests}
        calls = [request for key, request in todo.items() if self.cache.get(key) is None]
        sent = sum(map(self._prompt_tokens, calls))
        got = sum(request.max_tokens for request in calls)
        return Plan(len(calls), len(todo) - len(calls), sent, got, self.money(sent, got))

    def money(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Returns what tokens cost, in the unit of the price; None without a price."""
        if self._price is None:
            return None
        return (prompt_tokens * self._price[0] + completion_tokens * self._price[1]) / 1e6

    def _hash(self, request: Request, attempt: int) -> str:
        decides = dataclasses.asdict(request) | {"model": self.model, "attempt": attempt}
        text = json.dumps(decides, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def _prompt_tokens(self, request: Request) -> int:
        return sum(self._count(text) + _AROUND for _, text in request.messages)

    def _tally(self) -> str:
        money = self.money(*self._paid)
        cost = "" if money is None else f", {shown_money(money)}"
        return f"{sum(self._paid):,} tokens paid{cost}"

    def _results(self, todo: dict[str, Request], check) -> Iterator[tuple[str, Answer]]:
        """Yields the key and the answer of each request, as they come."""
        waiting, done = queue.SimpleQueue(), queue.SimpleQueue()
        for item in todo.items():
            waiting.put(item)

        def work() -> None:
            while not self._stop.is_set():
                try:
                    key, request = waiting.get_nowait()
                    done.put((key, self._settled(request, check)))
                except (queue.Empty, _Stopped):
                    return
                except Exception as error:
                    done.put(error)
                    return

        threads = [background.start(work) for _ in range(min(self._concurrency, len(todo)))]
        try:
            for _ in todo:
                result = done.get()
                if isinstance(result, Exception):
                    raise result
                yield result
        except BaseException:  # Ctrl-C too; a second one does not wait
            logging.warning("stopping once the answers that are under way are there")
            raise
        finally:
            self._stop.set()
            concurrent.futures.wait(threads)  # what is under way is paid for

    def _settled(self, request: Request, check) -> Answer:
        """Returns the answer to a request, which is asked again while it cannot be read."""
        sent = got = 0
        for attempt in range(1 + self._retries):
            entry = self._entry(request, attempt)
            sent, got = sent + entry.prompt_tokens, got + entry.completion_tokens
            value, wrong = _judged(request, entry, check)
            if not wrong:
                break
        self._wrong = wrong or self._wrong
        status = "unparsable" if wrong else entry.status
        text = entry.text if entry.status == "ok" else ""
        return Answer(text, None if wrong else value, status, sent, got, entry.logprobs)

    def _entry(self, request: Request, attempt: int) -> Entry:
        """Returns what the server says to a request, from the cache where it is there."""
        key = self._hash(request, attempt)
        if entry := self.cache.get(key):
            return entry
        if attempt:
            request = dataclasses.replace(
                request,
                seed=request.seed + attempt,
                temperature=max(request.temperature, _AGAIN_TEMPERATURE),
            )
        self._check_budget()
        found = self._asked(request)
        sent, got = found.prompt_tokens, found.completion_tokens
        sent = self._prompt_tokens(request) if sent is None else sent
        got = self._count(found.text) if got is None else got
        self._pace.correct(sent + got - self._prompt_tokens(request) - request.max_tokens)
        logprobs = found.logprobs
        spelt = "".join(str(t.get("token")) for t in logprobs or () if isinstance(t, dict))
        if self._key.hidden(spelt) != spelt:
            logprobs = None
        entry = Entry(
            key, self.model, request.prompt, attempt, found.status, found.text, sent, got, logprobs
        )
        self.cache.add(entry)
        with self._lock:
            self._paid = [self._paid[0] + sent, self._paid[1] + got]
        return entry

    def _check_budget(self) -> None:
        if self._budget is None:
            return
        spent = self.money(*self.cache.tokens(self.model))
        if spent >= self._budget:
            raise UserError(
                f"the answers of {self.model} in {self.cache.path} have cost {shown_money(spent)}, "
                f"and the budget is {shown_money(self._budget)}; with a larger one it goes on there"
            )

    @functools.cached_property
    def _key(self) -> http_posts.Key:
        here = http_posts.is_here(self._address)
        if not self._key_variable or here and not os.environ.get(self._key_variable):
            return http_posts.Key("")
        advice = "put the key there, or choose no variable for a server that needs no key"
        key = http_posts.read_key(self._key_variable, "the server's", advice)
        http_posts.check_secrecy(self._address)
        return key

    def _asked(self, request: Request) -> Completion:
        """Sends a request until it is answered."""
        advice = "is the server there, and the address right? The same command goes on"
        return http_posts.until_answered(
            lambda: self._sent(request), self._address, self._wait, advice, self._sleep
        )

    def _sent(self, request: Request) -> Completion:
        """Sends a request once, but again in another form where the server refuses the form."""
        tokens = self._prompt_tokens(request) + request.max_tokens
        while True:
            self._pace.wait(tokens, self._sleep)
            if self._stop.is_set():
                raise _Stopped
            form = self._form
            body = request_body(request, self.model, form)
            try:
                reply = http_posts.post(
                    self._address, body, self._key, "authorization", self._timeout
                )
                return self._read(reply.value)
            except http_posts.Refused as error:
                refused = error
            except http_posts.Again as error:
                self._check_quota(error)
                self._pace.correct(-tokens)
                if error.wait:
                    self._pace.pause(error.wait)
                raise
            self._pace.correct(-tokens)
            self._adapt(form, request, refused)

    def _read(self, value: object) -> Completion:
        """Returns what an answer holds. Raises as `http_posts.post` does if it holds none."""
        if (found := read_completion(value)) is not None:
            return found
        if isinstance(value, dict) and value.get("error"):  # of a server behind this one
            code = value["error"].get("code") if isinstance(value["error"], dict) else None
            what = f"answered with an error{http_posts.said(value)}"
            if isinstance(code, int) and 400 <= code < 500 and not http_posts.may_pass(code):
                raise http_posts.Refused(what, code, value)
            raise http_posts.Again(what, None, value)
        if value is None or isinstance(value, dict) and "choices" in value:
            raise http_posts.Again("gave no whole answer")
        raise UserError(f"{self._address} answers, but not as OpenAI's chat protocol has it")

    def _check_quota(self, error: http_posts.Again) -> None:
        if "insufficient_quota" in json.dumps(error.value):
            raise UserError(f"{self._address} {error}; the account has no money left") from None

    def _adapt(self, form: Form, request: Request, refused: http_posts.Refused) -> None:
        """Remembers the form that the server wants, by its refusal of one.

        Raises UserError if it is not the form that it refuses.
        """
        wanted = next_form(form, request, refused)
        if wanted is None:
            advice = _ADVICE.get(refused.status)
            raise UserError(f"{self._address} {refused}" + (f"; {advice}" if advice else ""))
        with self._lock:
            if self._form != form:  # another thread was first
                return
            self._form = wanted
        logging.warning("%s %s; asking without that from now on", self._address, refused)

    def _sleep(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise _Stopped

    def _warn_of(self, answers: list[Answer]) -> None:
        """Says in the log how many answers are of no use."""
        meanings = (
            ("unparsable", f"cannot be read; the last: {one_line(self._wrong)}"),
            ("cut", "were cut at max_tokens"),
            ("refused", "were refused"),
        )
        for status, meaning in meanings:
            if number := sum(answer.status == status for answer in answers):
                logging.warning("%d of %d answers %s", number, len(answers), meaning)


def _judged(request: Request, entry: Entry, check) -> tuple[object, str | None]:
    """Returns the value of an answer, and what is wrong with it, None if nothing is."""
    if entry.status != "ok":
        return None, None
    value = None
    if request.schema is not None:
        fits, value = find_json(entry.text, request.schema)
        if not fits:
            return None, "it holds no JSON of the schema"
    elif not entry.text.strip():
        return None, "it is empty"
    subject = entry.text if request.schema is None else value
    return value, check(subject) if check else None
