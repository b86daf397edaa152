"""Finds the rule that tells best where a latent is active, on the half of the text for finding.

A rule is judged by F1, where each choice that it is made of pays one hit: so a list of tokens that
were seen once each is worth nothing.
"""

import functools

import numpy as np

from sae_jax.interpret.explain.statistics.indexed_text import IndexedText, some
from sae_jax.interpret.explain.statistics.rules import InContext, Indicated, Rule, Tokens, Tree

_MOST_TOKENS = 32  # of a rule
_ALIKE = 0.01  # of F1: the simpler rule is taken
_GOOD = 0.9  # F1 of a rule beside which no tree is looked for
_DEPTH = 3  # of a tree
_BEFORE = 3  # so many tokens before its own a tree asks about
_SAMPLE = 1024  # tokens of a part of the text that a tree is grown on
_SIMPLEST = (
    "token",
    "script",
    "regex",
    "characters",
    "position",
    "tokens",
    "token in context",
    "next token",
    "tree",
)


def f1(hits, active, holds):
    """Returns F1 of rules that hold at `holds` tokens, `hits` of the `active` ones among them."""
    return 2 * hits / np.maximum(active + holds, 1)


def best_rule(text: IndexedText, rows: np.ndarray) -> tuple[Rule, float]:
    """Returns the simplest of the best rules for a latent, and its F1.

    Args:
      text: the half of the text for finding.
      rows: where the latent is active in it, at least one.
    """
    found = []  # (rule, hits, at how many tokens it holds)
    for offset in (0, -1, 1):
        found += _token_rules(text, rows, offset)
    found += _in_context(text, rows, found) + _indicated(text, rows)
    rated = [(rule, f1(hits - rule.cost, len(rows), holds)) for rule, hits, holds in found]
    best = max(value for _, value in rated)
    if best < _GOOD:
        rated += _trees(text, rows, [rule for rule, _ in rated], best)
    best = max(value for _, value in rated)
    near = [pair for pair in rated if pair[1] >= best - _ALIKE]
    return min(near, key=lambda pair: (_SIMPLEST.index(pair[0].kind), -pair[1]))


def _token_rules(text: IndexedText, rows: np.ndarray, offset: int) -> list:
    """Returns the best rules of one token, and of several, `offset` places after the rows."""
    around = text.tokens(rows, offset)
    tokens, hits = np.unique(around[around >= 0], return_counts=True)
    if not len(tokens):
        return []
    return _best_sets(
        tokens, hits, text.counts(tokens, offset), len(rows), lambda t: Tokens(t, offset)
    )


def _best_sets(members, hits, holds, active: int, rule) -> list:
    """Returns (rule, hits, holds) of the best one of some members, and of the best set of several.

    The best set for F1 is one of the first in the order of precision.

    Args:
      members: numbers of tokens or indicators that leave each other out, (m,).
      hits: on how many tokens the latent is active at which each holds.
      holds: at how many it holds.
      active: on how many tokens the latent is active.
      rule: makes a rule of a tuple of members.
    """
    one = int(np.argmax(f1(hits - 1, active, holds)))
    found = [(rule((int(members[one]),)), int(hits[one]), int(holds[one]))]
    order = np.lexsort((-hits, -(hits - 1) / holds))[:_MOST_TOKENS]
    all_hits, all_hold = np.cumsum(hits[order]), np.cumsum(holds[order])
    count = 1 + int(np.argmax(f1(all_hits - np.arange(1, len(order) + 1), active, all_hold)))
    if count > 1:
        chosen = sorted(order[:count].tolist(), key=lambda i: -hits[i])
        several = tuple(int(members[i]) for i in chosen)
        found.append((rule(several), int(all_hits[count - 1]), int(all_hold[count - 1])))
    return found


def _in_context(text: IndexedText, rows: np.ndarray, found: list) -> list:
    """Returns the best rules of tokens after others.

    One side is what was found best of that side alone, or the most frequent token there, and the
    other is the best one beside it.
    """
    result = []
    for known, other in ((0, -1), (-1, 0)):
        sets = {r.tokens for r, _, _ in found if r.offset == known}
        tokens, counts = np.unique(text.tokens(rows, known), return_counts=True)
        if (most := int(tokens[np.argmax(counts)])) >= 0:
            sets.add((most,))
        for tokens in sorted(sets):
            beside = text.tokens(text.rows(tokens, known), other)
            inside = text.tokens(rows[text.is_one(rows, tokens, known)], other)
            members, hits = np.unique(inside[inside >= 0], return_counts=True)
            if not len(members):
                continue
            holds = np.bincount(beside[beside >= 0], minlength=int(members[-1]) + 1)[members]

            def rule(chosen, tokens=tokens, known=known):
                return InContext(chosen, tokens) if known else InContext(tokens, chosen)

            result += _best_sets(members, hits, holds, len(rows), rule)
    return result


def _indicated(text: IndexedText, rows: np.ndarray) -> list:
    """Returns the best rule of each kind of indicator, and the best set of scripts."""
    found, kinds = [], np.asarray(text.indicators.kinds)
    hits = text.flags(rows).sum(axis=0)
    for kind in np.unique(kinds).tolist():
        members = np.flatnonzero((kinds == kind) & (hits > 0))
        if not len(members):
            continue

        def rule(chosen, kind=kind):
            return Indicated(chosen, kind)

        best = _best_sets(members, hits[members], text.flag_counts[members], len(rows), rule)
        found += best if kind == "script" else best[:1]  # only scripts leave each other out
    return found


def _trees(text: IndexedText, rows: np.ndarray, rules: list[Rule], best: float) -> list:
    """Returns the tree grown on a sample, with its F1, if that is above `best` on the sample.

    It asks what the indicators say of a token and of those before it, and the rules.
    """
    kinds = text.indicators.kinds
    rules = [rule for rule in rules if rule.kind not in kinds or rule.cost > 1]
    asked = [*_questions(kinds), *rules]
    sample, weights = _sampled(text, rows, [rule for rule in rules if rule.kind not in kinds])
    drawn = np.concatenate(sample)
    flags = [text.flags(drawn, -before) for before in range(_BEFORE + 1)]
    answers = np.concatenate(flags + [r.holds(text, drawn)[:, None] for r in rules], axis=1)
    inside = np.repeat(np.eye(len(sample), dtype=bool), list(map(len, sample)), axis=1)
    leaves = _grow(answers.astype(np.float32), inside, weights, ())
    counts = np.array([weights * inside.sum(axis=1) for _, inside in leaves])
    hits, holds = counts[:, 0], counts.sum(axis=1)
    order = np.argsort(-hits / holds, kind="stable")
    values = f1(np.cumsum(hits[order]), len(rows), np.cumsum(holds[order]))
    chosen = [leaves[i][0] for i in order[: 1 + int(np.argmax(values))].tolist()]
    if values.max() <= best or () in chosen:
        return []
    short = sorted(simplified(chosen), key=len)
    tree = Tree(tuple(tuple((asked[i], wanted) for i, wanted in leaf) for leaf in short))
    hits = tree.holds(text, rows).sum() - tree.cost
    return [(tree, float(f1(hits, len(rows), len(tree.rows(text)))))]


def _sampled(text: IndexedText, rows: np.ndarray, rules: list[Rule]) -> tuple[list, np.ndarray]:
    """Returns rows on which to grow a tree, in three parts, and how many rows each stands for.

    The parts are where the latent is active; where it is not, but one of the rules holds, which a
    sample of all would have too few of; and elsewhere.
    """
    part = np.full(len(text.used), 2, np.int8)
    for rule in rules:
        part[rule.rows(text)] = 1
    part[rows] = 0
    near = np.flatnonzero(part == 1)
    sample = [some(rows, _SAMPLE), some(near, _SAMPLE), text.sample[part[text.sample] == 2]]
    whole = np.array([len(rows), len(near), len(text.all_rows) - len(near) - len(rows)])
    return sample, whole / np.maximum(list(map(len, sample)), 1)


@functools.lru_cache(8)
def _questions(kinds: tuple[str, ...]) -> list[Indicated]:
    """Returns what a tree asks of every token, by the kinds of the indicators: of each indicator
    whether it holds there, then whether it does at the token before, and so on."""
    return [
        Indicated((i,), kind, -before)
        for before in range(_BEFORE + 1)
        for i, kind in enumerate(kinds)
    ]


def simplified(leaves: list[tuple]) -> list[tuple]:
    """Returns leaves that hold at the same tokens together, with no answer that can be left out.

    A leaf is a tuple of (question, answer). An answer can be left out where the leaf with the other
    answer lies in another leaf: "A; or not A and B" is "A; or B".
    """
    for leaf in leaves:
        for question, answer in leaf:
            rest = tuple(pair for pair in leaf if pair != (question, answer))
            if any({*rest, (question, not answer)} >= set(other) for other in leaves):
                shorter = [one for one in leaves if not set(one) >= set(rest)]
                return simplified([*shorter, rest])
    return leaves


def _grow(answers, inside, weights, path) -> list:
    """Returns the leaves below a node: (path, which of the sample are in it).

    Args:
      answers: what each question says of each token of the sample, (m, questions) float32.
      inside: which tokens of each part of the sample are in the node, (parts, m) bool; the first
        part are those with the latent.
      weights: how many tokens each token of a part stands for, (parts,).
      path: (question, answer) along the way to the node.
    """
    here = weights * inside.sum(axis=1)
    if len(path) == _DEPTH or not here[0] or not here[1:].any():
        return [(path, inside)]
    there = weights[:, None] * (inside.astype(np.float32) @ answers)  # counts, so without rounding
    impurity = _gini(there) + _gini(here[:, None] - there)
    best = int(np.argmin(impurity))
    if impurity[best] > _gini(here) * (1 - 1e-6):
        return [(path, inside)]
    return [
        leaf
        for answer in (True, False)
        for leaf in _grow(
            answers, inside & (answers[:, best] == answer), weights, (*path, (best, answer))
        )
    ]


def _gini(counts: np.ndarray) -> np.ndarray:
    """Returns the impurity of nodes, by how many tokens of each part they have, (parts, ...)."""
    return counts[0] * counts[1:].sum(axis=0) / np.maximum(counts.sum(axis=0), 1e-9)
