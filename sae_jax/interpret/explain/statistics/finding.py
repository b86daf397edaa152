"""Finds the rule that tells best where a latent is active, on the half of the text for finding.

A rule is judged by F1, where each choice that it is made of pays one hit: so a list of tokens that
were seen once each is worth nothing.
"""

import numpy as np

from sae_jax.interpret.explain.statistics.rules import (
    InContext,
    IndexedText,
    Indicated,
    Rule,
    Tokens,
    Tree,
)
from sae_jax.interpret.hashes import mix

_MOST_TOKENS = 32  # of a rule
_ALIKE = 0.01  # of F1: the simpler rule is taken
_GOOD = 0.9  # F1 of a rule beside which no tree is looked for
_DEPTH = 3  # of a tree
_SAMPLE = 2048  # tokens with the latent, and as many without, that a tree is grown on
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


def best_rule(text: IndexedText, latent: int, rows: np.ndarray) -> tuple[Rule, float] | None:
    """Returns the simplest of the best rules for a latent, and its F1; None if none hits at all.

    Args:
      text: the text.
      latent: the latent's number, by which samples are drawn.
      rows: where it is active, in the half for finding.
    """
    found = []  # (rule, hits, at how many tokens it holds)
    for offset in (0, -1, 1):
        found += _token_rules(text, rows, offset)
    found += _in_context(text, rows, found)
    hits, kinds = text.flags(rows).sum(axis=1), np.asarray(text.indicators.kinds)
    for kind in np.unique(kinds):
        members = np.flatnonzero((kinds == kind) & (hits > 0))
        if len(members):
            best = _best_sets(
                members, hits[members], text.flag_counts[members], len(rows),
                lambda i, kind=str(kind): Indicated(i, kind),
            )  # fmt: skip
            found += best if kind == "script" else best[:1]  # only scripts leave each other out
    rated = [(rule, f1(h - rule.cost, len(rows), holds)) for rule, h, holds in found if h]
    if not rated:
        return None
    best = max(value for _, value in rated)
    if best < _GOOD:
        rated += _trees(text, latent, rows, [rule for rule, _ in rated], best)
    best = max(value for _, value in rated)
    near = [pair for pair in rated if pair[1] >= best - _ALIKE]
    return min(near, key=lambda pair: (_SIMPLEST.index(pair[0].kind), -pair[1]))


def _token_rules(text: IndexedText, rows: np.ndarray, offset: int) -> list:
    """Returns the best rules of one token, and of several, `offset` places after the rows."""
    around = text.around(rows, offset)
    tokens, hits = np.unique(around[around >= 0], return_counts=True)
    if not len(tokens):
        return []
    return _best_sets(
        tokens, hits, text.counts(tokens, offset), len(rows), lambda t: Tokens(t, offset)
    )


def _best_sets(tokens, hits, holds, active: int, rule) -> list:
    """Returns (rule, hits, holds) of the best token and of the best set of several.

    The best set for F1 is one of the first in the order of precision.
    """
    one = int(np.argmax(f1(hits - 1, active, holds)))
    found = [(rule((int(tokens[one]),)), int(hits[one]), int(holds[one]))]
    order = np.lexsort((-hits, -(hits - 1) / holds))[:_MOST_TOKENS]
    all_hits, all_hold = np.cumsum(hits[order]), np.cumsum(holds[order])
    count = 1 + int(np.argmax(f1(all_hits - np.arange(1, len(order) + 1), active, all_hold)))
    if count > 1:
        chosen = sorted(order[:count].tolist(), key=lambda i: -hits[i])
        several = tuple(int(tokens[i]) for i in chosen)
        found.append((rule(several), int(all_hits[count - 1]), int(all_hold[count - 1])))
    return found


def _in_context(text: IndexedText, rows: np.ndarray, found: list) -> list:
    """Returns the best rules of tokens after others, for the current tokens that are found best,
    and for those that cover most."""
    current, counts = np.unique(text.tokens[rows], return_counts=True)
    sets = {rule.tokens for rule, _, _ in found if rule.offset == 0}
    sets.add((int(current[np.argmax(counts)]),))
    result = []
    for tokens in sets:
        all_rows = text.rows(np.asarray(tokens))
        all_rows = all_rows[~text.held_out[all_rows]]
        before, holds = np.unique(text.around(all_rows, -1), return_counts=True)
        inside = rows[np.isin(text.tokens[rows], tokens)]
        active = text.around(inside, -1)
        hits = np.bincount(np.searchsorted(before, active), minlength=len(before))
        known = (hits > 0) & (before >= 0)
        if known.any():
            result += _best_sets(
                before[known], hits[known], holds[known], len(rows),
                lambda b, tokens=tokens: InContext(tokens, b),
            )  # fmt: skip
    return result


def _trees(
    text: IndexedText, latent: int, rows: np.ndarray, rules: list[Rule], best: float
) -> list:
    """Returns the tree grown on a sample, with its F1, if that is above `best` on the sample.

    It asks what the text's indicators say of a token and of the two before it, and the rules.
    """
    on = rows[np.argsort(mix(rows + latent), kind="stable")[:_SAMPLE]]
    off = mix(np.arange(4 * _SAMPLE) + (latent << 20)) % np.uint64(len(text.tokens))
    off = off.astype(np.int64)
    off = off[text.used[off] & ~text.held_out[off] & ~np.isin(off, rows)][:_SAMPLE]
    if not len(off):
        return []
    sample = np.concatenate([on, off])
    weights = np.repeat(
        [len(rows) / len(on), (text.found_on - len(rows)) / len(off)], [len(on), len(off)]
    )
    active = np.arange(len(sample)) < len(on)
    kinds = text.indicators.kinds
    asked = [Indicated((i,), kind) for i, kind in enumerate(kinds)]
    asked += [rule for rule in rules if not isinstance(rule, Indicated)]
    answers = np.concatenate(
        [text.flags(sample), [r.holds(text, sample) for r in asked[len(kinds) :]]]
    ).astype(bool)
    leaves = _grow(answers, weights, active, np.ones(len(sample), bool), ())
    hits = np.array([(weights * (inside & active)).sum() for _, inside in leaves])
    holds = np.array([(weights * inside).sum() for _, inside in leaves])
    order = np.argsort(-hits / holds, kind="stable")
    values = f1(np.cumsum(hits[order]), len(rows), np.cumsum(holds[order]))
    paths = _joined([leaves[i][0] for i in order[: 1 + int(np.argmax(values))].tolist()])
    alone = {path[0] for path in paths if len(path) == 1}  # A, or not A and B: A, or B
    paths = [tuple(c for c in path if (c[0], not c[1]) not in alone) for path in paths]
    if values.max() <= best or sum(map(len, paths)) < 2:  # a rule by itself, or none
        return []
    tree = Tree(tuple(tuple((asked[i], wanted) for i, wanted in path) for path in paths))
    where = tree.rows(text)
    hits = tree.holds(text, rows).sum() - tree.cost
    return [(tree, float(f1(hits, len(rows), (~text.held_out[where]).sum())))]


def _joined(paths: list[tuple]) -> list[tuple]:
    """Returns the paths of leaves, of which both below one node are that node."""
    for path in paths:
        beside = (*path[:-1], (path[-1][0], not path[-1][1])) if path else None
        if beside in paths:
            return _joined([p for p in paths if p not in (path, beside)] + [path[:-1]])
    return paths


def _grow(answers, weights, active, inside, path) -> list:
    """Returns the leaves below a node: (path, which of the sample are in it)."""
    if len(path) == _DEPTH or not (inside & active).any() or not (inside & ~active).any():
        return [(path, inside)]
    here = weights * inside
    on, total = answers @ (here * active), answers @ here
    all_on, everything = (here * active).sum(), here.sum()
    impurity = _gini(on, total) + _gini(all_on - on, everything - total)
    best = int(np.argmin(impurity))
    if impurity[best] > _gini(all_on, everything) * (1 - 1e-6):
        return [(path, inside)]
    return [
        leaf
        for wanted in (True, False)
        for leaf in _grow(
            answers, weights, active, inside & (answers[best] == wanted), (*path, (best, wanted))
        )
    ]


def _gini(on, total):
    return on * (total - on) / np.maximum(total, 1e-9)
