"""Explains every latent by a rule found on half of the text, and tested on the other half."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.special

from sae_jax import lm
from sae_jax.interpret import proxies
from sae_jax.interpret.activity import Activity
from sae_jax.interpret.explain.others import others
from sae_jax.interpret.explain.records import LATENTS, Explanation, Score
from sae_jax.interpret.explain.single_token import single_token
from sae_jax.interpret.explain.statistics.finding import best_rule
from sae_jax.interpret.explain.statistics.indexed_text import IndexedText
from sae_jax.interpret.explain.statistics.rules import Rule
from sae_jax.interpret.explain.statistics.testing import Tested, discoveries, test_rule
from sae_jax.interpret.text import token_text
from sae_jax.progress_bar import progress

METHOD = "rules-1"
"""The method's name and version."""

LEAST_SEQUENCES = 5
"""In how many sequences of each half a latent must be active for anything to be said."""

_SHOWN = 10  # tokens whose lift is told


@dataclasses.dataclass(frozen=True)
class _Found:
    """What was found of a latent: its rule, its F1 on the text for finding, and how it did."""

    rule: Rule
    found_f1: float
    tested: Tested


def by_statistics(
    activity: Activity,
    tokenizer: lm.Tokenizer,
    *,
    latents: Sequence[int] | None = None,
    units: str = LATENTS,
    fdr: float = 0.05,
    least_f1: float = 0.2,
    seed: int = 0,
    indicators: proxies.Indicators | None = None,
) -> tuple[list[Explanation], list[Score]]:
    """Explains latents by rules, and scores each by F1 on held-out text.

    A rule is a token, some tokens, tokens after others, the next token, a script, characters of a
    class, a regular expression, a place in the context, or a shallow tree of these. It claims
    to tell where the latent is active at all. One rule is found for a latent, on the sequences that
    are not held out; the simplest of those within 0.01 of the best F1. On the held-out ones it is
    tested once (see `testing.test_rule`); what is claimed has passed that at the false-discovery
    rate `fdr` over all latents that are asked for, and has F1 of at least `least_f1`. Of others the
    explanation is "". Scores are "f1", with control "shuffled" for the rule of another latent
    that has another rule.

    A long document may have sequences in both halves, so a latent that tells single documents, of
    which each has words or a script of its own, may be claimed to tell these.

    Args:
      activity: where the latents are active.
      tokenizer: what turns tokens into text.
      latents: which latents; all.
      units: what they are, for the records.
      fdr: the rate of false discoveries.
      least_f1: the lowest F1 of a claim.
      seed: the seed of which other latent's rule is the control.
      indicators: what is known of each token of the text; None: `proxies.indicators`.
    """
    if indicators is None:
        indicators = proxies.indicators(tokenizer, activity.tokens)
    finding, testing = (IndexedText(activity, indicators, side) for side in (False, True))
    numbers = list(range(activity.d_sae)) if latents is None else [int(i) for i in latents]
    found = {}
    for latent in progress(numbers, "finding rules", len(numbers), "latent"):
        if (one := _find(finding, testing, activity.of(latent)[0])) is not None:
            found[latent] = one
    tried = list(found)
    holds = discoveries(np.array([found[i].tested.p_value for i in tried]), fdr)
    claimed = {
        latent
        for latent, hold in zip(tried, holds, strict=True)
        if hold and found[latent].tested.f1 >= least_f1
    }
    rates = np.bincount(activity.tokens[activity.used]) / max(activity.about.rows, 1)
    another = others({latent: repr(found[latent].rule) for latent in tried}, seed)
    of_one_token = dict(zip(numbers, single_token(activity, numbers).tolist(), strict=True))
    explanations, scores = [], []

    def score(latent, control, tested, details):
        value, active = (tested.f1, tested.active) if tested else (None, 0)
        details |= _rounded(tested) if tested else {}
        scores.append(
            Score(units, latent, "statistics", METHOD, "f1", control, value, active, 0, details)
        )

    for latent in progress(numbers, "testing rules", len(numbers), "latent"):
        rows, values = activity.of(latent)
        one, label, kind = found.get(latent), "", ""
        about = _about(activity, tokenizer, rates, rows, values)
        about |= {"single_token": of_one_token[latent]}
        details = {"claimed": latent in claimed, "too_seldom": one is None}
        if one is not None:
            label, kind = one.rule.label(tokenizer, indicators.names), one.rule.kind
            details |= {"rule": label, "kind": kind, "found_f1": _short(one.found_f1)}
        said = (label, kind) if latent in claimed else ("", "")
        explanations.append(Explanation(units, latent, "statistics", METHOD, *said, about))
        score(latent, "", one and one.tested, details)
        if (other := another.get(latent)) is not None:
            tested = test_rule(testing, found[other].rule, testing.rows_of(rows))
            score(latent, "shuffled", tested, {"of": other})
    return explanations, scores


def _find(finding: IndexedText, testing: IndexedText, rows: np.ndarray) -> _Found | None:
    """Returns the rule of a latent that is active at these rows of the activity, tested.

    It is None if that is too seldom to say.
    """
    halves = [(text, text.rows_of(rows)) for text in (finding, testing)]
    if min(len(set((own // text.length).tolist())) for text, own in halves) < LEAST_SEQUENCES:
        return None
    (_, to_find), (_, to_test) = halves
    rule, value = best_rule(finding, to_find)
    return _Found(rule, float(value), test_rule(testing, rule, to_test))


def _about(activity: Activity, tokenizer, rates: np.ndarray, rows, values) -> dict:
    """Returns what the tokens on which a latent is active say, beside its rule.

    Args:
      activity: the activity.
      tokenizer: what turns tokens into text.
      rates: what part of the text each token is, (vocabulary,).
      rows: the rows at which the latent is active.
      values: its activations there.
    """
    if not len(rows):
        return {"active": 0}
    ids = activity.tokens.reshape(-1)[rows]
    tokens, which, hits = np.unique(ids, return_inverse=True, return_counts=True)
    mass, total, different = np.bincount(which, values), values.sum(dtype=float), len(tokens)
    order = np.argsort(-mass, kind="stable")[:_SHOWN]
    hits, mass, tokens, expected = hits[order], mass[order], tokens[order], rates[tokens[order]]
    p = scipy.special.bdtrc(hits - 1, len(rows), expected) * different  # Bonferroni
    lift = hits / len(rows) / expected
    return {
        "active": len(rows),
        "coverage": _short(mass[0] / total),
        "tokens": [
            {
                "token": token_text(tokenizer, token),
                "share": _short(mass[i] / total),
                "mean_activation": _short(mass[i] / hits[i]),
                "lift": _short(lift[i]),
                "p_value": _short(min(p[i], 1.0)),
            }
            for i, token in enumerate(tokens.tolist())
        ],
    }


def _rounded(tested: Tested) -> dict:
    found = dataclasses.asdict(tested)
    return {k: _short(v) if isinstance(v, float) else v for k, v in found.items()}


def _short(number) -> float:
    return float(f"{number:.6g}")
