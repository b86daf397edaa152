"""Log-likelihood ratios of a concept at each token (Bricken et al. 2023, "Towards Monosemanticity",
the appendix on feature proxies).

The proxy at a token is the largest log P(s | concept) / P(s) of the substrings s, whole tokens of
one context, that end with it. P(s) is the product of the probabilities of its tokens in the corpus.

A concept that is an alphabet gives each character of it the same probability, and 1e-10 to any
other. A script goes by Bayes: the ratio is P(script | s) / P(script), where P(script | s) is 1 if
all characters are of the script, and else 1e-10; so no substring is better than the last token, or
the whole character that it ends. A token that ends no character, spaces aside, has the share of
its occurrences in the corpus that belong to the script.
"""

import string

import numpy as np

from sae_jax import lm
from sae_jax.interpret.proxies.scripts import OTHER, Scripts
from sae_jax.interpret.text import token_bytes

ELSEWHERE = 1e-10
ALPHABETS = {
    "DNA": (("ACGT",), 2),
    "base64": ((string.ascii_letters + string.digits + "+/",), 3),
    "hexadecimal": ((string.digits + "abcdef", string.digits + "ABCDEF"), 4),
    "binary digits": (("01",), 4),
}
"""The alphabets of each concept, of which the likelier counts, and the fewest tokens of a
substring: a short one, as one letter A or a rare piece of a word, says little."""


class Unigrams:
    """The probabilities of tokens in a corpus.

    Attributes:
      logs: their logarithms, (vocabulary,) float64; a token that is not in it counts as seen once.
        Special tokens have infinity, which no substring with them survives.
    """

    def __init__(self, tokenizer: lm.Tokenizer, tokens: np.ndarray, used: np.ndarray):
        """Counts the used tokens: token ids (n, T), and which count, (n, T) bool."""
        size = max(tokenizer.vocab_size, int(tokens.max(initial=0)) + 1)
        counts = np.bincount(tokens[used], minlength=size)
        counts[list(tokenizer.special_tokens)] = 0
        self.logs = np.log(np.maximum(counts, 1) / max(counts.sum(), 1))
        self.logs[list(tokenizer.special_tokens)] = np.inf


def largest_sums(increments: np.ndarray, least: int) -> np.ndarray:
    """Returns the largest sum of `least` or more numbers in a row that end at each, (n, T).

    It is -inf where fewer are before it. increments: the numbers, (n, T).
    """
    best = increments.copy()
    for i in range(1, best.shape[1]):
        best[:, i] += np.maximum(best[:, i - 1], 0)
    for _ in range(least - 1):
        before = np.full_like(best, -np.inf)
        before[:, 1:] = best[:, :-1]
        best = increments + before
    return best


def alphabet_ratio(
    tokenizer: lm.Tokenizer, unigrams: Unigrams, tokens: np.ndarray, name: str
) -> np.ndarray:
    """Returns the proxy of one of `ALPHABETS` at each token of token ids (n, T), float32."""
    alphabets, least = ALPHABETS[name]
    present, place = np.unique(tokens, return_inverse=True)
    texts = [token_bytes(tokenizer, i).decode(errors="replace") for i in present.tolist()]
    found = []
    for alphabet in alphabets:
        inside = np.array([sum(c in alphabet for c in text) for text in texts])
        others = np.array([len(text) for text in texts]) - inside
        log_given = -inside * np.log(len(alphabet)) + others * np.log(ELSEWHERE)
        increments = log_given - unigrams.logs[present]
        found.append(largest_sums(increments[place].reshape(tokens.shape), least))
    return np.max(found, axis=0).astype(np.float32)


class ScriptRatio:
    """The proxy of a script, fitted to a corpus.

    Attributes:
      name: the script's name.
      prior: P(script), the mean of P(script | token) over the corpus.
    """

    def __init__(
        self, name: str, found: Scripts, tokens: np.ndarray, used: np.ndarray, inherit: bool
    ):
        """Takes the scripts of a corpus, its token ids (n, T), and which count, (n, T) bool.

        inherit: whether common characters, such as spaces and commas, have the script of their
          neighbours.
        """
        self.name, self._inherit = name, inherit
        known = found.is_part & (found.codes != OTHER)
        parts, ours = tokens[known], found.codes[known] == found.code(name)
        size = int(tokens.max(initial=0)) + 1
        of_all, of_ours = (np.bincount(t, minlength=size) for t in (parts, parts[ours]))
        self._share = of_ours / np.maximum(of_all, 1)
        self.prior = max(float(self._given(found, tokens)[used].mean()), ELSEWHERE)

    def of(self, found: Scripts, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the proxy at each token of token ids (n, T) with these scripts, float32, and
        P(script | token).
        """
        given = self._given(found, tokens)
        return np.log(np.maximum(given, ELSEWHERE) / self.prior).astype(np.float32), given

    def _given(self, found: Scripts, tokens: np.ndarray) -> np.ndarray:
        """Returns P(script | token) at each token, (n, T)."""
        codes = found.inherited() if self._inherit else found.codes
        known = np.minimum(tokens, len(self._share) - 1)
        share = np.where(tokens < len(self._share), self._share[known], 0.0)
        whole = (codes == found.code(self.name)) if self.name in found.names else False
        return np.where(found.is_part, share, whole)
