"""Steers a language model by a latent that prompts find, as Golden Gate Claude (Templeton et al.
2024, "Scaling Monosemanticity"), with an SAE that is trained here.

    python experiments/golden_gate.py --model=DIR --text=PATH,... --out=DIR [--concept=shakespeare]

It harvests a site in the model's middle over equal parts of the texts, trains a TopK SAE on it, and
looks for the latent that is active on all of the concept's texts and on none of the others. That
latent is clamped to 0, 2, 5 and 10 times its maximum at every position, and so is a random latent
that fires about as often; beside them is the difference of the mean activations of the same two
sets of texts, as long as what the latent writes. DIR/CONCEPT gets what `sae-jax steer` writes, and
found.json: which latents were found. Stopped and started again it goes on where it was.

A concept has two lists of texts, from which the latent and the difference of means are found, and a
regular expression, whose share of the samples is counted. The expression is a proxy: read
samples.md. The prompts have nothing to do with the concept. `--concept=NAME` is one of those below;
--regex, --positive and --negative (files, a text a line) make one of your own, of that name.

Seen on SmolLM2-135M (resid_post.12, 120,000 tokens, 12 samples; share of samples with the concept
at 2, 5, 10). DNA: the latent found 0, .17, .08; the difference of means .83, 1, 1. Shakespeare: the
latent found 0, 0, 0; the difference of means .33, .83, .08; a latent that the dashboard shows on
"thou" (--latent) .42, .58, .75. Random latents 0. What reads a concept need not write it.

What to expect of an SAE of 4,096 latents and some hundred thousand tokens: it finds what a text is
written in (a language, HTML, verse), and not a bridge. Whether the latent or the difference of
means does better depends on the concept; the table says at which factor the model still predicts
text as before, which is what the share has to be held against.
"""

import dataclasses
import json
import pathlib
import random
import sys
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags, logging

import sae_jax
from sae_jax import lm
from sae_jax.errors import UserError, choose
from sae_jax.evaluate import report
from sae_jax.evaluate.metrics import activation_scale
from sae_jax.evaluate.sources import HeldOutRows
from sae_jax.interpret import pushes, steering, steering_report
from sae_jax.paths import save_json

_MODEL = flags.DEFINE_string("model", None, "The language model's directory.", required=True)
_TEXT = flags.DEFINE_list("text", None, "Text files, as for harvest.", required=True)
_OUT = flags.DEFINE_string("out", None, "Directory of all results.", required=True)
_CONCEPT = flags.DEFINE_string("concept", "shakespeare", "shakespeare, html, dna or your own.")
_REGEX = flags.DEFINE_string("regex", None, "Of a concept of your own: what a sample has.")
_POSITIVE = flags.DEFINE_string("positive", None, "A file of texts with it, one a line.")
_NEGATIVE = flags.DEFINE_string("negative", None, "A file of texts without it, one a line.")
_SITE = flags.DEFINE_string("site", None, "Where the SAE is; resid_post of the middle layer.")
_TOKENS = flags.DEFINE_integer("tokens", 200_000, "To harvest.")
_CONTEXT = flags.DEFINE_integer("context_length", 128, "Tokens of a context.")
_D_SAE = flags.DEFINE_integer("d_sae", 4096, "Latents.")
_K = flags.DEFINE_integer("k", 32, "Of which so many are active at once.")
_EPOCHS = flags.DEFINE_integer("epochs", 4, "Passes over the tokens.")
_RATE = flags.DEFINE_float("learning_rate", 1e-3, "Peak, of Adam.")
_LATENT = flags.DEFINE_integer("latent", None, "Steer this latent, instead of the first found.")
_SAMPLES = flags.DEFINE_integer("samples", 4, "Texts after each of the prompts, at each factor.")
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 40, "Tokens of each.")
_LM_TOKENS = flags.DEFINE_integer("lm_tokens", 2048, "To measure KL and cross-entropy on.")
_SEED = flags.DEFINE_integer("seed", 0, "Of everything that is random.")

FACTORS = (0.0, 2.0, 5.0, 10.0)
PROMPTS = ["I think that", "The weather today is", "My favourite food is", "Once there was a"]
PIECE = 2000  # characters of a document that the texts are cut into
SIMILAR = 3.0  # a random latent fires at most so many times as often, or as seldom


class Concept(NamedTuple):
    """What is looked for: texts with it, texts without it, and what a sample has that has it."""

    positive: list[str]
    negative: list[str]
    regex: str


PLAIN = [
    "The cat sat by the window and watched the birds in the garden.",
    "She went to the shop to buy some milk and a loaf of bread.",
    "The company reported that its sales rose by four percent last year.",
    "He was born in 1952 and studied physics at the university.",
    "It will rain in the north tomorrow, with some sun in the afternoon.",
    "Tom and his sister played with a big red ball in the park.",
    "The river flows through three countries before it reaches the sea.",
    "You can open the file with any text editor and change the values.",
]
CONCEPTS = {
    "shakespeare": Concept(
        [
            "ROMEO:\nWhat, shall I speak thy name, that hath undone me?",
            "Thou art a villain, sir, and I shall have thy head for this.",
            "KING RICHARD:\nGood my lord, I do beseech thee hear me speak.",
            "O, that I were upon thy lips, sweet lady, ere I die!",
            "First Citizen:\nYou are all resolved rather to die than to famish?",
            "Prithee, good nurse, what sayest thou? Hast thou met with him?",
            "The heavens forfend such mischief to thy noble house, my liege.",
            "DUKE VINCENTIO:\nWhat news abroad? Speak, friar, for we attend.",
        ],
        PLAIN,
        r"(?m)\b(thou|thee|thy|thine|hath|doth|hast|art thou|prithee|[Mm]y lord|sirrah)\b"
        r"|^[A-Z][A-Z ]+:$",
    ),
    "html": Concept(
        [
            '<div class="menu"><a href="/wiki/Main">Main</a></div>',
            "<p>The <b>first</b> of these is shown on the left.</p>",
            '<li id="n-help"><a href="/help" title="Help">Help</a></li>',
            '<table border="1"><tr><td>12</td><td>15</td></tr></table>',
            '<img src="logo.png" width="120" height="60" alt="Logo" />',
            '<span style="color: red">Warning</span><br />',
            "<html><head><title>Page</title></head><body>",
            '<input type="text" name="search" value="" /></form>',
        ],
        PLAIN,
        r"</?[a-zA-Z]+[^<>\n]*>|</?[a-z]+ [a-z]+=",
    ),
    "dna": Concept(
        [
            "GATCACAGGTCTATCACCCTATTAACCACTCACGGGAGCTCTCCATGCAT",
            "GGGCGGCGACCTCGCGGGTTTTCGCTATTTATGAAAATTTTCCGGTTTAA",
            "TTGGTATTTTCGTCTGGGGGGTGTGCACGCGATAGCATTGCGAGACGCTG",
            "ACATCACGATGGATCACAGGTCTATCACCCTATTAACCACTCACGGGAGC",
            "CCTCCACCCCTGACTGGGGAGTTTTCTCTGAACCGGTAACCTGACGGCAT",
            "TACTGCATTATGTCTAATTTGTCAGGGACTTAACGGCGCGTTCACAAGGA",
        ],
        PLAIN,
        r"[ACGT]{8,}",
    ),
}


def main(argv):
    if argv[1:]:
        raise UserError(f"unexpected argument {argv[1]!r}; flags are --name=value")
    concept = chosen_concept()
    out = pathlib.Path(_OUT.value)
    model = lm.open_model(_MODEL.value, scan=True)  # compiles in seconds, whatever the depth
    site = _SITE.value or middle_site(model)
    sae, store = trained(out, model, site)
    rows = HeldOutRows(
        store, site, tokens=_TOKENS.value, holdout_fraction=sae_jax.DataConfig.holdout_fraction
    )
    file = out / "run" / "eval.json"
    if not file.is_file():
        report.save(report.evaluate(sae, rows, settings={"sae": str(out / "run")}), file)
    evaluation = report.load(file)
    print(evaluation.table())

    folder = out / _CONCEPT.value
    folder.mkdir(exist_ok=True)
    latent, control = found_latents(folder, model, sae, site, concept, evaluation.rows)
    maxima = evaluation.rows.max_activation
    made = made_pushes(model, sae, site, concept, (latent, control), maxima)
    special = model.tokenizer.marks
    text = rows.sequences(_LM_TOKENS.value, model.tokenizer)
    experiment = steering.Steering(
        model,
        made,
        steering.texts_of(text.tokens, text.is_text, special),
        [[model.tokenizer.bos, *model.tokenizer.encode(prompt)] for prompt in PROMPTS],
        steering.Writing(_NEW_TOKENS.value, 0.8, 1.0, _SEED.value, _SAMPLES.value),
        concept=concept.regex,
    )
    settings = {
        "model": model.spec,
        "site": site,
        "pushes": [push.name for push in made],
        "maxima": {str(i): float(maxima[i]) for i in (latent, control)},
        "maxima_of": f"{evaluation.rows.rows:,} rows",
        "prompts": PROMPTS,
        **concept._asdict(),
        "writing": vars(experiment.writing),
        "lm_tokens": _LM_TOKENS.value,
    }
    outcomes = steering_report.outcomes_of(experiment, FACTORS, settings, folder / "steered")
    print(steering_report.table(outcomes))
    for push, factor in steering_report.bearable(outcomes).items():
        print(f"{push}: text is predicted nearly as before up to factor {factor}")
    files = steering_report.save(outcomes, settings, folder / "steered")
    print(f"Written: {', '.join(map(str, files))}")


def chosen_concept() -> Concept:
    given = [_REGEX.value, _POSITIVE.value, _NEGATIVE.value]
    if all(given):
        return Concept(*(_lines(file) for file in given[1:]), _REGEX.value)
    if any(given):
        raise UserError("a concept of your own has --regex, --positive and --negative; give all")
    return CONCEPTS[choose(_CONCEPT.value, CONCEPTS, "--concept")]


def _lines(file: str) -> list[str]:
    return [line for line in "".join(lm.read_texts(file)).splitlines() if line.strip()]


def middle_site(model: lm.LanguageModel) -> str:
    return f"resid_post.{model.config.num_layers // 2}"


def trained(out: pathlib.Path, model: lm.LanguageModel, site: str):
    """The SAE of out/run and the store that it was trained on, made where they are not there."""
    logging.info("harvesting %s over %d tokens", site, _TOKENS.value)
    store = lm.harvest(
        model.spec,
        mixed(_TEXT.value, 6 * _TOKENS.value),
        out / "store",
        sites=site,
        tokens=_TOKENS.value,
        context_length=_CONTEXT.value,
    )
    config = sae_jax.TopKConfig(d_sae=_D_SAE.value, k=_K.value)
    result = sae_jax.train(
        config,
        str(out / "store"),
        workdir=out / "run",
        epochs=_EPOCHS.value,
        learning_rate=_RATE.value,
        seed=_SEED.value,
    )
    return result.sae, store


def mixed(sources: list[str], characters: int) -> list[str]:
    """Pieces of all sources in random order, of equal parts as far as a source has so much."""
    pieces = []
    for source in sources:
        left = characters // len(sources)
        for document in lm.read_texts(source):
            cut = [document[at : at + PIECE] for at in range(0, min(len(document), left), PIECE)]
            pieces += cut
            left -= sum(map(len, cut))
            if left <= 0:
                break
    random.Random(_SEED.value).shuffle(pieces)
    return pieces


def found_latents(folder, model, sae, site: str, concept: Concept, rows) -> tuple[int, int]:
    """The latent that the concept's texts find, and a random one. found.json has the candidates.

    The best is active on the largest share of texts with the concept less that of texts without it,
    and among equals the most strongly, on average over all tokens.
    """
    active, mean = [], []
    for texts, what in ((concept.positive, "positive"), (concept.negative, "negative")):
        tokens, used, _ = pushes.text_rows(model, (site,), texts, what).sequences(10**9)
        _, tapped = model.forward(tokens, taps=[site], logits=False)
        latents = np.asarray(jax.jit(lambda sae, x: sae.encode(x))(sae, tapped[site]))
        latents = latents * np.asarray(activation_scale(sae)) * used[..., None]
        active.append((latents > 0).any(axis=1).mean(axis=0))
        mean.append(latents.sum(axis=(0, 1)) / used.sum())
    apart = np.where(rows.max_activation > 0, active[0] - active[1], -1.0)
    order = np.lexsort((-mean[0], -apart))
    latent = int(order[0]) if _LATENT.value is None else _LATENT.value
    density = rows.density
    alike = (density < SIMILAR * density[latent]) & (density > density[latent] / SIMILAR)
    alike &= apart <= 0
    if not alike.any():
        raise UserError("no other latent fires about as often; train more latents or on more text")
    control = int(np.random.default_rng(_SEED.value).choice(np.flatnonzero(alike)))
    promoted = sae_jax.interpret.output_tokens(sae, model, site, order[:10]).promoted
    found = [
        {
            "latent": int(i),
            "positives": float(active[0][i]),
            "negatives": float(active[1][i]),
            "density": float(density[i]),
            "maximum": float(rows.max_activation[i]),
            "promotes": [model.tokenizer.decode([token]) for token in tokens],
        }
        for i, tokens in zip(order[:10], promoted, strict=True)
    ]
    save_json({"latent": latent, "control": control, "candidates": found}, folder / "found.json")
    for line in found[:5]:
        print(json.dumps(line, ensure_ascii=False))
    return latent, control


def made_pushes(model, sae, site: str, concept: Concept, latents, maxima) -> list[pushes.Push]:
    """The found latent, a random one, and the difference of means."""
    sites, (latent, control) = (site,), latents
    length = pushes.written_length(sae, [latent], maxima[[latent]])
    means = pushes.difference_of_means(
        sae,
        *(
            pushes.text_rows(model, sites, texts, "texts")
            for texts in (concept.positive, concept.negative)
        ),
    )
    made = [pushes.latent_push(sae, sites, [i], maxima[[i]]) for i in (latent, control)]
    named = [f"{made[0].name} (found)", f"{made[1].name} (random)"]
    return [
        *(dataclasses.replace(p, name=name) for p, name in zip(made, named, strict=True)),
        pushes.direction_push("difference of means", sae, sites, means, length),
    ]


if __name__ == "__main__":
    try:
        app.run(main)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
