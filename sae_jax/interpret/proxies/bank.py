"""The bank of proxies: what concepts there are in a text, and how much each token is of them.

    scripts     each script of Unicode that the text has, as a log-likelihood ratio
    alphabets   DNA, base64, hexadecimal and binary digits, as log-likelihood ratios
    patterns    regular expressions (`PATTERNS`), such as URLs, numbers, HTML tags and quotes
    documents   each label of a document, where documents have labels

Of ratios what is below 0 counts as 0, and DNA as 1 or 0, as in Bricken et al. 2023; other proxies
are 1 or 0. A token is inside a concept where the proxy is above 0, and inside a script where it is
more likely than not of it: most scripts share the bytes that their characters begin with.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from sae_jax import lm
from sae_jax.errors import choose
from sae_jax.interpret.proxies.indicators import PATTERNS, matches
from sae_jax.interpret.proxies.labels import DocumentLabels
from sae_jax.interpret.proxies.likelihood import (
    ALPHABETS,
    ScriptRatio,
    Unigrams,
    alphabet_ratio,
)
from sae_jax.interpret.proxies.scripts import script_names, scripts_of

GROUPS = ("scripts", "alphabets", "patterns", "documents")
_BY_SIGN = ("DNA",)


@dataclasses.dataclass(frozen=True)
class Proxy:
    """How much each token of a text is of a concept.

    Attributes:
      name: the concept, such as Arabic script, DNA, URLs, or a label.
      kind: the group that it is of: one of `GROUPS`.
      values: the proxy, as said above, (n, T) float32 or bool, never below 0.
      inside: the tokens inside the concept, (n, T) bool.
    """

    name: str
    kind: str
    values: np.ndarray
    inside: np.ndarray


class Bank:
    """Proxies that are fitted to a text, and can be computed of any."""

    def __init__(
        self,
        tokenizer: lm.Tokenizer,
        tokens: np.ndarray,
        used: np.ndarray,
        wanted: Sequence[str] = ("scripts", "alphabets", "patterns"),
        *,
        patterns: Mapping[str, str] | None = None,
        inherit: bool = False,
    ):
        """Chooses proxies and fits them.

        Args:
          tokenizer: what turns tokens into text.
          tokens: token ids of the corpus, (n, T).
          used: which of them count, (n, T) bool.
          wanted: groups of proxies, or names of single ones: a script's, with or without the word
            script, an alphabet's or a pattern's.
          patterns: further regular expressions by name, which are of the group patterns.
          inherit: whether common characters have the script of their neighbours (`ScriptRatio`).

        Raises UserError for a proxy that there is not, and a pattern that is none.
        """
        self._tokenizer = tokenizer
        patterns = {n: p for n, p in PATTERNS.items() if n not in ALPHABETS} | dict(patterns or {})
        self._corpus, self._found = tokens, scripts_of(tokenizer, tokens)
        scripts = {f"{name} script": name for name in script_names()}
        kinds = dict.fromkeys(scripts, "scripts") | dict.fromkeys(ALPHABETS, "alphabets")
        kinds |= dict.fromkeys(patterns, "patterns")
        there = {f"{name} script" for name in self._found.names}
        self._kinds = {name: kinds[name] for name in _chosen(wanted, kinds, there)}
        self._patterns = {n: p for n, p in patterns.items() if n in self._kinds}
        counted = used & ~np.isin(tokens, tokenizer.special_tokens)
        self._unigrams = Unigrams(tokenizer, tokens, counted)
        self._scripts = {
            name: ScriptRatio(script, self._found, tokens, counted, inherit)
            for name, script in scripts.items()
            if name in self._kinds
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the proxies."""
        return tuple(self._kinds)

    def of(self, tokens: np.ndarray, names: Sequence[str] | None = None) -> list[Proxy]:
        """Returns the proxies of a text.

        Args:
          tokens: token ids, (n, T).
          names: which of `names`; None: all.
        """
        kinds = {name: self._kinds[name] for name in (self.names if names is None else names)}
        patterns = {
            name: self._patterns[name] for name, kind in kinds.items() if kind == "patterns"
        }
        matched = matches(self._tokenizer, tokens, patterns) if patterns else {}
        scripts = self._found
        if "scripts" in kinds.values() and tokens is not self._corpus:
            scripts = scripts_of(self._tokenizer, tokens)
        proxies = []
        for name, kind in kinds.items():
            if kind == "patterns":
                values = inside = matched[name]
            elif kind == "scripts":
                ratio, given = self._scripts[name].of(scripts, tokens)
                values, inside = np.maximum(ratio, 0), given > 0.5
            else:
                ratio = alphabet_ratio(self._tokenizer, self._unigrams, tokens, name)
                inside = ratio > 0
                values = inside if name in _BY_SIGN else np.maximum(ratio, 0)
            proxies.append(Proxy(name, kind, values, inside))
        return proxies


def of_documents(labels: DocumentLabels) -> list[Proxy]:
    """Returns a proxy for each label, called LABEL documents: whether a token is of one of them."""
    masks = {f"{name} documents": labels.of(name) for name in labels.names}
    return [Proxy(name, "documents", mask, mask) for name, mask in masks.items()]


def _chosen(wanted: Sequence[str], kinds: Mapping[str, str], there: set[str]) -> list[str]:
    """Returns the names of the proxies that are wanted, in order.

    Args:
      wanted: names of groups and proxies.
      kinds: the group of every proxy that there is.
      there: the scripts that the text has.
    """
    found = {}
    for name in wanted:
        if name in GROUPS:
            of_group = sorted(n for n, kind in kinds.items() if kind == name)
            found |= {n: None for n in of_group if name != "scripts" or n in there}
        elif name in kinds:
            found[name] = None
        elif f"{name} script" in kinds:
            found[f"{name} script"] = None
        else:
            choose(name, (*GROUPS, *kinds), "a proxy")
    return list(found)
