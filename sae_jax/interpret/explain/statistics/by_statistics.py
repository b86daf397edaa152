"""Explains every latent by a rule found on half of the text, and tested on the other half."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.stats

from sae_jax import lm
from sae_jax.interpret import proxies
from sae_jax.interpret.activity import Activity
from sae_jax.interpret.explain.records import LATENTS, Explanation, Score
from sae_jax.interpret.explain.statistics.finding import best_rule
from sae_jax.interpret.explain.statistics.rules import IndexedText, Rule
from sae_jax.interpret.explain.statistics.testing import Tested, discoveries, test_rule
from sae_jax.interpret.hashes import mix
from sae_jax.interpret.text import token_text
from sae_jax.progress_bar import progress

METHOD = "rules-1"
"""The method's name and version."""

LEAST_SEQUENCES = 5
"""In how many sequences of each half a latent must be active for anything to be said."""

_TOP = 20  # strongest sequences that tell whether a latent is one of a single token
_SHOWN = 10  # tokens whose lift is told


@dataclasses.dataclass(frozen=True)
class _Found:
    """What was found of a latent: its rule, where that holds on held-out text, and how it did."""

    rule: Rule
    rows: np.ndarray
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
    explanation is "". Scores are "f1", with control "shuffled" for the rule of another latent.

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
    text = IndexedText(activity, indicators)
    numbers = list(range(activity.d_sae)) if latents is None else [int(i) for i in latents]
    found = {}
    for latent in progress(numbers, "finding rules", len(numbers), "latent"):
        if (one := _find(activity, text, latent)) is not None:
            found[latent] = one
    tried = list(found)
    holds = discoveries(np.array([found[i].tested.p_value for i in tried]), fdr)
    claimed = {
        latent
        for latent, hold in zip(tried, holds, strict=True)
        if hold and found[latent].tested.f1 >= least_f1
    }
    explanations, scores = [], []
    others = dict(zip(tried, _others(tried, seed), strict=True))
    for latent in numbers:
        about = _about(activity, tokenizer, text, latent)
        one = found.get(latent)
        label = one.rule.label(tokenizer, indicators.names) if one and latent in claimed else ""
        kind = one.rule.kind if label else ""
        explanations.append(Explanation(units, latent, "statistics", METHOD, label, kind, about))
        details = {"claimed": bool(label), "too_seldom": one is None}
        if one is None:
            scores.append(Score(units, latent, "statistics", METHOD, "f1", details=details))
            continue
        details |= {"rule": one.rule.label(tokenizer, indicators.names), "kind": one.rule.kind}
        details |= {"found_f1": round(one.found_f1, 6)} | _rounded(one.tested)
        scores.append(
            Score(units, latent, "statistics", METHOD, "f1", "", one.tested.f1,
                  one.tested.active, 0, details)
        )  # fmt: skip
        if others[latent] != latent:
            other = found[others[latent]]
            tested = test_rule(text, other.rule, _half(activity, text, latent, True), other.rows)
            details = {"of": others[latent]} | _rounded(tested)
            scores.append(
                Score(units, latent, "statistics", METHOD, "f1", "shuffled", tested.f1,
                      tested.active, 0, details)
            )  # fmt: skip
    return explanations, scores


def _find(activity: Activity, text: IndexedText, latent: int) -> _Found | None:
    """Returns the rule of a latent, tested; None if the latent is active too seldom to say."""
    halves = [_half(activity, text, latent, side) for side in (False, True)]
    if min(len(np.unique(rows // text.length)) for rows in halves) < LEAST_SEQUENCES:
        return None
    best = best_rule(text, latent, halves[0])
    if best is None:
        return None
    rule, value = best
    rows = rule.rows(text)
    rows = rows[text.held_out[rows]]
    return _Found(rule, rows, float(value), test_rule(text, rule, halves[1], rows))


def _half(activity: Activity, text: IndexedText, latent: int, held_out: bool) -> np.ndarray:
    rows, _ = activity.of(latent)
    return rows[text.held_out[rows] == held_out]


def _others(latents: list[int], seed: int) -> list[int]:
    """Returns another of the latents for each: the next one in an order by hashes."""
    order = np.argsort(mix(np.asarray(latents) + (seed << 32)), kind="stable")
    others = np.empty(len(latents), int)
    others[order] = np.asarray(latents, int)[np.roll(order, 1)]
    return others.tolist()


def _about(activity: Activity, tokenizer, text: IndexedText, latent: int) -> dict:
    """Returns what the tokens on which a latent is active say, beside its rule."""
    rows, values = activity.of(latent)
    if not len(rows):
        return {"active": 0}
    tokens, which, hits = np.unique(text.tokens[rows], return_inverse=True, return_counts=True)
    mass = np.bincount(which, values)
    expected = text.rate(tokens)
    lift = hits / len(rows) / expected
    p = scipy.stats.binom.sf(hits - 1, len(rows), expected) * len(tokens)  # Bonferroni
    order = np.argsort(-mass, kind="stable")[:_SHOWN]
    sequences = rows // text.length
    strongest = np.lexsort((rows, -values))
    _, first = np.unique(sequences[strongest], return_index=True)
    top = text.tokens[rows[strongest[np.sort(first)[:_TOP]]]]
    return {
        "active": len(rows),
        "single_token": bool(len(top) == _TOP and (top == top[0]).all()),
        "coverage": round(float(mass.max() / mass.sum()), 6),
        "tokens": [
            {
                "token": token_text(tokenizer, tokens[i]),
                "share": round(float(mass[i] / mass.sum()), 6),
                "mean_activation": float(f"{mass[i] / hits[i]:.6g}"),
                "lift": float(f"{lift[i]:.4g}"),
                "p_value": float(f"{min(p[i], 1.0):.3g}"),
            }
            for i in order.tolist()
        ],
    }


def _rounded(tested: Tested) -> dict:
    found = dataclasses.asdict(tested)
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in found.items()}
