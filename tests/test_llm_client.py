"""The client of chat servers: whatever the server does and whatever is killed, the same answers,
and none is paid for twice; and the key is seen by the server alone. All over real HTTP."""

import datetime
import email.utils
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import judge_server
import pytest
from judge_server import Fault

from sae_jax import http_posts
from sae_jax.errors import UserError
from sae_jax.interpret.explain.llm.cache import Cache
from sae_jax.interpret.explain.llm.client import Client, Request
from sae_jax.interpret.explain.llm.json_in_text import find_json

KEY = "sk-Secret/Key+1"
LIST = {
    "type": "object",
    "properties": {"answers": {"type": "array", "items": {"enum": [0, 1]}}},
    "required": ["answers"],
    "additionalProperties": False,
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing for this machine goes there


def question(number: int, **more) -> Request:
    return Request((("system", "Judge."), ("user", f"question {number}")), LIST, **more)


def judge(body: dict) -> str:
    """Answers question n with n ones."""
    number = int(body["messages"][1]["content"].split()[1])
    return json.dumps({"answers": [1] * number})


QUESTIONS = [question(number) for number in range(6)]
ANSWERS = [[1] * number for number in range(6)]


def client_of(server, tmp_path, **options) -> Client:
    given = {"cache": tmp_path / "cache.jsonl", "key_variable": "MY_KEY", "wait": 0.001}
    return Client(server.base_url, "judge", **(given | options))


def values(answers) -> list:
    assert all(answer.status == "ok" for answer in answers)
    return [answer.value["answers"] for answer in answers]


LATER = email.utils.format_datetime(
    datetime.datetime(2026, 12, 1, 9, 0, 0, tzinfo=datetime.UTC), usegmt=True
)
FAULTS = {
    "429 and seconds": Fault(429, headers={"Retry-After": "0"}),
    "429 and a date": Fault(429, headers={"Retry-After": LATER.replace("2026", "2020")}),
    "503 while it loads": Fault(503, {"error": {"code": 503, "message": "Loading model"}}),
    "408": Fault(408),
    "409": Fault(409),
    "425": Fault(425),
    "500 of HTML": Fault(500, b"<html>"),
    "a hang": Fault(hang=0.5),
    "cut JSON": Fault(cut=True),
    "no answer": Fault(close=True),
    "an error in an answer": Fault(200, {"error": {"code": 502, "message": "upstream"}}),
    "no choice": Fault(200, {"choices": []}),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_passes_is_asked_again_and_paid_once(fault, tmp_path):
    with judge_server.serve(judge, [None, fault, fault]) as server:
        client = client_of(server, tmp_path, concurrency=3, timeout=0.3)
        assert values(client.ask([*QUESTIONS, QUESTIONS[0]])) == [*ANSWERS, ANSWERS[0]]
        assert len(server.calls) == 8
        assert values(client.ask(QUESTIONS)) == ANSWERS
        client.cache.close()
        assert values(client_of(server, tmp_path, concurrency=1).ask(QUESTIONS)) == ANSWERS
        assert len(server.calls) == 8 and list(server.paid.values()) == [1] * 6


def test_all_requests_keep_quiet_for_as_long_as_the_server_asks(tmp_path):
    times = []

    def timed(body):
        times.append(time.monotonic())
        if len(times) == 1:
            return Fault(429, headers={"Retry-After": "0.3"})
        time.sleep(0.05)
        return judge(body)

    with judge_server.serve(timed) as server:
        client = client_of(server, tmp_path, concurrency=2)
        assert values(client.ask(QUESTIONS)) == ANSWERS
        assert times[2] - times[0] >= 0.29  # the second was under way
    pauses = [http_posts.asked_to_wait(headers) for headers in (
        {"retry-after": "7"},
        {"retry-after": LATER, "date": LATER.replace("09:00:00", "08:58:30")},
        {"retry-after": LATER, "date": LATER.replace("09:00:00", "10:00:00")},
        {"retry-after": "soon"}, {"retry-after": "nan"}, {},
    )]  # fmt: skip
    assert pauses == [7, 90, 0, None, None, None]


def picky(refused: dict):
    """A server that takes no request with one of some fields, and says so in its words."""

    def answer(body):
        kind = body.get("response_format", {}).get("type")
        for field, words in refused.items():
            if field in body or field == kind:
                return Fault(400, {"error": {"message": words, "code": None}} if words else b"")
        return judge(body)

    return answer


NO_LIMIT = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
NO_SCHEMA = "response_format.type must be text or json_object"
REFUSALS = {
    "the schema": ({"json_schema": NO_SCHEMA}, 1),
    "all but text": ({"json_schema": NO_SCHEMA, "json_object": "no such response_format"}, 2),
    "in no words": ({"json_schema": "", "json_object": ""}, 2),
    "max_tokens": ({"max_tokens": NO_LIMIT}, 1),
    "each of them": (
        {
            "max_tokens": NO_LIMIT,
            "seed": "Unrecognized request argument supplied: seed",
            "temperature": "'temperature' does not support 0 with this model.",
            "logprobs": "This model does not support logprobs",
            "json_schema": NO_SCHEMA,
        },
        5,
    ),
}


@pytest.mark.parametrize("refused, number", REFUSALS.values(), ids=REFUSALS)
def test_what_a_server_does_not_take_is_put_otherwise_and_remembered(refused, number, tmp_path):
    with judge_server.serve(picky(refused)) as server:
        client = client_of(server, tmp_path, concurrency=1)
        asked = [question(i, logprobs=5) for i in range(6)]
        assert values(client.ask(asked)) == ANSWERS
        assert len(server.calls) == 6 + number
        last = server.calls[-1]
    whole = {"seed": 0, "temperature": 0.0, "logprobs": True, "top_logprobs": 5}
    assert {name: last[name] for name in whole if name in last} == {
        name: value for name, value in whole.items() if name.removeprefix("top_") not in refused
    }
    assert last["max_completion_tokens" if "max_tokens" in refused else "max_tokens"] == 512
    told = json.dumps(LIST) in last["messages"][1]["content"]
    assert told == ("json_schema" in refused)
    if not told:
        schema = {"name": "answer", "strict": True, "schema": LIST}
        assert last["response_format"] == {"type": "json_schema", "json_schema": schema}


def test_a_wrong_answer_is_asked_again_with_another_seed_and_then_is_unparsable(tmp_path, caplog):
    """Question 2 is answered well at once, 3 the third time, 4 never, and 5 in words."""

    def erring(body):
        number = int(body["messages"][1]["content"].split()[1])
        ones = number if number == 2 or number == 3 and body["seed"] == 9 else 1
        return "I cannot say." if number == 5 else json.dumps({"answers": [1] * ones})

    def check(value):
        return None if len(value["answers"]) in (2, 3) else "not of the right length"

    asked = [question(number, seed=7) for number in (2, 3, 4, 5)]
    with judge_server.serve(erring) as server:
        first = client_of(server, tmp_path, concurrency=1)
        answers = first.ask(asked, check)
        assert [a.status for a in answers] == ["ok", "ok", "unparsable", "unparsable"]
        assert [a.value and len(a.value["answers"]) for a in answers] == [2, 3, None, None]
        drawn = [(body["seed"], body["temperature"]) for body in server.calls]
        again = [(7, 0.0), (8, 0.5), (9, 0.5)]
        assert drawn == [(7, 0.0), *again * 3]
        assert "2 of 4 answers cannot be read; the last: it holds no JSON" in caplog.text
        assert answers[2].prompt_tokens == 3 * answers[0].prompt_tokens  # all was paid for
        first.cache.close()
        assert client_of(server, tmp_path).ask(asked, check) == answers
        assert len(server.calls) == 10


def test_what_is_cut_refused_or_empty_is_told_and_kept(tmp_path):
    given = {
        "cut": {"content": '{"answers": [1', "finish_reason": "length"},
        "refused": {"content": None, "refusal": "I will not."},
        "filtered": {"content": "", "finish_reason": "content_filter"},
        "empty": {"content": None},
        "parts": {"content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]},
        "half": {"content": "half \ud800 of a character", "usage": None},
        "logprobs": {"content": "1", "logprobs": [{"token": "1", "logprob": -0.5}]},
    }
    asked = [Request((("user", name),), logprobs=1) for name in given]
    with judge_server.serve(lambda body: given[body["messages"][0]["content"]]) as server:
        first = client_of(server, tmp_path, retries=0)
        answers = dict(zip(given, first.ask(asked), strict=True))
        found = {name: (answer.status, answer.text) for name, answer in answers.items()}
        assert found == {
            "cut": ("cut", ""),
            "refused": ("refused", ""),
            "filtered": ("refused", ""),
            "empty": ("unparsable", ""),
            "parts": ("ok", "a b"),
            "half": ("ok", "half ? of a character"),
            "logprobs": ("ok", "1"),
        }
        assert answers["logprobs"].logprobs == [{"token": "1", "logprob": -0.5}]
        assert answers["cut"].completion_tokens == 2 and answers["half"].completion_tokens == 6
        first.cache.close()
        assert client_of(server, tmp_path, retries=0).ask(asked) == list(answers.values())
        assert len(server.calls) == len(given)


ONE = {"answers": [1, 0]}
TEXTS = {
    '{"answers": [1, 0]}': ONE,
    'Sure!\n```json\n{"answers": [1, 0]}\n```\nAsk me more {about} it [1].': ONE,
    '<think>Perhaps {"answers": [0, 0]}?</think> {"answers": [1, 0]}': ONE,
    "The answers: [1, 0].": ONE,
    '{"answers": [1, 0],}': ONE,
    '{"answers": [1, 2]}': None,
    '{"answers": [1, 0': None,
    '{"answers": [true, NaN]}': None,
    "[" * 3000: None,
    "": None,
}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:30])
def test_the_value_in_a_text(text):
    assert find_json(text, LIST) == (TEXTS[text] is not None, TEXTS[text])


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[3])
from test_llm_client import QUESTIONS, Client, values
while True:  # each try is a process of its own; the modules are read once
    child = os.fork()
    if child == 0:
        with open(sys.argv[2] + ".pid", "w") as file:
            file.write(str(os.getpid()))
        client = Client(sys.argv[1], "judge", cache=sys.argv[2], concurrency=int(sys.argv[4]))
        print(values(client.ask(QUESTIONS)), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", [1, 3])
def test_kills_between_any_two_calls(concurrency, tmp_path):
    """SIGKILL of the process at each call: the same file in the end, and no call paid twice that
    was not under way with the one at which the process was killed."""
    cache, killed, lock = tmp_path / "killed.jsonl", set(), threading.Lock()

    def deadly(body):
        number = body["messages"][1]["content"]
        with lock:
            if number not in killed:
                killed.add(number)
                os.kill(int(pathlib.Path(f"{cache}.pid").read_text()), signal.SIGKILL)
                return Fault(close=True)
        return judge(body)

    with judge_server.serve(deadly) as server:
        program = [sys.executable, "-W", "ignore", "-c", KILLED]
        arguments = [server.base_url, cache, pathlib.Path(__file__).parent, concurrency]
        done = subprocess.run(
            [*program, *map(str, arguments)], capture_output=True, text=True, check=True
        )
        assert json.loads(done.stdout) == ANSWERS
        assert len(killed) == len(server.paid) == 6
        assert sum(server.paid.values()) <= 6 + 6 * (concurrency - 1)
        client_of(server, tmp_path, concurrency=1).ask(QUESTIONS)
    killed, whole = cache.read_bytes(), (tmp_path / "cache.jsonl").read_bytes()
    assert sorted(killed.splitlines()) == sorted(whole.splitlines())
    assert concurrency > 1 or killed == whole


def test_a_line_that_was_cut_is_dropped_and_a_damaged_one_named(tmp_path):
    file = tmp_path / "cache.jsonl"
    with judge_server.serve(judge) as server:
        client_of(server, tmp_path, concurrency=1).ask(QUESTIONS[:3])
        whole = file.read_bytes()
        last = whole.rindex(b"\n", 0, -1) + 1
        for end in (last + 1, last + 40, len(whole) - 1):
            file.write_bytes(whole[:end])
            client = client_of(server, tmp_path)
            assert client.planned(QUESTIONS[:3]).calls == 1  # which changes nothing
            assert file.read_bytes() == whole[:end]
            assert values(client.ask(QUESTIONS[:3])) == ANSWERS[:3]
            assert file.read_bytes() == whole
            client.cache.close()
        assert len(server.calls) == 3 + 3
        for damaged in (whole.replace(b"{", b"", 1), whole.replace(b'"text"', b'"tent"', 1)):
            file.write_bytes(damaged)
            with pytest.raises(UserError, match="line 1 of .*cache.jsonl.*take that line out"):
                client_of(server, tmp_path).ask(QUESTIONS)
        assert len(server.calls) == 6


def test_a_cache_is_of_one_process_at_a_time_and_of_several_clients(tmp_path):
    with judge_server.serve(judge) as server:
        cache = Cache(tmp_path / "cache.jsonl")
        first, second = (client_of(server, tmp_path, cache=cache) for _ in range(2))
        other = client_of(server, tmp_path)  # a lock is of an open file: as of another process
        assert values(first.ask(QUESTIONS)) == values(second.ask(QUESTIONS)) == ANSWERS
        with pytest.raises(UserError, match="another process asks for .*cache.jsonl"):
            other.ask(QUESTIONS)
        assert other.planned(QUESTIONS).cached == 6
        cache.close()
        assert values(other.ask(QUESTIONS)) == ANSWERS and len(server.calls) == 6
    with pytest.raises(UserError, match="cannot write .*cache.jsonl/x"):
        Cache(tmp_path / "cache.jsonl" / "x").open()


def test_no_more_at_a_time_and_no_more_tokens_a_minute_than_allowed(tmp_path):
    lock, now, most, times = threading.Lock(), [0], [0], []

    def slow(body):
        with lock:
            times.append(time.monotonic())
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return {"content": "yes", "usage": {"prompt_tokens": 6, "completion_tokens": 94}}

    asked = [Request((("user", f"{i:08}"),), max_tokens=94) for i in range(9)]
    with judge_server.serve(slow) as server:
        client_of(server, tmp_path, concurrency=4).ask(asked)
        assert most == [4]
        times.clear()
        limits = {"concurrency": 4, "tokens_per_minute": 120_000, "cache": tmp_path / "other"}
        client_of(server, tmp_path, **limits).ask(asked)
    assert times[-1] - times[0] >= 8 * 0.049  # 100 tokens are 0.05 s


def test_a_plan_in_money_and_a_budget(tmp_path, monkeypatch):
    usage = {"prompt_tokens": 1000, "completion_tokens": 100}
    asked = [Request((("user", "x" * 40),), max_tokens=20, seed=i) for i in range(6)]
    with judge_server.serve(lambda body: {"content": "y", "usage": usage}) as server:
        options = {"price": (1.0, 10.0), "concurrency": 1}
        client = client_of(server, tmp_path, budget=0.005, **options)  # 0.002 an answer
        monkeypatch.delenv("MY_KEY")
        plan = client.planned([*asked, asked[0]])
        assert (plan.calls, plan.cached, plan.prompt_tokens, plan.completion_tokens) == (
            6, 0, 6 * 14, 6 * 20
        )  # fmt: skip
        assert plan.money == pytest.approx((84 * 1 + 120 * 10) / 1e6)
        assert str(plan).startswith("6 calls (0 more are in the cache): about 84 tokens to send")
        assert "costs at most 0.0013" in str(plan)
        assert not (tmp_path / "cache.jsonl").exists() and not server.calls
        counted = client_of(server, tmp_path, count_tokens=len, cache=tmp_path / "other")
        assert counted.planned(asked[:1]).prompt_tokens == 44
        with pytest.raises(UserError, match="have cost 0.0060, and the budget is 0.0050"):
            client.ask(asked)
        assert len(server.calls) == 3 and client.planned(asked).cached == 3
        client.cache.close()
        again = client_of(server, tmp_path, budget=0.005, **options)  # nor by starting again
        assert len(again.ask(asked[:3])) == 3
        with pytest.raises(UserError, match="the budget is"):
            again.ask(asked)
        again.cache.close()
        assert len(client_of(server, tmp_path, budget=1.0, **options).ask(asked)) == 6
        assert len(server.calls) == 6


def everything_of(error: BaseException) -> str:
    """All that an exception shows, and those that it came from."""
    parts = []
    while error is not None:
        parts += [repr(error), str(error), repr(vars(error))]
        error = error.__cause__ or error.__context__
    return " ".join(parts)


CUT_KEY = "x" * (300 - 5) + KEY  # which a message that is shortened would cut
OVERFLOW = {"type": "exceed_context_size_error", "n_prompt_tokens": 1234, "n_ctx": 512}
QUOTA = {"code": "insufficient_quota", "message": "You exceeded your current quota"}
TOLD = {
    "401": (Fault(401, {"error": {"message": f"bad key {KEY}"}}), "401 .bad key .*is the key"),
    "a long refusal": (Fault(403, {"error": CUT_KEY}), "answered 403 .*may this key"),
    "escaped": (Fault(404, b'{"error": "\\u0073k-Secret\\/Key+1"}'), r"404 \(\*\*\*\)"),
    "400": (Fault(400, {"error": {"message": "no such model", "param": "model"}}), "400 .no such"),
    "context": (Fault(400, {"error": OVERFLOW}), "question of 1234 tokens .* n_ctx = 512; start"),
    "openai's": (
        Fault(400, {"error": {"message": "maximum context length is 8192 tokens"}}),
        "does not fit into the model's context: maximum context length is 8192",
    ),
    "no money": (Fault(429, {"error": QUOTA}), "the account has no money left"),
    "tomorrow": (Fault(429, headers={"Retry-After": "40000"}), "asks to wait 40000 s"),
    "redirect": (
        Fault(307, headers={"Location": f"https://evil/{KEY}"}),
        "points to https://evil/",
    ),
    "another protocol": (Fault(200, {"hello": KEY}), "not as OpenAI's chat protocol"),
}


@pytest.mark.parametrize("fault, says", TOLD.values(), ids=TOLD)
def test_what_does_not_pass_is_told_at_once_and_without_the_key(fault, says, tmp_path, caplog):
    with judge_server.serve(judge, [None, fault]) as server:
        client = client_of(server, tmp_path, concurrency=1)
        with pytest.raises(UserError, match=says) as error:
            client.ask(QUESTIONS)
        assert len(server.calls) == 2
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        assert client.planned(QUESTIONS).cached == 1
    shown = everything_of(error.value) + caplog.text
    assert KEY not in shown and KEY[:5] not in shown
    assert KEY not in repr(client) + repr(vars(client))


def test_the_key_is_not_kept_or_logged_where_a_server_repeats_it(tmp_path, caplog):
    tokens = [{"token": KEY[:4], "logprob": -1.0}, {"token": KEY[4:], "logprob": -1.0}]
    faults = [Fault(503, {"error": f"no {KEY}"}), Fault(503, CUT_KEY.encode())]
    says = {"content": f"Your key is {KEY}.", "logprobs": tokens}
    with caplog.at_level(logging.INFO):
        with judge_server.serve(lambda body: says, faults) as server:
            client = client_of(server, tmp_path)
            (answer,) = client.ask([Request((("user", "What is my key?"),), logprobs=1)])
    assert answer.text == "Your key is ***." and answer.logprobs is None
    kept = (tmp_path / "cache.jsonl").read_text()
    assert "no ***" in caplog.text and KEY[4:] not in caplog.text + kept


def test_a_server_that_stays_away(tmp_path):
    with judge_server.serve(judge, [None, *[Fault(503)] * http_posts.TRIES]) as server:
        with pytest.raises(UserError, match="answered 503 8 times; is the server there"):
            client_of(server, tmp_path, concurrency=1, wait=1e-4).ask(QUESTIONS)
        assert len(server.calls) == 9
    assert len((tmp_path / "cache.jsonl").read_bytes().splitlines()) == 1


def test_what_is_under_way_when_one_fails_is_kept(tmp_path):
    def answer(body):
        if "question 0" in body["messages"][1]["content"]:
            time.sleep(0.1)
            return Fault(401)
        time.sleep(0.3)
        return judge(body)

    with judge_server.serve(answer) as server:
        client = client_of(server, tmp_path, concurrency=3)
        with pytest.raises(UserError, match="401"):
            client.ask(QUESTIONS)
        assert len(server.calls) == 3 and client.planned(QUESTIONS).cached == 2


WRONG = {
    "no address": ("judge.example/v1", {}, "is no address"),
    "another scheme": ("ftp://judge.example", {}, "is no address"),
    "no port": ("https://judge.example:x/v1", {}, "is no address"),
    "a password": (f"https://{KEY[:9]}:{KEY[:9]}@judge.example", {}, "holds a password"),
    "a key": (f"https://judge.example/v1?key={KEY}", {}, "has a part after"),
    "in the clear": ("http://judge.example/v1", {}, "in the clear; write https://"),
    "no key": ("https://judge.example/v1", {"key_variable": KEY}, "key is not set"),
    "no concurrency": ("https://judge.example/v1", {"concurrency": 0}, "concurrency is 0"),
    "no price": ("https://judge.example/v1", {"budget": 1}, "a budget needs the price"),
    "half a price": ("https://judge.example/v1", {"price": (1,)}, "must be two numbers"),
}


@pytest.mark.parametrize("url, options, says", WRONG.values(), ids=WRONG)
def test_what_cannot_be_asked(url, options, says, tmp_path):
    given = {"cache": tmp_path / "cache.jsonl", "key_variable": "MY_KEY"} | options
    with pytest.raises(UserError, match=says) as error:
        Client(url, "judge", **given).ask(QUESTIONS)
    assert KEY[:9] not in everything_of(error.value)


def test_a_server_on_this_machine_needs_no_key(tmp_path):
    with judge_server.serve(judge) as server:
        client = client_of(server, tmp_path, key_variable="NOT_SET")
        assert values(client.ask(QUESTIONS)) == ANSWERS
        assert not any("Authorization" in headers for headers in server.headers)
        assert client.ask([]) == []
