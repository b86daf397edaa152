"""Writes how specific latents are.

`write_specificity` writes into a directory

    specificity.json  all that was measured
    table.csv         a line for each concept and unit: its best latents, the best neuron, and the
                      best unit of each control
    table.md          a line for each concept, beside the papers' numbers
    specificity.png   the best latent of each concept beside the best neuron
    figures/*.png     the best latent of each concept (`figures.of_concept`)
"""

import dataclasses
import pathlib
import re
import shutil

from sae_jax import paths
from sae_jax.interpret.proxies import figures
from sae_jax.interpret.proxies.concepts import SPECIFIC, Concept, Specificity
from sae_jax.interpret.proxies.units import TOP, Unit
from sae_jax.plots import save
from sae_jax.progress_bar import progress
from sae_jax.tables import as_csv

PAPER = {  # the latent's correlation with the proxy, with its best neuron, with the other seed's
    "Arabic script": (0.74, None, 0.91),
    "DNA": (0.80, None, 0.92),
    "base64": (0.38, 0.18, 0.85),
    "Hebrew script": (0.55, 0.10, 0.92),
}
"""Numbers of Bricken et al. 2023, "Towards Monosemanticity", for A/1 over 40 million tokens."""

_COLUMNS = (
    "concept",
    "tokens",
    "latents mostly inside",
    "best latent",
    "r",
    "paper's r",
    "perfect",
    "precision, recall at 0",
    "F1 at 0",
    "F1 at best",
    "mass inside",
    "top",
    "best neuron",
    "its r",
    "its F1 at best",
    "its top",
    "F1 at best of controls",
    "r of latent and its best neuron (paper)",
    "r of latent and the other SAE's (paper)",
    "logit weights inside, others",
)


def write_specificity(directory, found: Specificity) -> pathlib.Path:
    """Writes the files above into a directory, which takes the place of one that is there as a
    whole, and returns its path.

    Raises UserError if it cannot be written.
    """
    directory = paths.local(directory)
    folder = directory.with_name(f"{directory.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "figures").mkdir(parents=True)
    paths.save_json(dataclasses.asdict(found), folder / "specificity.json")
    paths.write(folder / "table.csv", as_csv(rows(found)))
    paths.write(folder / "table.md", markdown(found))
    save(figures.of_all(found.concepts), folder / "specificity.png")
    drawn = [concept for concept in found.concepts if concept.has_latent]
    for concept in progress(drawn, "drawing", len(drawn), "concept"):
        save(figures.of_concept(concept), folder / "figures" / figure_name(concept.name))
    if directory.exists():
        shutil.rmtree(directory)
    folder.rename(directory)
    return directory


def figure_name(concept: str) -> str:
    """Returns the name of the file of a concept's figure."""
    return re.sub(r"\W+", "_", concept) + ".png"


def rows(found: Specificity) -> list[dict]:
    """Returns a row for each concept and unit, as table.csv has them."""
    table = []
    for concept in found.concepts:
        units = [("latent", unit) for unit in concept.latents]
        units += [("neuron", concept.neuron)] if concept.neuron else []
        units += concept.controls.items()
        about = {
            "concept": concept.name,
            "kind": concept.kind,
            "tokens": concept.tokens,
            "latents_inside": concept.latents_inside,
            "ceiling_pearson": concept.ceiling and concept.ceiling.pearson,
        }
        for what, unit in units:
            table.append({**about, "what": what, **_cells(unit)})
        if not units:
            table.append({**about, "what": concept.said})
    return table


def _cells(unit: Unit) -> dict:
    return {
        "unit": unit.unit,
        "sign": unit.sign,
        "active": unit.active,
        "pearson": unit.pearson,
        "pearson_inside": unit.pearson_inside,
        "precision": unit.above_zero.precision,
        "recall": unit.above_zero.recall,
        "f1": unit.above_zero.f1,
        "best_threshold": unit.at_best.threshold,
        "best_precision": unit.at_best.precision,
        "best_recall": unit.at_best.recall,
        "best_f1": unit.at_best.f1,
        "mass_inside": unit.mass,
        "top_inside": unit.top,
        "of_top": unit.of_top,
        "sensitivity": unit.sensitivity,
        "sensitivity_documents": unit.documents,
    }


def markdown(found: Specificity) -> str:
    """Returns the table for people: concepts with a latent first, then those without."""
    held = [concept for concept in found.concepts if concept.has_latent]
    others = [concept for concept in found.concepts if not concept.has_latent]
    lines = [
        f"# Latents of {len(held)} of {len(found.concepts)} concepts\n",
        f"A concept has a latent where one tells its tokens with F1 of {SPECIFIC} or more. "
        "Latents, neurons and thresholds were chosen on "
        f"{found.settings['tokens_found_on']:,} tokens and measured on "
        f"{found.settings['tokens_measured_on']:,} others. r: Pearson correlation with the proxy. "
        "Perfect: r of a latent that is active on all tokens of the concept's documents and on no "
        f"others. Top: of the {TOP} highest peaks. Paper: Bricken et al. 2023, over 40 million "
        "tokens of another model.\n",
        f"| {' | '.join(_COLUMNS)} |",
        f"{'|---' * len(_COLUMNS)}|",
    ]
    lines += [_line(concept) for concept in held]
    if others:
        lines += [
            "\n## No latent\n",
            "| concept | tokens | | latents with most of their tokens inside |\n|---|---|---|---|",
        ]
        lines += [
            f"| {_cell(c.name)} | {c.tokens:,} | {c.said} | {c.latents_inside} |" for c in others
        ]
    steered = [concept for concept in found.concepts if concept.steering]
    for concept in steered:
        lines += [
            f"\n## Steering to {_cell(concept.name)}\n",
            "| what | times its maximum | tokens inside | samples with one | CE of samples "
            "| begins |\n|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {one.push} | {one.factor:g} | {one.tokens:.2f} | {one.samples:.2f} "
            f"| {_number(one.clean_ce)} | {_cell(one.example[:60])} |"
            for one in concept.steering
        ]
    return "\n".join(lines) + "\n"


def _line(concept: Concept) -> str:
    latent, neuron, weights = concept.latents[0], concept.neuron, concept.logit_weights
    paper, paper_neuron, paper_other = PAPER.get(concept.name, (None, None, None))
    beside, other = concept.neuron_of_latent, concept.other
    at_zero = latent.above_zero
    cells = [
        _cell(concept.name),
        f"{concept.tokens:,}",
        f"{concept.latents_inside}",
        f"{latent.unit}",
        _number(latent.pearson),
        _number(paper),
        _number(concept.ceiling and concept.ceiling.pearson),
        f"{_number(at_zero.precision)}, {_number(at_zero.recall)}",
        _number(at_zero.f1),
        _number(latent.at_best.f1),
        _number(latent.mass),
        f"{latent.top}/{latent.of_top}",
        "" if neuron is None else f"{'-' if neuron.sign < 0 else ''}{neuron.unit}",
        _number(neuron and neuron.pearson),
        _number(neuron and neuron.at_best.f1),
        "" if neuron is None else f"{neuron.top}/{neuron.of_top}",
        ", ".join(f"{name} {unit.at_best.f1:.2f}" for name, unit in concept.controls.items()),
        f"{_number(beside and beside.pearson)}{_of_paper(paper_neuron)}",
        f"{_number(other and other.pearson)}{_of_paper(paper_other)}",
        f"{weights.inside:.2f}, {weights.outside:.2f}" if weights and weights.tokens else "",
    ]
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _of_paper(value: float | None) -> str:
    return "" if value is None else f" ({value:.2f})"


def _cell(text: str) -> str:
    """Returns a text as it shows in a cell of Markdown."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"([\\`*_{}\[\]<>()#|])", r"\\\1", line)
