"""Puts attributions together for people: the largest of all SAEs, beside exact ablations."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from sae_jax import lm, pages, paths, plots, tables
from sae_jax.errors import UserError, choose
from sae_jax.interpret.attribution import (
    METHODS,
    Attribution,
    Target,
    ablate,
    attribute,
    correlation,
)
from sae_jax.interpret.effects import output_tokens
from sae_jax.interpret.placed import Placed
from sae_jax.interpret.text import Piece, pieces, token_text
from sae_jax.json_files import read_json

_PROMOTED = 5  # tokens of a latent
_SHOWN = 18  # characters of a promoted token in the table


@dataclasses.dataclass(frozen=True)
class Row:
    """A latent at a position.

    Attributes:
      sae: the name of its SAE.
      site: the site that the SAE writes.
      latent: the latent's number.
      position: the position in the context.
      token: the text there.
      activation: the latent's activation, in the model's units.
      attribution: its contribution to the target, by the gradient.
      ablation: by how much the target falls without it.
      promoted: the output tokens that the latent promotes most, or None where there are none.
      label: what the latent is called, or None.
    """

    sae: str
    site: str
    latent: int
    position: int
    token: str
    activation: float
    attribution: float
    ablation: float
    promoted: list[str] | None
    label: str | None


@dataclasses.dataclass(frozen=True)
class Report:
    """Attributions of one target.

    Attributes:
      settings: what was attributed to what, and how.
      value: the target in the untouched model.
      pieces: the text of the context, cut between characters and as finely as tokens are.
      found: the attributions of each SAE.
      rows: latents at positions, the largest first: by their ablations where the method is that,
        else by their attributions.
    """

    settings: dict
    value: float
    pieces: list[Piece]
    found: list[Attribution]
    rows: list[Row]

    @property
    def correlation(self) -> float | None:
        """Pearson's correlation of attributions and ablations, None where one does not vary."""
        return correlation(
            np.array([row.attribution for row in self.rows]),
            np.array([row.ablation for row in self.rows]),
        )

    def in_both(self, count: int = 10) -> tuple[int, int] | None:
        """Returns how many of the `count` largest by ablation are among as many by attribution, and
        by activation; None where there are fewer."""
        if len(self.rows) < count:
            return None

        def largest(name):
            size = [-abs(getattr(row, name)) for row in self.rows]
            return {int(i) for i in np.argsort(size, kind="stable")[:count]}

        by_ablation = largest("ablation")
        return tuple(len(by_ablation & largest(name)) for name in ("attribution", "activation"))

    def to_dict(self) -> dict:
        """Returns what attribution.json holds."""
        return {
            "settings": self.settings,
            "value": self.value,
            "tokens": _token_texts(self.pieces),
            "correlation_with_ablation": self.correlation,
            "saes": [
                {
                    "name": a.placed.name,
                    "site": a.placed.site,
                    "target_site": a.placed.target_site,
                    "active": a.active.tolist(),
                    "latents": a.total.tolist(),
                    "constant": a.constant.tolist(),
                    "error": a.error.tolist(),
                    "without_latents": a.without_latents,
                    "gap": a.gap,
                }
                for a in self.found
            ],
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def table(self, count: int) -> str:
        """Returns the first `count` rows for people."""
        several = len(self.found) > 1
        names = [row.sae for row in self.rows[:count]]
        width = max([3, *map(len, names)]) if several else 0
        head = f"{'SAE':{width}}  " if several else ""
        lines = [
            f"{head}{'latent':>8} {'at':>4}  {'token':14} {'activation':>10} "
            f"{'attribution':>11} {'ablation':>9}  promotes"
        ]
        for row in self.rows[:count]:
            name = f"{row.sae:{width}}  " if several else ""
            said = " ".join(repr(t[:_SHOWN]) for t in row.promoted or ())
            if row.label:
                said = f"{row.label}  ({said})" if said else row.label
            lines.append(
                f"{name}{row.latent:>8} {row.position:>4}  {row.token[:14]:14} "
                f"{row.activation:>10.4g} {row.attribution:>11.4g} {row.ablation:>9.4g}  {said}"
            )
        return "\n".join(lines)

    def notes(self) -> list[str]:
        """Returns sentences about what the attributions add up to, and how exact they are."""
        out = []
        for a in self.found:
            name = f"{a.placed.name}: " if len(self.found) > 1 else ""
            latents, constant, error = (
                float(part.sum()) for part in (a.total, a.constant, a.error)
            )
            if a.without_latents is None:
                out.append(
                    f"{name}latents {latents:.4g}, bias {constant:.4g} and what the SAE leaves "
                    f"over {error:.4g} add up to activation times gradient (to {a.gap:.1e} of it)"
                )
            else:
                out.append(
                    f"{name}latents add up to {latents:.4g}; without them the target is "
                    f"{a.without_latents:.4g}, so they make {a.value - a.without_latents:.4g} of "
                    f"it ({a.gap:.1%} missing: more --steps make it less)"
                )
        if self.correlation is not None:
            out.append(
                f"correlation of attributions and ablations: {self.correlation:.3f} ("
                f"{len(self.rows)} latents at positions)"
            )
        if both := self.in_both():
            out.append(
                f"of the 10 largest by ablation, {both[0]} are among the 10 by attribution, and "
                f"{both[1]} by activation"
            )
        return out


def report(
    model: lm.JaxModel,
    placed: Sequence[Placed],
    ids: np.ndarray,
    target: Target,
    settings: dict,
    *,
    method: str = "gradient",
    steps: int = 10,
    ablations: int = 100,
    positions: np.ndarray | None = None,
    labels: Sequence[Mapping[int, str]] = (),
) -> Report:
    """Attributes a target to the latents of SAEs, and takes the largest of all out for comparison.

    Args:
      model: the language model.
      placed: the SAEs and their sites.
      ids: the tokens of the context, (T,).
      target: what is attributed.
      settings: what the report says that it was made from.
      method: one of `METHODS`. By ablation the largest by the gradient are put in the order of
        their ablations.
      steps: over how many steps the integrated gradient is averaged.
      ablations: how many latents at positions to return, and to take out one by one.
      positions: the positions of which the latents count, (T,) bool; None: all.
      labels: what latents are called, by their number, of each SAE.

    Raises UserError for an unknown method, and as `attribute` does.
    """
    choose(method, METHODS, "the method")
    steps = steps if method == "integrated" else 0
    found = attribute(model, placed, ids, target, steps=steps, positions=positions)
    chosen = [(n, t, i) for n, a in enumerate(found) for t, i in a.largest(ablations)]
    chosen.sort(key=lambda c: -abs(found[c[0]].contributions[c[1:]]))
    chosen = chosen[:ablations]
    exact = {}
    for n, place in enumerate(placed):
        own = [(t, i) for m, t, i in chosen if m == n]
        where = tuple(np.array(own, int).reshape(-1, 2).T)
        a = found[n]
        values = ablate(model, place, ids, target, where[0], a.latents[where], a.activations[where])
        exact |= {(n, *at): float(v) for at, v in zip(own, values, strict=True)}
    chosen = [c for c in chosen if exact[c] or found[c[0]].contributions[c[1:]]]
    if method == "ablation":
        chosen.sort(key=lambda c: -abs(exact[c]))
    text = pieces(model.tokenizer, ids)
    tokens = _token_texts(text)
    promoted = [
        _promoted(model, place, [found[n].latents[t, i] for m, t, i in chosen if m == n])
        for n, place in enumerate(placed)
    ]
    rows = []
    for n, t, i in chosen:
        a, latent = found[n], int(found[n].latents[t, i])
        rows.append(
            Row(
                placed[n].name,
                placed[n].written,
                latent,
                t,
                tokens[t],
                float(a.activations[t, i]),
                float(a.contributions[t, i]),
                exact[n, t, i],
                promoted[n] and promoted[n][latent],
                labels[n].get(latent) if labels else None,
            )
        )
    return Report(settings, found[0].value, text, found, rows)


def save(made: Report, out, count: int) -> list[pathlib.Path]:
    """Writes attribution.json, attribution.csv and a page, index.html, and returns their paths.

    Args:
      made: the report.
      out: the directory.
      count: how many rows the page shows.

    Raises UserError if the directory holds attributions with other settings.
    """
    out = check_out(out, made.settings)
    out.mkdir(parents=True, exist_ok=True)
    rows = [dataclasses.asdict(row) for row in made.rows]
    for row in rows:
        row["promoted"] = " ".join(map(repr, row["promoted"] or ()))
    columns = [field.name for field in dataclasses.fields(Row)]
    files = {
        "attribution.json": paths.as_json(made.to_dict()),
        "attribution.csv": tables.as_csv(rows, columns),
        "index.html": page(made, count),
    }
    for name, content in files.items():
        paths.write(out / name, content)
    return [out / name for name in files]


def check_out(out, settings: dict) -> pathlib.Path:
    """Returns the directory of a report. Raises UserError if it holds one with other settings."""
    out = paths.local(out)
    file = out / "attribution.json"
    if file.is_file():
        there = read_json(file).get("settings")
        there = there if isinstance(there, dict) else {}
        for name in settings:
            if there.get(name) != settings[name]:
                raise UserError(
                    f"{file} is of {name} {there.get(name)!r:.60}, not {settings[name]!r:.60}; "
                    "choose another --out"
                )
    elif out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} exists and holds no attribution; choose another --out")
    return out


def page(made: Report, count: int) -> str:
    """Returns the report as one HTML page, which needs nothing else, with its first rows."""
    figure = scatter(made.rows)
    strongest = max(float(np.abs(a.total).max()) for a in made.found) or 1.0
    return pages.render(
        pathlib.Path(__file__).with_name("attribution.html"),
        settings=made.settings,
        value=made.value,
        texts=[
            {
                "name": a.placed.name,
                "site": a.placed.written,
                "pieces": _shaded(made.pieces, a, strongest),
            }
            for a in made.found
        ],
        rows=made.rows[:count],
        notes=made.notes(),
        scatter=figure and plots.inline_svg(figure, "Attribution against ablation"),
    )


def scatter(rows: Sequence[Row]) -> Figure | None:
    """Draws attributions against ablations, of each SAE in its colour; None where there are none.

    On the line they are equal, as they are where what follows the site is linear.
    """
    if not rows:
        return None
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(4.6, 3.8), layout="constrained")
        axes = figure.subplots()
        for name in dict.fromkeys(row.sae for row in rows):
            own = [row for row in rows if row.sae == name]
            x, y = [row.ablation for row in own], [row.attribution for row in own]
            axes.scatter(x, y, s=14, alpha=0.75, linewidths=0, label=plots.plain(name))
        axes.axline((0, 0), slope=1, color=plots.INK, linewidth=0.7, alpha=0.5)
        axes.set_xlabel("ablation: the target, less it without the latent")
        axes.set_ylabel("attribution")
        if len({row.sae for row in rows}) > 1:
            axes.legend()
        return figure


def _token_texts(text: Sequence[Piece]) -> list[str]:
    """Returns the text of each token; of one of several that are a character, the character."""
    return [piece.text for piece in text for _ in range(piece.start, piece.stop)]


def _promoted(model, placed: Placed, latents: list) -> dict[int, list[str]] | None:
    """Returns the tokens that latents promote most, by the latent's number."""
    numbers = sorted({int(latent) for latent in latents})
    if not numbers:
        return {}
    found = output_tokens(placed.sae, model, placed.written, np.array(numbers), _PROMOTED)
    if found is None:
        return None
    texts = [[token_text(model.tokenizer, t) for t in row] for row in found.promoted]
    return dict(zip(numbers, texts, strict=True))


def _shaded(text: Sequence[Piece], a: Attribution, strongest: float) -> list[dict]:
    """Returns the pieces of the context with the sum of all latents' contributions at each."""
    totals = [float(a.total[piece.start : piece.stop].sum()) for piece in text]
    return [
        {"text": piece.text, "total": total, "strength": min(abs(total) / strongest, 1.0)}
        for piece, total in zip(text, totals, strict=True)
    ]
