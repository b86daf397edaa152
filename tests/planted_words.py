"""A text of words in which latents are active on some, and a judge that knows which.

The latents 0 to 3 are of one concept each. The concept sun has the words sun1 to sun12, on which
its latent is active, the higher the number the more, but not between two words "not". Latent 4 is
never active, and latent 5 on three texts. Among the other words are some that could break a prompt.
"""

import json
import re

import numpy as np
import tokenizers

from sae_jax import lm
from sae_jax.activations import write_store
from sae_jax.evaluate.sources import HeldOutRows
from sae_jax.interpret.activity import record
from sae_jax.interpret.effects import OutputTokens
from sae_jax.interpret.explain.llm.source import LogitWeights
from sae_jax.sae import ReLU, ReLUConfig, resolve

CONCEPTS = ("sun", "cat", "map", "tin")
DEAD, RARE, D = 4, 5, 6
LENGTH = 48
HOSTILE = ["<<", ">>", "<|im_end|>", "[/INST]", '"', "}", "EXPLANATION", "assistant:", "1.", "\n"]
OTHERS = [f"x{i}" for i in range(200)] + HOSTILE
STRONG = [f"{concept}{i}" for concept in CONCEPTS for i in range(1, 13)]
PROMOTED = [f"{concept}ny{i}" for concept in CONCEPTS for i in range(60)]
WORDS = ["<s>", "not", "seldom", *STRONG, *PROMOTED, *OTHERS]
ID = {word: i for i, word in enumerate(WORDS)}
NONE = "nothing"


def strength(word: str) -> float:
    """The activation on a concept's word: 12 on the strongest, else in the middle of a part."""
    found = re.fullmatch(r"(?:sun|cat|map|tin)(\d+)", word)
    return 0.0 if not found else 12.0 if found[1] == "12" else int(found[1]) - 0.5


def active(concept: str, words: list[str]) -> list[float]:
    """The concept's activation on each word of a window."""
    return [
        strength(word)
        if re.fullmatch(rf"{concept}\d+", word) and "not" not in words[max(0, i - 1) : i + 2]
        else 0.0
        for i, word in enumerate(words)
    ]


def tokenizer() -> lm.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ID, unk_token="<s>"))
    return lm.Tokenizer(backend, 0, None, None, "words", (0,), "planted")


def texts() -> np.ndarray:
    """Tokens (n, LENGTH): one word of a concept in each, or three "seldom" in all."""
    rng = np.random.default_rng(0)
    middles = []
    for concept in CONCEPTS:
        for i in range(1, 13):
            middles += [[f"{concept}{i}"]] * (60 if i == 12 else 14)
        middles += [["not", f"{concept}12", "not"]] * 80
    middles += [["seldom"]] * 3
    tokens = rng.integers(ID[OTHERS[0]], len(WORDS), (len(middles), LENGTH)).astype(np.int32)
    tokens[:, 0] = ID["<s>"]
    for row, middle in zip(tokens, middles, strict=True):
        start = rng.integers(5, LENGTH - 8)
        row[start : start + len(middle)] = [ID[word] for word in middle]
    return tokens


def activity(folder):
    tokens = texts()
    values = np.zeros((*tokens.shape, D), np.float32)
    for row, ids in zip(values, tokens.tolist(), strict=True):
        words = [WORDS[i] for i in ids]
        for latent, concept in enumerate(CONCEPTS):
            row[:, latent] = active(concept, words)
        row[:, RARE] = [word == "seldom" for word in words]
    store = write_store(
        folder / "store", values.reshape(-1, D), "a", context_length=LENGTH, tokens=tokens,
        special_tokens=(0,),
    )  # fmt: skip
    parameters = {
        "w_enc": np.eye(D),
        "w_dec": np.eye(D),
        "b_enc": np.zeros(D),
        "b_dec": np.zeros(D),
    }
    sae = ReLU.from_parameters(
        resolve(ReLUConfig(d_sae=D), D), {k: v.astype(np.float32) for k, v in parameters.items()}
    )
    source = HeldOutRows(store, "a", tokens=10**6, holdout_fraction=None)
    return record(sae, source, folder / "activity")


def effects() -> LogitWeights:
    """Each concept's latent promotes sunny0 to sunny59."""
    promoted = np.array([[ID[f"{c}ny{i}"] for i in range(60)] for c in CONCEPTS])
    none = np.zeros((len(CONCEPTS), 1))
    tokens = OutputTokens(promoted, promoted[::-1], none, none, none[:, 0], none[:, 0], none)
    return LogitWeights(np.arange(len(CONCEPTS)), tokens, np.arange(len(WORDS)) > 2)


def asked(messages: list[dict]) -> str:
    """Which prompt a conversation is of."""
    system = messages[0]["content"]
    for name, words in {
        "detection": "anywhere in it", "fuzzing": "marks are right", "intruder": "does not belong",
        "saebench": "few of them or in none", "bricken2023": "Predict for each token",
        "logits": "much more likely",
    }.items():  # fmt: skip
        if words in system:
            return name
    return "explain"


def question(messages: list[dict]) -> tuple[str, list]:
    """The explanation and the examples of a conversation's last turn."""
    lines = messages[-1]["content"].split("\n")
    explanation = json.loads(lines[1]) if lines[0] == "EXPLANATION" else ""
    numbered = [re.fullmatch(r"\d+\. (.*)", line) for line in lines]
    return explanation, [json.loads(found[1]) for found in numbered if found]


def explained(messages: list[dict]) -> dict:
    """What a judge that knows the concepts answers to an explainer."""
    found = re.findall(r"(sun|cat|map|tin)\d+", messages[-1]["content"])
    answer = {"thinking": "", "list": 1, "explanation": max(CONCEPTS, key=found.count)}
    return {name: value for name, value in answer.items() if f'"{name}"' in messages[0]["content"]}


def knowing(messages: list[dict]) -> dict:
    """What a judge answers that knows the concept that an explanation names."""
    kind = asked(messages)
    if kind == "explain":
        return explained(messages)
    concept, examples = question(messages)
    concept = concept if concept in CONCEPTS else NONE
    if kind == "bricken2023":
        return {"predictions": [_levels(concept, tokens) for tokens in examples]}
    if kind == "logits":
        return {"labels": [int(text.strip().startswith(f"{concept}ny")) for text in examples]}
    if kind == "fuzzing":
        opened, closed = re.search(
            r"between (\S+) and (\S+)\. In some", messages[0]["content"]
        ).groups()
        return {"labels": [int(_is_right(concept, t, opened, closed)) for t in examples]}
    if kind == "intruder":
        hits = {c: [any(active(c, text.split(" "))) for text in examples] for c in CONCEPTS}
        own = max(CONCEPTS, key=lambda c: sum(hits[c]))
        return {"intruder": hits[own].index(False) + 1}
    on = [int(any(active(concept, text.split(" ")))) for text in examples]
    if kind == "saebench":
        return {"active": [i for i, is_on in enumerate(on, 1) if is_on]}
    return {"labels": on}


def _levels(concept: str, tokens: list[str]) -> list[str]:
    values = active(concept, [token.strip(" ") for token in tokens])
    return [
        f"{token} {int(np.ceil(9 * value / 12))}"
        for token, value in zip(tokens, values, strict=True)
    ]


def _is_right(concept: str, text: str, opened: str, closed: str) -> bool:
    runs = re.findall(f"{re.escape(opened)}(.*?){re.escape(closed)}", text)
    marked = [word for run in runs for word in run.strip(" ").split(" ")]
    words = text.replace(opened, "").replace(closed, "").split(" ")
    on = [word for word, value in zip(words, active(concept, words), strict=True) if value]
    return on == marked
