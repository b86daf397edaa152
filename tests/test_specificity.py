"""What is measured of planted latents and neurons is what they were made with."""

import argparse
import inspect
import json
import pathlib

import handmade
import numpy as np
import pytest

from sae_jax import lm
from sae_jax.activations import write_store
from sae_jax.errors import UserError
from sae_jax.evaluate.sources import ModelRows
from sae_jax.interpret.activity import record
from sae_jax.interpret.proxies import (
    DocumentLabels,
    specificity,
    write_specificity,
)
from sae_jax.sae import ReLU, ReLUConfig, resolve
from sae_jax.tables import read_csv

WORDS = {
    "English": "the old house by river was sold again before winter came and nobody knew why",
    "Arabic": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق وقد وهبوا عقلا وضميرا",
    "Russian": "все люди рождаются свободными и равными в своем достоинстве и правах они наделены",
    "Korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다",
}


class Planted:
    """A text of documents of one language each, and where its characters are of which script."""

    def __init__(self):
        self.tokenizer = lm.load_tokenizer(lm.DEMO_MODEL)
        rng = np.random.default_rng(0)
        names = rng.choice(sorted(WORDS), 240)
        texts = [" ".join(rng.choice(WORDS[name].split(), 25)) for name in names]
        self.tokens, documents = lm.pack_documents(texts, self.tokenizer, 64)
        languages = sorted(WORDS)
        codes = np.append([languages.index(name) for name in names], -1)[documents]
        self.labels = DocumentLabels(tuple(languages), codes, documents)
        self.used = self.tokens != self.tokenizer.bos
        self.used[:, [1, -1]] = False  # contexts cut characters
        self.rng = rng

    def inside(self, language: str) -> np.ndarray:
        """The tokens that are, or are a part of, a character of a language's own."""
        return self.labels.of(language) & ~np.isin(self.tokens, self.common)

    @property
    def common(self) -> list[int]:
        return [t for t in range(self.tokenizer.vocab_size)
                if not self.tokenizer.decode([t]).strip()]  # fmt: skip

    def noise(self) -> np.ndarray:
        return self.rng.uniform(0.5, 1.5, self.tokens.shape).astype(np.float32)

    def activity(self, path, *dense):
        return handmade.activity(path, self.tokens, dense, self.used)


@pytest.fixture(scope="module")
def planted():
    return Planted()


def test_a_latent_of_arabic_with_noise_has_the_numbers_of_its_construction(planted, tmp_path):
    arabic, rng = planted.inside("Arabic"), planted.rng
    off = rng.random(arabic.shape)
    latent = planted.noise() * (arabic & (off < 0.8) | ~arabic & (off < 0.02))
    activity = planted.activity(tmp_path / "a", planted.noise() * (off < 0.1), latent)
    found = specificity(activity, planted.tokenizer, ["Arabic"], labels=planted.labels, best=1)
    (unit,) = found.of("Arabic script").latents
    tested = activity.held_out[:, None] & planted.used
    inside, values, on = arabic[tested], latent[tested], latent[tested] > 0
    assert unit.unit == 1 and unit.active == on.sum()
    assert unit.above_zero.precision == pytest.approx(inside[on].mean(), abs=1e-9)
    assert unit.above_zero.recall == pytest.approx(on[inside].mean(), abs=1e-9)
    assert unit.mass == pytest.approx(values[inside].sum() / values.sum(), rel=1e-5)
    assert unit.pearson_inside == pytest.approx(np.corrcoef(values, inside)[0, 1], abs=1e-6)
    assert unit.pearson == pytest.approx(unit.pearson_inside, abs=2e-3)  # all Arabic is as likely
    p, q, var = inside.mean(), 0.8, 1 / 12  # values are 1 +- 1/2, on for 0.8 of Arabic and 2% else
    mean, square = q * p + 0.02 * (1 - p), (1 + var) * (q * p + 0.02 * (1 - p))
    expected = (q * p - mean * p) / np.sqrt((square - mean**2) * p * (1 - p))
    assert unit.pearson_inside == pytest.approx(expected, abs=0.03)
    assert sum(unit.inside) + sum(unit.outside) == unit.active
    ours = planted.labels.of("Arabic")[tested]
    assert unit.sensitivity == pytest.approx(on[ours].mean(), abs=1e-9) and unit.documents == 1


def test_a_tenth_of_russian_lowers_precision_by_the_computed_amount(planted, tmp_path):
    arabic, russian = planted.inside("Arabic"), planted.inside("Russian")
    tenth = russian & (planted.rng.random(russian.shape) < 0.1)
    dense = [planted.noise() * where for where in (arabic, arabic | tenth)]
    activity = planted.activity(tmp_path / "a", *dense)
    pure, mixed = specificity(
        activity, planted.tokenizer, ["Arabic"], best=2
    ).of("Arabic script").latents  # fmt: skip
    tested = activity.held_out[:, None] & planted.used
    a, r = (arabic & tested).sum(), (tenth & tested).sum()
    assert (pure.unit, mixed.unit) == (0, 1)
    assert pure.above_zero.precision == 1
    assert mixed.above_zero.precision == pytest.approx(a / (a + r))
    assert r / (r + a) == pytest.approx(0.1 * (russian & tested).sum() / a, rel=0.4)


def test_a_neuron_of_half_arabic_and_half_korean_has_its_closed_form(planted, tmp_path):
    arabic, korean = planted.inside("Arabic"), planted.inside("Korean")
    neuron = -(0.5 * arabic + 0.5 * korean) + 3
    noise = planted.rng.normal(size=(planted.tokens.size, 3))
    noise[:, 1] = neuron.reshape(-1)
    store = write_store(
        tmp_path / "store", noise.astype(np.float32), context_length=64, tokens=planted.tokens,
        special_tokens=[planted.tokenizer.bos],
    )  # fmt: skip
    activity = planted.activity(tmp_path / "a", planted.noise() * arabic)
    found = specificity(activity, planted.tokenizer, ["Arabic"], neurons=store)
    concept = found.of("Arabic script")
    tested = activity.held_out[:, None] & planted.used
    a, k = arabic[tested].mean(), korean[tested].mean()
    assert (concept.neuron.unit, concept.neuron.sign) == (1, -1)
    expected = np.sqrt(a * (1 - a - k) / ((a + k) * (1 - a)))
    assert concept.neuron.pearson_inside == pytest.approx(expected, abs=1e-5)
    latent = activity.dense(0)[tested]
    together = np.corrcoef(latent, neuron[tested])[0, 1]
    assert concept.neuron_of_latent.pearson == pytest.approx(together, abs=1e-5)
    other = write_store(
        tmp_path / "other", noise.astype(np.float32), context_length=64,
        tokens=planted.tokens[::-1], special_tokens=[planted.tokenizer.bos],
    )  # fmt: skip
    with pytest.raises(UserError, match="lacks sequences of .* or has other tokens"):
        specificity(activity, planted.tokenizer, ["Arabic"], neurons=other)


def test_an_activity_of_neurons_and_another_sae(planted, tmp_path):
    arabic, korean = planted.inside("Arabic"), planted.inside("Korean")
    activity = planted.activity(tmp_path / "a", planted.noise() * arabic)
    other = planted.activity(tmp_path / "b", 1.0 * korean, 2.0 * activity.dense(0))
    found = specificity(
        activity, planted.tokenizer, ["Arabic"],
        neurons=other, other=other, controls={"random": other},
    )  # fmt: skip
    concept = found.of("Arabic script")
    assert concept.latents_inside == 1
    assert (concept.other.unit, concept.other.pearson) == (1, pytest.approx(1))
    assert concept.neuron.unit == concept.neuron_of_latent.unit == 1
    assert concept.controls["random"].at_best == concept.neuron.at_best
    assert concept.neuron.pearson == pytest.approx(concept.latents[0].pearson)


def digits_sae(model, source):
    """An SAE of two latents: one is active on digits and writes them, the other is random."""
    texts = source.texts()
    x = source.read(np.arange(len(texts.tokens))).reshape(-1, model.config.d_model)
    tokenizer = model.tokenizer
    digits = [t for t in range(1, tokenizer.vocab_size) if tokenizer.decode([t]).strip().isdigit()]
    inside = np.isin(texts.tokens, digits).reshape(-1)
    towards = x[inside].mean(axis=0) - x[~inside].mean(axis=0)
    middle = (x[inside].mean(axis=0) + x[~inside].mean(axis=0)) / 2
    rng = np.random.default_rng(0)
    w_enc = np.stack([towards, rng.normal(size=len(towards))], axis=1)
    params = model.params
    unembed = params["embed"].T if model.config.tie_embeddings else params["unembed"]
    write = np.asarray(unembed[:, digits]).mean(axis=1) - np.asarray(unembed).mean(axis=1)
    w_dec = np.stack([write, rng.normal(size=len(write))])
    config = resolve(ReLUConfig(d_sae=2), len(towards))
    parameters = {
        **{name: np.full(2, value) for name, value in ReLU.fresh_latent(config).items()},
        "w_enc": w_enc / np.linalg.norm(w_enc, axis=0),
        "w_dec": w_dec / np.linalg.norm(w_dec, axis=1, keepdims=True),
        "b_enc": np.array([-middle @ towards / np.linalg.norm(towards), 0.0]),
        "b_dec": np.zeros(len(towards)),
    }
    return ReLU.from_parameters(config, {n: np.float32(p) for n, p in parameters.items()})


@pytest.mark.slow
def test_a_latent_that_writes_its_concept_has_influence(tmp_path):
    model = lm.open_model(lm.DEMO_MODEL)
    rng = np.random.default_rng(0)
    texts = [f"{a} and the {b} dogs saw {a + b}" for a, b in rng.integers(1, 99, (200, 2))]
    texts += [pathlib.Path(inspect.getsourcefile(m)).read_text() for m in (inspect, argparse)]
    tokens = lm.pack(texts, model.tokenizer, 32)
    source = ModelRows(
        model, "resid_post.0", tokens, what="text", excluded_tokens=[model.tokenizer.bos]
    )
    sae = digits_sae(model, source)
    activity = record(sae, source, tmp_path / "a")
    found = specificity(
        activity, model.tokenizer, ["numbers", "Arabic"],
        sae=sae, model=model, steer=["numbers"], factors=[4],
    )  # fmt: skip
    concept = found.of("numbers")
    assert concept.latents[0].unit == 0 and concept.latents[0].at_best.f1 > 0.8
    weights = concept.logit_weights
    assert weights.above > 0.9 and weights.inside > weights.outside + weights.spread
    assert sum(weights.counts_inside) == weights.tokens
    untouched, latent, control = concept.steering
    assert (latent.push, control.push) == ("the latent", "a random latent")
    assert latent.tokens > 0.5 > max(untouched.tokens, control.tokens)
    assert found.of("Arabic script").said == "too little text: 0 tokens of it"
    with pytest.raises(UserError, match="steering needs"):
        specificity(activity, model.tokenizer, ["numbers"], steer=["numbers"])
    assert (
        "Steering to numbers" in (write_specificity(tmp_path / "o", found) / "table.md").read_text()
    )


def test_no_latent_is_said_to_be_none(planted, tmp_path):
    on = planted.rng.random(planted.tokens.shape) < 0.2
    activity = planted.activity(tmp_path / "a", planted.noise() * on)
    found = specificity(activity, planted.tokenizer, ["Arabic", "Hebrew"])
    assert not found.of("Arabic script").has_latent
    assert found.of("Arabic script").said.startswith("no latent")
    assert found.of("Arabic script").latents_inside == 0
    assert found.of("Hebrew script").said == "too little text: 0 tokens of it"


def test_thresholds_ceilings_and_bands(planted, tmp_path):
    arabic = planted.inside("Arabic")
    dense = np.where(arabic, 3.0, 1.0)  # weakly active everywhere
    activity = planted.activity(tmp_path / "a", dense)
    found = specificity(activity, planted.tokenizer, ["Arabic", "documents"], labels=planted.labels)
    concept = found.of("Arabic script")
    (unit,) = concept.latents
    assert concept.latents_inside == 0 and found.of("Arabic documents").latents_inside == 0
    assert unit.at_best.threshold == 3 and unit.at_best.f1 == 1 and unit.above_zero.f1 < 0.6
    assert unit.bands[:3] == [None] * 3 and unit.bands[-1] == 1 and unit.bands[4] == 0
    tested = activity.held_out[:, None] & planted.used
    ours, inside = planted.labels.of("Arabic")[tested], arabic[tested]
    assert concept.ceiling.labels == ["Arabic"]
    assert concept.ceiling.recall == pytest.approx(inside[ours].mean())
    assert concept.ceiling.precision == 1
    assert concept.ceiling.pearson == pytest.approx(np.corrcoef(ours, inside)[0, 1], abs=2e-3)
    assert found.of("Arabic documents").kind == "documents"
    assert found.of("Arabic documents").ceiling is None
    folder = write_specificity(tmp_path / "out", found)
    assert json.loads((folder / "specificity.json").read_text())["concepts"]
    (line, *_) = [row for _, row in read_csv(folder / "table.csv")]
    assert float(line["best_f1"]) == 1 and line["concept"] == "Arabic script"
    assert "| Arabic script |" in (folder / "table.md").read_text()
    assert (folder / "figures" / "Arabic_script.png").is_file()
