"""Shows what steering did: as a table, side by side, as figure and as files.

`save` writes into a directory

    steer.json         the settings, the measures of every push at every factor (`steering`), and
                       the largest factor that the model bears (`bearable`)
    samples.jsonl      a line for each sample: push, factor, prompt, text
    samples.md         the samples of each prompt side by side
    dose_response.png  the measures against the factor
"""

import dataclasses
import functools
import json
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from sae_jax import paths
from sae_jax.config import difference
from sae_jax.errors import UserError
from sae_jax.interpret.steering import UNTOUCHED, Outcome, Steering
from sae_jax.json_files import checked, read_json
from sae_jax.plots import CYCLE, INK, STYLE, plain
from sae_jax.plots import save as save_figure
from sae_jax.progress_bar import progress

BEARABLE = 0.5  # nats a token by which the cross-entropy of a text may rise
COLUMNS = {
    "kl": ("KL", "KL(untouched || steered), nats a token"),
    "ce_increase": ("CE rises by", "Cross-entropy of text, nats above untouched"),
    "token_logprob": ("log p(set)", "Log-probability of the token set"),
    "concept": ("concept", "Share of samples with the concept"),
    "clean_ce": ("CE of samples", "Cross-entropy of samples, untouched model"),
    "distinct_1": ("distinct-1", "Distinct tokens of a sample"),
    "distinct_2": ("distinct-2", "Distinct pairs of tokens of a sample"),
}
"""The measures that are shown, in order: what a table calls them, and what a figure does."""
_PANELS = ("ce_increase", "kl", "token_logprob", "concept", "distinct_2", "clean_ce")
_SHOWN = 96  # characters of a sample on the terminal


def outcomes_of(
    steering: Steering, factors: Sequence[float], settings: dict, out: paths.AnyPath | None
) -> list[Outcome]:
    """Returns what the model does untouched, and then with each push at each factor.

    What was measured is kept in OUT/parts, so that the same settings measure only new factors.

    Raises UserError if `out` holds anything but steering with the same settings.

    Args:
      steering: the model, the pushes, and what is looked at.
      factors: the factors.
      settings: what `steering` is, in words and numbers.
      out: the directory; None: nothing is kept.
    """
    parts = None
    if out is not None:
        parts = out / "parts"
        _check_settings(out, parts / "settings.json", settings)
    works = {"untouched": lambda: [steering.untouched()]}
    works |= {f"{factor:g}": functools.partial(steering.at, factor) for factor in factors}
    found = []
    for name, work in progress(works.items(), "steering", len(works), "factor"):
        file = parts and parts / f"{name}.json"
        if file is not None and file.is_file():
            made = checked(read_json(file), _Part, file).outcomes
        else:
            made = work()
            if file is not None:
                paths.save_json(dataclasses.asdict(_Part(made)), file)
        found += made
    order = [UNTOUCHED, *(push.name for push in steering.pushes)]
    return sorted(found, key=lambda outcome: (order.index(outcome.push), outcome.factor))


@dataclasses.dataclass(frozen=True)
class _Part:
    """What a file of OUT/parts holds."""

    outcomes: list[Outcome]


def _check_settings(out: paths.AnyPath, file: paths.AnyPath, settings: dict) -> None:
    settings = json.loads(paths.as_json(settings))  # as they are read again
    there = read_json(file, default={})
    if not there:
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} exists and holds no steering; choose another --out")
        file.parent.mkdir(parents=True, exist_ok=True)
        paths.save_json(settings, file)
    elif changes := difference(there, settings):
        raise UserError(f"{out} holds other steering ({changes[0]}); choose another --out")


def table(outcomes: Sequence[Outcome]) -> str:
    """Returns the measures of all pushes and factors for people, as a text of several lines."""
    names = [n for n in COLUMNS if any(n in outcome.measures for outcome in outcomes)]
    width = max(len(outcome.push) for outcome in outcomes)
    lines = [f"{'':{width}}  factor" + "".join(f"{COLUMNS[name][0]:>15}" for name in names)]
    for outcome in outcomes:
        factor = "-" if outcome.push == UNTOUCHED else f"{outcome.factor:g}"
        cells = (outcome.measures.get(name) for name in names)
        text = "".join(f"{'-' if cell is None else f'{cell:.4g}':>15}" for cell in cells)
        lines.append(f"{outcome.push:{width}}  {factor:>6}{text}")
    return "\n".join(lines)


def side_by_side(outcomes: Sequence[Outcome], push: str) -> str:
    """Returns the first sample of each prompt at each factor, a line each, for a terminal.

    push: the name of the push whose samples are shown, beside those of the untouched model.
    """
    shown = [outcome for outcome in outcomes if outcome.push in (UNTOUCHED, push)]
    lines = []
    for prompt in _prompts(outcomes):
        lines.append(f"{_on_a_line(prompt)!s:.{_SHOWN}}")
        for outcome in shown:
            text = next(s.text for s in outcome.samples if s.prompt == prompt)
            lines.append(f"  {_label(outcome):>16} | {_on_a_line(text):.{_SHOWN}}")
    return "\n".join(lines)


def bearable(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """Returns the largest factor of each push at which text is still predicted nearly as before.

    Its cross-entropy, and that at all smaller factors above 0, has risen by less than `BEARABLE`.
    It is None where the smallest is too much, and without texts there are no pushes.
    """
    found: dict[str, float | None] = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.factor):
        known = "ce_increase" in outcome.measures
        if outcome.push == UNTOUCHED or not known or outcome.factor <= 0:
            continue
        least, ended = found.get(outcome.push, (None, False))
        rise = outcome.measures["ce_increase"]  # None where a file says that it is not finite
        ended = ended or rise is None or not rise < BEARABLE
        found[outcome.push] = (least if ended else outcome.factor, ended)
    return {push: factor for push, (factor, _) in found.items()}


def dose_response(outcomes: Sequence[Outcome]) -> Figure:
    """Draws the measures of all pushes against the factor, beside those of the untouched model."""
    steered = [outcome for outcome in outcomes if outcome.push != UNTOUCHED]
    untouched = next((o.measures for o in outcomes if o.push == UNTOUCHED), {})
    names = [
        name
        for name in _PANELS
        if any(outcome.measures.get(name) is not None for outcome in steered)
    ]
    rows = -(-max(len(names), 1) // 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.6 + 2.3 * rows), layout="constrained")
        panels = list(figure.subplots(rows, 2, squeeze=False).flat)
        for axes, name in zip(panels, names, strict=False):
            for push, color in zip(dict.fromkeys(o.push for o in steered), CYCLE, strict=False):
                points = sorted(
                    (outcome.factor, outcome.measures[name])
                    for outcome in steered
                    if outcome.push == push and outcome.measures.get(name) is not None
                )
                axes.plot(*zip(*points, strict=True), "o-", color=color, label=plain(push), ms=3)
            if untouched.get(name) is not None:
                axes.axhline(untouched[name], color=INK, linewidth=0.7, linestyle=":")
            if name == "ce_increase":
                axes.axhline(BEARABLE, color=INK, linewidth=0.7, linestyle="--")
            axes.set_title(COLUMNS[name][1])
            axes.set_xlabel("factor, times the maximum")
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3)
    return figure


def save(outcomes: Sequence[Outcome], settings: dict, out: paths.AnyPath) -> list[paths.AnyPath]:
    """Writes the files above into the directory `out`, each whole or not at all.

    Returns the paths of those that there is something for.
    """
    values = {
        "settings": settings,
        "outcomes": [
            {"push": outcome.push, "factor": outcome.factor, **outcome.measures}
            for outcome in outcomes
        ],
        "largest_factor_below_half_nat": bearable(outcomes),
    }
    files = [out / "steer.json"]
    paths.save_json(values, files[0])
    if any(outcome.samples for outcome in outcomes):
        lines = [
            {"push": outcome.push, "factor": outcome.factor, **dataclasses.asdict(sample)}
            for outcome in outcomes
            for sample in outcome.samples
        ]
        files += [out / "samples.jsonl", out / "samples.md"]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        paths.write(files[1], text)
        paths.write(files[2], markdown(outcomes))
    files.append(out / "dose_response.png")
    save_figure(dose_response(outcomes), files[-1])
    return files


def markdown(outcomes: Sequence[Outcome]) -> str:
    """Returns the samples as Markdown: for each prompt a table, a row for each push and factor."""
    parts = ["# Samples, steered and not\n"]
    for prompt in _prompts(outcomes):
        parts += [f"\n## {_escaped(prompt)}\n", "\n| push | factor | samples |\n|---|---|---|\n"]
        for outcome in outcomes:
            texts = [s.text for s in outcome.samples if s.prompt == prompt]
            cell = "<br>".join(f"{i}. {_escaped(text)}" for i, text in enumerate(texts, 1))
            factor = "" if outcome.push == UNTOUCHED else f"{outcome.factor:g}"
            parts.append(f"| {outcome.push} | {factor} | {cell} |\n")
    return "".join(parts)


def _prompts(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(s.prompt for outcome in outcomes for s in outcome.samples))


def _label(outcome: Outcome) -> str:
    return UNTOUCHED if outcome.push == UNTOUCHED else f"{outcome.factor:g} x maximum"


def _on_a_line(text: str) -> str:
    return "".join(c if c.isprintable() else {"\n": "⏎"}.get(c, " ") for c in text)


def _escaped(text: str) -> str:
    """Returns a text as one line of Markdown that shows it as it is."""
    line = _on_a_line(text)
    for sign in "\\`*_{}[]<>()#|":
        line = line.replace(sign, f"\\{sign}")
    return line
