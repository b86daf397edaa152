"""The rules that hold at each token are those that hold at its characters."""

import numpy as np
import pytest
import world

from sae_jax import lm
from sae_jax.errors import UserError
from sae_jax.interpret.proxies import indicators
from sae_jax.interpret.text import pieces


@pytest.fixture(scope="module")
def tokenizer():
    return lm.load_tokenizer(lm.DEMO_MODEL)


def held(tokenizer, text: str, name: str, **arguments) -> str:
    """The part of a text at whose tokens a rule holds."""
    ids = np.asarray([[tokenizer.bos, *tokenizer.encode(text)]])
    found = indicators(tokenizer, ids, **arguments)
    where = found.of(name)[0]
    shown = pieces(tokenizer, ids[0])
    return "".join(p.text for p in shown if where[p.start : p.stop].all()).strip()


@pytest.mark.parametrize(
    "text, name, expected",
    [
        ("see https://a.org/b?c=1 now", "URLs", "https://a.org/b?c=1"),
        ("write to me@there.org today", "e-mail addresses", "me@there.org"),
        ("the word مرحبا here", "Arabic script", "مرحبا"),
        ("a слово b", "Cyrillic script", "слово"),
        ("one ACGTACGGTA two", "DNA", "ACGTACGGTA"),
        ("so <b class='x'>bold", "HTML tags", "<b class='x'>"),
        ("in 1952 it", "years", "1952"),
        ("call some_name_here now", "snake_case", "some_name_here"),
    ],
)
def test_where_rules_hold(tokenizer, text, name, expected):
    assert held(tokenizer, text, name).replace(" ", "") == expected.replace(" ", "")


def test_a_character_of_several_tokens_is_of_its_script(tokenizer):
    ids = tokenizer.encode("語")
    assert len(ids) > 1
    found = indicators(tokenizer, np.asarray([[tokenizer.bos, *ids]]))
    assert found.of("Han script")[0, 1:].all() and not found.of("Han script")[0, 0]


def test_patterns_of_the_user(tokenizer):
    assert held(tokenizer, "a dog and a cat", "pets", patterns={"pets": "dog|cat"}) == "dog cat"
    with pytest.raises(UserError, match="bad=\\( is no regular expression"):
        indicators(tokenizer, np.zeros((1, 4), int), {"bad": "("})


def test_only_rules_that_tell_tokens_apart(tokenizer):
    found = indicators(tokenizer, lm.pack(world.TEXTS, tokenizer, 32))
    assert len(set(found.names)) == len(found.names) == len(found.kinds) == len(found.array)
    share = found.array.mean(axis=(1, 2))
    assert ((share > 0) & (share < 1)).all()
    with pytest.raises(UserError, match="no rule 'Han'"):
        found.of("Han")
