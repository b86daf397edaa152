"""Tests whether a rule holds on text that it was not found on."""

import dataclasses

import numpy as np
import scipy.special

from sae_jax.interpret.explain.statistics.finding import f1
from sae_jax.interpret.explain.statistics.indexed_text import IndexedText
from sae_jax.interpret.explain.statistics.rules import Rule


@dataclasses.dataclass(frozen=True)
class Tested:
    """How a rule did on the held-out half.

    Attributes:
      precision: the part of the tokens at which it holds on which the latent is active.
      recall: the part of the tokens on which the latent is active at which it holds.
      f1: their harmonic mean.
      active: on how many tokens the latent is active.
      holds: at how many the rule holds.
      p_value: how likely so many hits are if the rule has nothing to do with the latent.
    """

    precision: float
    recall: float
    f1: float
    active: int
    holds: int
    p_value: float


def test_rule(text: IndexedText, rule: Rule, rows: np.ndarray) -> Tested:
    """Returns how a rule tells where a latent is active, on held-out text.

    Tokens of a document depend on each other, so neighbourhoods of the text are what is counted: in
    each, the hits above those expected, of a rule that holds so often and a latent that fires so
    often. The test is a one-sided t test of their sum.

    Args:
      text: the held-out half.
      rule: the rule.
      rows: where the latent is active in it.
    """
    hit, rule_rows = rows[rule.holds(text, rows)], rule.rows(text)
    hits, active, holds = len(hit), len(rows), len(rule_rows)
    density = active / max(len(text.all_rows), 1)
    of_hits, of_rule = (text.neighbourhoods[r // text.length] for r in (hit, rule_rows))
    size = int(text.neighbourhoods.max(initial=-1)) + 1
    surplus = np.bincount(of_hits, minlength=size) - density * np.bincount(of_rule, minlength=size)
    counted = np.count_nonzero(surplus)
    p = 1.0
    if counted > 1:
        t = surplus.sum() / np.sqrt(np.square(surplus).sum())
        p = float(scipy.special.stdtr(counted - 1, -t))
    return Tested(
        hits / holds if holds else 0.0,
        hits / active if active else 0.0,
        float(f1(hits, active, holds)),
        active,
        holds,
        p,
    )


def discoveries(p_values: np.ndarray, rate: float) -> np.ndarray:
    """Returns which tests of many hold at a rate of false discoveries (Benjamini & Hochberg 1995).

    p_values: (n,). The result is (n,) bool.
    """
    if not len(p_values):
        return np.zeros(0, bool)
    order = np.argsort(p_values)
    below = p_values[order] <= rate * np.arange(1, len(p_values) + 1) / len(p_values)
    count = len(below) - int(np.argmax(below[::-1])) if below.any() else 0
    found = np.zeros(len(p_values), bool)
    found[order[:count]] = True
    return found
