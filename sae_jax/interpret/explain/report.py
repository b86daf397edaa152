"""Writes report.html: how well the latents of a whole SAE are explained, and how far to trust it.

The page is one file, which needs nothing else.
"""

import base64
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from sae_jax import lm, pages, paths, plots, tables
from sae_jax.interpret.activity import Activity
from sae_jax.interpret.explain import figures
from sae_jax.interpret.explain.doubts import CONTROL_NAMES
from sae_jax.interpret.explain.examples import Wanted, draw
from sae_jax.interpret.explain.labels import Said, best, common_scorer, gathered, rule_of
from sae_jax.interpret.explain.records import Explanation, Score
from sae_jax.interpret.explain.summary import Summary
from sae_jax.interpret.page import Span, spans

REPORT = "report.html"

_SHOWN = 8  # latents of a sort
_WANTED = Wanted(top=3, intervals=3, per_interval=1, before=16, after=8)
_FIGURES = 60  # of proxies


@dataclasses.dataclass(frozen=True)
class Shown:
    """A latent as the page shows it.

    Attributes:
      latent: its number.
      density: the part of the tokens on which it fires.
      label: the explanation that is chosen of it.
      score: its score by the scorer that chooses.
      said: all that is said of it.
      texts: texts of the held-out half on which it is active, the strongest first.
    """

    latent: int
    density: float
    label: Said
    score: float | None
    said: list[Said]
    texts: list[list[Span]]


def write_report(
    directory,
    summary: Summary,
    explanations: Sequence[Explanation],
    scores: Sequence[Score],
    activity: Activity,
    tokenizer: lm.Tokenizer,
    *,
    title: str,
    scorer: str | None = None,
    about: Sequence[tuple[str, str]] = (),
    seed: int = 0,
) -> pathlib.Path:
    """Writes report.html to a directory, whole or not at all, and returns its path.

    What `explain --proxies` left in the directory's proxies/, table.csv and figures, is shown too.

    Args:
      directory: the directory.
      summary: the summary of the explanations and scores.
      explanations: what is said of the units.
      scores: how well it holds.
      activity: where the latents are active.
      tokenizer: what turns its tokens into text.
      title: the title.
      scorer: the scorer by which the best and the worst are chosen; as for `labels.write_labels`.
      about: what was explained and how, as pairs of a name and a text.
      seed: the seed of the latents that are drawn at random.
    """
    directory = paths.local(directory)
    said = gathered(explanations, scores)
    scorer = scorer or common_scorer(said)
    chosen = best(said, scorer)
    html = pages.render(
        pathlib.Path(__file__).with_name("report.html"),
        title=title,
        about=about,
        activity=activity,
        summary=summary,
        names=CONTROL_NAMES,
        scored=[
            {"of": one, "figures": _figures(one, scores, activity)} for one in summary.of_latents
        ],
        scorer=scorer,
        rule=rule_of(scorer),
        labelled=len(chosen),
        groups=[
            (name, [_shown(i, said[i], *chosen[i], activity, tokenizer) for i in latents])
            for name, latents in _choices(chosen, seed)
        ],
        proxies=_proxies(directory / "proxies"),
    )
    paths.write(directory / REPORT, html)
    return directory / REPORT


def _figures(one, scores: Sequence[Score], activity: Activity) -> list[str]:
    values = figures.scores_of(one, scores)
    if not values:
        return []
    drawn = [plots.inline_svg(figures.distribution(one, values), f"Distribution of {one.name}")]
    if of := values.get(one.units):
        figure = figures.against_density(one, of, activity.density)
        drawn.append(plots.inline_svg(figure, f"{one.name} against density"))
    return drawn


def _choices(
    chosen: Mapping[int, tuple[Said, float | None]], seed: int
) -> list[tuple[str, list[int]]]:
    """Returns the latents to show: the best, the worst, and some at random, each once."""
    scored = [latent for latent, (_, score) in chosen.items() if score is not None]
    order = sorted(scored, key=lambda latent: (-chosen[latent][1], latent))
    count = min(_SHOWN, len(order) // 2)
    top, bottom = order[:count], order[len(order) - count :][::-1]
    rest = sorted(set(chosen) - set(top) - set(bottom))
    drawn = np.random.default_rng(seed).permutation(rest)[:_SHOWN]
    groups = [("The best", top), ("The worst", bottom), ("At random", sorted(drawn.tolist()))]
    return [(name, latents) for name, latents in groups if latents]


def _shown(
    latent: int,
    said: list[Said],
    label: Said,
    score: float | None,
    activity: Activity,
    tokenizer: lm.Tokenizer,
) -> Shown:
    drawn = draw(activity, latent, _WANTED, held_out=True)
    top = float(activity.max_activation[latent]) or 1.0
    texts = [spans(tokenizer, example, top) for example in drawn.active]
    return Shown(latent, float(activity.density[latent]), label, score, said, texts)


def _proxies(folder: pathlib.Path) -> dict | None:
    """Returns the table of proxies and the figures beside it, None where there are none."""
    if not (folder / "table.csv").is_file():
        return None
    rows = [row for _, row in tables.read_csv(folder / "table.csv")]
    files = sorted(folder.glob("*.png"))
    drawn = [(file.stem, base64.b64encode(file.read_bytes()).decode()) for file in files[:_FIGURES]]
    return {"columns": list(rows[0]) if rows else [], "rows": rows, "figures": drawn}
