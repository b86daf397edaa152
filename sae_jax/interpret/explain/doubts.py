"""Says in words what of a summary's scores is to be doubted."""

from collections.abc import Iterator, Sequence

from sae_jax.interpret.explain.comparison import IN_PLACE, Scored, Way
from sae_jax.interpret.explain.records import LATENTS

FEW = 30
"""Of fewer units a mean says little."""

_MANY = 0.05  # of answers that cannot be read

CONTROL_NAMES = {
    "shuffled": "another unit's explanation",
    "none": "an explanation that says nothing",
    "neurons": "neurons of the same site",
    "random": "random directions",
    "shuffled_model": "latents of a model with shuffled weights",
}
"""What controls are, in words."""


def doubts_of(ways: Sequence[Way], scored: Sequence[Scored]) -> list[str]:
    """Returns sentences, each about one way, or one way and scorer, of the latents."""
    found = []
    for way in ways:
        if way.units == LATENTS and way.unparsable > _MANY * way.asked:
            found.append(
                f"{way.by} {way.method}: for {way.unparsable:,} of {way.asked:,} latents the "
                "answer held no explanation that could be read."
            )
    for one in scored:
        if one.units == LATENTS and one.mean.n:
            found += [f"{one.name}: {doubt}." for doubt in _of(one)]
    return found


def _of(one: Scored) -> Iterator[str]:
    mean = one.mean.value
    for control in one.controls:
        of = CONTROL_NAMES.get(control.name, control.name)
        less, several = control.difference, control.several_tokens
        if less.value is None or less.low is None:
            continue
        if less.high < 0:
            verb = "scores" if control.name in IN_PLACE else "score"
            yield f"{of} {verb} higher, {control.mean.value:.3f}, than the latents' {mean:.3f}"
        elif less.low <= 0:
            yield (
                f"{of} may score as well, {control.mean.value:.3f} and "
                f"{mean:.3f}: the difference is {less.value:.3f}, {less.low:.3f} to {less.high:.3f}"
            )
        elif several.low is not None and several.low <= 0:
            yield f"without single-token units {of} may score as well"
    names = {control.name for control in one.controls}
    if one.by and not names & set(IN_PLACE):
        yield "no other explanation was scored in place of these, so it may be easy to score well"
    if not names - set(IN_PLACE):
        yield "no neurons, random directions or latents of a shuffled model were scored beside it"
    if one.chance is not None and one.mean.low is not None and one.mean.low <= one.chance:
        yield f"{mean:.3f} is at chance, which is {one.chance:g}"
    if one.affected > _MANY:
        without = f", and {one.readable.value:.3f} without them" if one.readable.n else ""
        yield (
            f"of {one.affected:.0%} of the latents some answers could not be read; the score is "
            f"{mean:.3f} with them counted as wrong{without}"
        )
    if one.single_token.n and one.several_tokens.n:
        several = one.several_tokens.value
        if mean - several > 0.02:
            yield (
                f"{one.single_token.n:,} of {one.mean.n:,} latents are of a single token, which is "
                f"easy to say; the others score {several:.3f}"
            )
    if one.mean.n < FEW:
        yield f"only {one.mean.n} latents were scored"
