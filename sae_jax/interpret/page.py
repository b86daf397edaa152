"""Writes one HTML page about an SAE: metrics, figures, and what some of its latents respond to.

The page is one file, which needs nothing else.
"""

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Sequence

import numpy as np

from sae_jax import lm, pages, paths, plots
from sae_jax.activations import Store
from sae_jax.evaluate import figures
from sae_jax.evaluate.report import Evaluation
from sae_jax.evaluate.sources import HeldOutRows
from sae_jax.interpret.collect import collect
from sae_jax.interpret.collection import Collection, Example
from sae_jax.interpret.effects import output_tokens
from sae_jax.interpret.text import interval_names, pieces, token_text
from sae_jax.sae import SAE

_EXAMPLES = {"top": 8, "intervals": 4, "per_interval": 2}
_MIN_ROWS = 10  # fewer say little about what a latent responds to
HOW_CHOSEN = (
    f"Not hand-picked: of the latents that fired on {_MIN_ROWS} tokens or more, sorted by density, "
    "{count} at equal steps from the rarest to the most frequent."
)
MOST_LATENTS = 200  # of one page


@dataclasses.dataclass(frozen=True)
class Span:
    """A piece of text as the page shows it.

    Attributes:
      text: the text.
      activation: the latent's largest activation in it.
      strength: the activation as a part of the latent's maximum, 0 to 1.
      peak: whether the latent is most active here of the whole text.
    """

    text: str
    activation: float
    strength: float
    peak: bool


@dataclasses.dataclass(frozen=True)
class LatentView:
    """What the page shows of a latent.

    Attributes:
      index: the number of the latent.
      density: the part of the rows on which it fires.
      mean_activation: its mean activation where it fires.
      max_activation: its largest activation.
      promoted: the output tokens that it promotes most.
      suppressed: the output tokens that it suppresses most.
      top: the texts on which it is most active.
      intervals: texts on which it is less active, as pairs of a title and texts.
    """

    index: int
    density: float
    mean_activation: float
    max_activation: float
    promoted: list[str]
    suppressed: list[str]
    top: list[list[Span]]
    intervals: list[tuple[str, list[list[Span]]]]


def choose_latents(density: np.ndarray, rows: int, count: int) -> np.ndarray:
    """Returns the numbers of up to `count` latents from rare to frequent ones.

    The rule is that of `HOW_CHOSEN`. If too few latents fired often enough, it chooses among all
    that fired. `density` (d_sae,) is the part of the `rows` rows on which each latent fires.
    """
    alive = np.flatnonzero(density * rows > _MIN_ROWS - 0.5)
    if len(alive) < count:
        alive = np.flatnonzero(density > 0)
    alive = alive[np.argsort(density[alive], kind="stable")]
    places = np.linspace(0, len(alive) - 1, min(count, len(alive))).round().astype(int)
    return alive[places]


def write_page(
    out,
    sae: SAE,
    evaluation: Evaluation,
    store: Store,
    tokenizer: lm.Tokenizer,
    model: lm.JaxModel | None = None,
    *,
    metrics_file=None,
    count: int = 30,
    latents: Sequence[int] | None = None,
    collection: Collection | None = None,
    tokens: int = 1_000_000,
    title: str = "Sparse autoencoder",
) -> None:
    """Writes the page to the file `out`, under a temporary name first.

    Args:
      out: the path of the file.
      sae: the SAE.
      evaluation: its metrics.
      store: where texts are looked for.
      tokenizer: what turns the store's tokens into text.
      model: the SAE's language model. Without it no output tokens are shown. They are not shown
        either where a decoder row does not stand for one place in the residual stream.
      metrics_file: the run's metrics.jsonl. Without it no training curves are shown.
      count: how many latents to show.
      latents: the numbers of the latents to show; by default `count`, of all densities.
      collection: their examples; by default they are looked for in the store.
      tokens: about how many of the store's tokens to look at.
      title: the title of the page.

    Raises UserError if the store has no tokens.
    """
    rows, site = evaluation.rows, evaluation.settings["site"]
    sites = ",".join(filter(None, (site, evaluation.settings.get("target_site"))))
    how_chosen = "They were asked for by number."
    if latents is None:
        latents = choose_latents(rows.density, rows.rows, count)
        how_chosen = HOW_CHOSEN.format(count=len(latents))
    with contextlib.ExitStack() as stack:
        if collection is None:
            source = HeldOutRows(store, sites, tokens=tokens, holdout_fraction=None)
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            collection = collect(sae, source, folder / "collected", tokens=tokens, **_EXAMPLES)
        examples = [collection.examples(latent) for latent in latents]
        looked_at = collection.about.settings.get("looked_at", collection.about.rows)
    written = evaluation.settings.get("target_site", site)
    effects = None
    if model is not None and not evaluation.sites:
        effects = output_tokens(sae, model, written, latents)
    views = []
    for place, latent in enumerate(latents):
        found = examples[place]
        top = found[0][0].activations.max() if found[0] else 1.0
        shown = [[spans(tokenizer, e, top) for e in group] for group in found]
        promoted, suppressed = (
            [token_text(tokenizer, t) for t in part[place]] if effects else []
            for part in (effects and effects.promoted, effects and effects.suppressed)
        )
        views.append(
            LatentView(
                int(latent),
                float(rows.density[latent]),
                float(rows.mean_activation[latent]),
                float(max(rows.max_activation[latent], top)),
                promoted,
                suppressed,
                shown[0],
                _named_intervals(shown[1:]),
            )
        )
    html = render(
        title=title,
        sae=sae,
        evaluation=evaluation,
        store=store,
        figures=_figures(evaluation, metrics_file),
        latents=views,
        tokens=looked_at,
        without_effects=model is not None and effects is None,
        how_chosen=how_chosen,
    )
    out = paths.local(out)
    temporary = out.with_name(f"tmp.{out.name}")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(out)


def render(*, title, sae, evaluation, store, figures, latents, tokens, without_effects, how_chosen):
    """Returns the page as HTML.

    Args:
      title: the title of the page.
      sae: the SAE.
      evaluation: its metrics.
      store: where texts were looked for.
      figures: pairs of a kind ("wide" or "half") and an SVG, in the order of the page.
      latents: a `LatentView` for each latent to show.
      tokens: how many tokens were looked at.
      without_effects: whether to say that no output tokens are shown.
      how_chosen: a sentence that says how the latents were chosen.
    """
    return pages.render(
        pathlib.Path(__file__).with_name("page.html"),
        title=title,
        config=sae.config,
        settings=evaluation.settings,
        rows=evaluation.rows,
        metrics=evaluation.rows.scalars,
        spliced=evaluation.spliced,
        sections=evaluation.sections(),
        meta=store.meta,
        figures=figures,
        latents=latents,
        tokens=tokens,
        without_effects=without_effects,
        how_chosen=how_chosen,
    )


def _figures(evaluation: Evaluation, metrics_file) -> list[tuple[str, str]]:
    """Returns pairs of a kind ("wide" or "half") and an SVG, in the order of the page."""
    rows = evaluation.rows
    drawn = []
    if metrics_file is not None:
        svg = plots.inline_svg(figures.training_curves(metrics_file), "Training curves")
        drawn.append(("wide", svg))
    histogram = figures.density_histogram(rows.density, rows.rows)
    strength = figures.density_against_activation(rows.density, rows.mean_activation)
    drawn.append(("half", plots.inline_svg(histogram, "Histogram of latent density")))
    drawn.append(("half", plots.inline_svg(strength, "Mean activation against density")))
    return drawn


def spans(tokenizer: lm.Tokenizer, example: Example, top: float) -> list[Span]:
    """Returns the pieces of an example as a page shows them, beside the latent's maximum `top`."""
    found = []
    for piece in pieces(tokenizer, example.ids, example.start, example.stop):
        part = slice(piece.start - example.start, piece.stop - example.start)
        activation = float(example.activations[part].max())
        peak = piece.start <= example.peak < piece.stop
        found.append(Span(piece.text, activation, min(activation / top, 1.0), peak))
    return found


def _named_intervals(groups) -> list[tuple[str, list[list[Span]]]]:
    names = interval_names(len(groups))
    return [(name, group) for name, group in zip(names, groups, strict=True) if group]
