"""Steering: edits of latents and what is measured of them, in models whose answers are known."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from world import make_model

from sae_jax import lm
from sae_jax.errors import UserError
from sae_jax.evaluate.metrics import activation_scale
from sae_jax.interpret import pushes, steering, steering_report
from sae_jax.sae import ReLU, ReLUConfig, TopK, TopKConfig, resolve

V, D, T = 7, 8, 6
CONTEXT = 12
FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "lm"
SITE, A, B, LATENT = "resid_post.0", 3, 5, 2  # the latent is on at token A, and makes token B
TOKENS = np.array([[0, 1, A, 2, A, 4], [0, 4, 4, A, 1, 6]], np.int32)
WEIGHT, PRESENT = 3.0, 1.5


def zeros(config: lm.DecoderConfig) -> dict:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), lm.layout(config))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Token t is 2 e_t, and A has 1.5 e_7 besides, of which the latent is made. Nothing else reads
    e_7 but token B's logit. Attention and MLP are silent."""
    config = lm.DecoderConfig(
        vocab_size=V, d_model=D, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4, d_mlp=8,
        max_context=CONTEXT, activation="relu", gated_mlp=False,
    )  # fmt: skip
    params = zeros(config)
    params["embed"][:, :V] = 2 * np.eye(V)
    params["embed"][A, 7] = PRESENT
    params["unembed"][7, B] = WEIGHT
    for name in ("attn_norm", "mlp_norm"):
        params["layers"][0][name][:] = 1
    params["final_norm"][:] = 1
    directory = tmp_path_factory.mktemp("latent_makes_b")
    lm.save_model(directory, config, params, np.float32, bos_token_id=0)
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    return lm.open_model(directory)


def make_sae(kind="autoencoder", latents=10, seed=0, d_in=D, d_out=D, sites=None):
    """Random latents, but for `LATENT` of an autoencoder, which is e_7 and nothing else."""
    rng = np.random.default_rng(seed)
    shapes = {
        "w_enc": (d_in, latents),
        "w_dec": (latents, d_out),
        "b_enc": (latents,),
        "b_dec": (d_out,),
    }
    arrays = {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    if kind == "autoencoder":
        arrays["w_enc"][7] = 0
        arrays["w_enc"][:, LATENT] = 0
        arrays["w_enc"][7, LATENT], arrays["b_enc"][LATENT] = 2.0, 0
        arrays["w_dec"][LATENT] = 0
        arrays["w_dec"][LATENT, 7] = 0.5 * 3.0  # and 3 is the scale
    config = resolve(
        ReLUConfig(kind=kind, d_sae=latents),
        sites or (d_in,),
        d_out if "transcoder" in kind else None,
    )
    if kind == "skip_transcoder":
        arrays["w_skip"] = rng.normal(size=(d_in, d_out)).astype(np.float32)
    scale = 1.0 if kind == "autoencoder" else 0.7
    return ReLU.from_parameters(config, jax.tree.map(jnp.asarray, arrays), scale, 3.0)


def expected_log_p(activation: np.ndarray, norm: float | None = None) -> np.ndarray:
    """The logs of the probabilities (..., V), where e_7 is `activation` beside another 2."""
    rms = np.sqrt((4 + activation**2) / D + 1e-5) if norm is None else norm
    logits = np.zeros((*activation.shape, V))
    logits[..., B] = WEIGHT * activation / rms
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


CLEAN = np.where(TOKENS == A, PRESENT, 0.0)


def texts(steered=None) -> steering.Texts:
    counts = np.ones(TOKENS.shape, bool)
    counts[:, -1] = False
    steered = np.ones(TOKENS.shape, bool) if steered is None else steered
    return steering.Texts(TOKENS, counts, steered)


@pytest.mark.parametrize("mode", ["clamp", "add"])
@pytest.mark.parametrize("factor", [-4.0, 0.0, 2.5])
def test_kl_and_probability_of_what_a_latent_makes_are_the_closed_form(model, mode, factor):
    maximum = 1.2
    push = pushes.latent_push(make_sae(), (SITE,), [LATENT], [maximum], mode)
    clean, steered = steering.measure(model, texts(), [push], factor, [B])
    after = np.full(TOKENS.shape, factor * maximum) + (CLEAN if mode == "add" else 0)
    p, q = expected_log_p(CLEAN)[:, :-1], expected_log_p(after)[:, :-1]
    nll = -np.take_along_axis(q, TOKENS[:, 1:, None], -1).mean()
    assert clean["kl"] == 0
    assert clean["token_logprob"] == pytest.approx(p[..., B].mean(), rel=1e-5)
    assert steered["token_logprob"] == pytest.approx(q[..., B].mean(), rel=1e-5)
    assert steered["ce"] == pytest.approx(nll, rel=1e-5)
    assert steered["ce_increase"] == pytest.approx(nll - clean["ce"], abs=1e-5)
    kl = (np.exp(p) * (p - q)).sum(-1).mean()
    assert steered["kl"] == pytest.approx(kl, rel=1e-4, abs=1e-7)


def test_only_chosen_positions_are_steered(model):
    push = pushes.latent_push(make_sae(), (SITE,), [LATENT], [1.0])
    where = TOKENS != 0
    _, steered = steering.measure(model, texts(where), [push], 5.0, [B])
    q = expected_log_p(np.where(where, 5.0, CLEAN))[:, :-1, B]
    assert steered["token_logprob"] == pytest.approx(q.mean(), rel=1e-5)


def test_same_norm_turns_the_activations_and_does_not_lengthen_them(model):
    edit = lm.same_norm(lm.clamp(make_sae(), LATENT, 40.0))
    _, tapped = model.forward(TOKENS, taps=[SITE], edits={SITE: edit})
    _, before = model.forward(TOKENS, taps=[SITE])
    norms = [np.linalg.norm(x[SITE], axis=-1) for x in (before, tapped)]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    np.testing.assert_allclose(tapped[SITE][..., 7] / norms[0], 1.0, atol=2e-3)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("same_norm", [False, pytest.param(True, marks=SLOW)])
@pytest.mark.parametrize("architecture", ["relu", "topk"])
def test_clamping_to_the_present_value_changes_no_bit(architecture, same_norm):
    """Of one latent and of several, at each position its own, in a model with all its parts."""
    model, site = lm.open_model(FIXTURES / "llama_tied_gqa"), "resid_mid.0"
    width = model.site_width(site)
    tokens = np.arange(36).reshape(4, 9)
    if architecture == "relu":
        sae = ReLU(ReLUConfig(d_in=width, d_sae=24), rngs=1, scale=0.37)
    else:
        sae = TopK(TopKConfig(d_in=width, d_sae=24, k=6), rngs=1, scale=0.37)
    clean, tapped = model.forward(tokens, taps=[site])
    activations = sae.encode(tapped[site]) * activation_scale(sae)
    assert (activations > 0).any()
    for latent in (5, [3, 8, 20], list(range(24))):
        edit = lm.clamp(sae, latent, activations[..., latent])
        edit = lm.same_norm(edit) if same_norm else edit
        logits, _ = model.forward(tokens, edits={site: edit})
        np.testing.assert_array_equal(logits, clean)
    logits, _ = model.forward(tokens, edits={site: lm.clamp(sae, 5, activations[..., 5] + 1)})
    assert not np.array_equal(logits, clean)


def test_several_latents_are_set_at_once(model):
    sae = make_sae(latents=12, seed=3)
    _, tapped = model.forward(TOKENS, taps=[SITE])
    x = tapped[SITE]
    latents, told = [1, LATENT, 9], np.array([0.5, 4.0, 0.0])
    scale, present = np.asarray(activation_scale(sae)), np.asarray(sae.encode(x))
    wanted = present.copy()
    wanted[..., latents] = told / scale[latents]
    expected = sae.decode(wanted) + (x - sae.decode(present))
    np.testing.assert_allclose(lm.clamp(sae, latents, told)(x), expected, atol=1e-4)
    (add,) = lm.latent_edits(sae, [SITE], latents, told, add=True).values()
    added = sae.decode(present + wanted * np.isin(np.arange(12), latents)) - sae.decode(present)
    np.testing.assert_allclose(add(x) - x, added, atol=1e-4)


@pytest.mark.parametrize("mode", ["clamp", "add"])
def test_a_crosscoder_writes_what_it_says_of_the_untouched_model_at_every_site(mode):
    sae = make_sae("crosscoder", d_in=2 * D, d_out=2 * D, sites=(D, D))
    sites = ("resid_post.0", "resid_post.1")
    rng = np.random.default_rng(5)
    clean = {site: jnp.float32(rng.normal(size=(2, T, D))) for site in sites}
    x = jnp.concatenate(list(clean.values()), axis=-1)
    latents, told = [0, 4], np.array([3.0, -2.0])
    values = told / np.asarray(activation_scale(sae))[latents]
    present = np.asarray(sae.encode(x))
    wanted = present.copy()
    wanted[..., latents] = values + (present[..., latents] if mode == "add" else 0)
    expected = np.split(sae.decode(wanted) + (x - sae.decode(present)), 2, axis=-1)
    edits = lm.latent_edits(sae, sites, latents, told, add=mode == "add", clean=clean)
    for site, new in zip(sites, expected, strict=True):
        elsewhere = clean[site] + 100.0  # what an edit of an earlier site might have done
        np.testing.assert_allclose(edits[site](elsewhere), new, atol=1e-4)
    same = lm.latent_edits(
        sae, sites, 4, present[..., 4] * np.asarray(activation_scale(sae))[4], clean=clean
    )
    for site in sites:
        np.testing.assert_array_equal(same[site](clean[site]), clean[site])


def test_what_cannot_be_steered_is_refused(model):
    sae = make_sae()
    crosscoder = make_sae("crosscoder", d_in=2 * D, d_out=2 * D, sites=(D, D))
    with pytest.raises(UserError, match="no latent 10: the SAE has latents 0 to 9"):
        pushes.latent_push(sae, (SITE,), [1, 10], [1.0, 1.0])
    with pytest.raises(UserError, match="named twice"):
        lm.clamp(sae, [1, 1], 1.0)
    with pytest.raises(UserError, match="latent 1 never fired"):
        pushes.latent_push(sae, (SITE,), [0, 1], [1.0, 0.0])
    with pytest.raises(UserError, match="the mode is 'clmp'"):
        pushes.latent_push(sae, (SITE,), [0], [1.0], "clmp")
    with pytest.raises(UserError, match="this autoencoder has 1 sites"):
        lm.latent_edits(sae, (SITE, SITE), 0, 1.0)
    with pytest.raises(UserError, match="clean="):
        lm.latent_edits(crosscoder, (SITE, "resid_post.1"), 0, 1.0)
    with pytest.raises(UserError, match="no position to measure on"):
        steering.measure(model, steering.Texts(TOKENS, TOKENS < 0, TOKENS < 0), [], 1.0)


WROTE = {  # after BOS and w1, greedily; nothing else makes any token likelier
    "all": [B, B, B, B],
    "no_bos": [B, B, B, B],
    "prompt": [B, 0, 0, 0],  # what B's position predicts is steered no more
    "continuation": [0, B, B, B],
}


@pytest.mark.slow
@pytest.mark.parametrize("positions", steering.POSITIONS)
def test_what_is_written_is_steered_at_chosen_positions(model, positions):
    prompts = [[0, 1], [0, 2, 4], [0]]
    push = pushes.latent_push(make_sae(), (SITE,), [LATENT], [1.0])
    experiment = steering.Steering(
        model,
        [push],
        steering.own_texts(model, prompts, 4, [0], positions),
        prompts,
        steering.Writing(max_new_tokens=4, temperature=0.0, samples=1),
        positions,
        special=[0],
        concept="w5 w5 w5",
    )
    untouched, (steered,) = experiment.untouched(), experiment.at(5.0)
    assert [sample.text.split() for sample in untouched.samples] == [["w0"] * 4] * 3
    expected = [WROTE[positions]] * 3
    if positions == "no_bos":
        expected[2] = [0, 0, 0, 0]
    wrote = [[int(word[1:]) for word in sample.text.split()] for sample in steered.samples]
    assert wrote == expected
    assert [sample.prompt for sample in steered.samples] == ["w1", "w2 w4", ""]
    assert steered.measures["concept"] == np.mean([w.count(B) > 2 for w in expected])
    assert untouched.measures["concept"] == 0 and untouched.measures["kl"] == 0
    assert steered.measures["kl"] > 0


@pytest.mark.slow
def test_a_crosscoder_writes_too(tmp_path):
    """Without a cache, but the same: what nothing is added to, it writes as the model does."""
    make_model(tmp_path, num_layers=2, d_model=D)
    model, sites = lm.open_model(tmp_path), ("resid_post.0", "resid_post.1")
    sae = make_sae("crosscoder", d_in=2 * D, d_out=2 * D, sites=(D, D))
    push = pushes.latent_push(sae, sites, [3], [1.0], "add")
    along = pushes.direction_push("random", sae, sites, pushes.random_direction(2 * D, 0), 1.0)
    experiment = steering.Steering(
        model,
        [push, along],
        prompts=[model.tokenizer.encode("the quick"), model.tokenizer.encode("fox")],
        writing=steering.Writing(max_new_tokens=5, temperature=0.0, samples=2),
    )
    plain = experiment.untouched()
    for outcome in experiment.at(0.0):
        assert outcome.samples == plain.samples
    for outcome in experiment.at(50.0):
        assert outcome.samples != plain.samples


def transcoder_run(kind: str, mode: str):
    """A transcoder of mlp_in.1 and mlp_out.1, told what to be, in the model and by hand."""
    model = lm.open_model(FIXTURES / "llama_tied_gqa")
    sites, latents, told = ("mlp_in.1", "mlp_out.1"), [2, 7], np.array([3.0, -1.0])
    width = model.site_width(sites[0])
    sae = make_sae(kind, latents=12, d_in=width, d_out=width)
    tokens = np.arange(36).reshape(4, 9)
    clean, tapped = model.forward(tokens, taps=sites)
    x, y = (tapped[site] for site in sites)
    return model, sae, sites, latents, told, tokens, clean, x, y


@pytest.mark.parametrize("mode", ["clamp", pytest.param("add", marks=SLOW)])
@pytest.mark.parametrize("kind", ["transcoder", pytest.param("skip_transcoder", marks=SLOW)])
def test_a_transcoder_is_steered_where_it_writes_by_what_it_reads(kind, mode):
    model, sae, sites, latents, told, tokens, clean, x, y = transcoder_run(kind, mode)
    scale = np.asarray(activation_scale(sae))
    present = np.asarray(sae.encode(x))
    wanted = present.copy()
    wanted[..., latents] = told / scale[latents] + (present[..., latents] * (mode == "add"))
    expected = y + (sae.decode(wanted, x) - sae.decode(present, x))
    edits = lm.latent_edits(sae, sites, latents, told, add=mode == "add")
    _, after = model.forward(tokens, taps=sites, edits=edits)
    np.testing.assert_allclose(after[sites[1]], expected, atol=1e-4)
    np.testing.assert_array_equal(after[sites[0]], x)
    if mode == "clamp":
        same = lm.latent_edits(sae, sites, latents, (present * scale)[..., latents])
        same = {site: lm.same_norm(edit) for site, edit in same.items()}
        np.testing.assert_array_equal(model.forward(tokens, edits=same)[0], clean)
        where = tokens % 2 == 0
        some = {site: lm.at(where, lm.unless([4], edit)) for site, edit in edits.items()}
        _, after = model.forward(tokens, taps=sites, edits=some)
        where = (where & (tokens != 4))[..., None]
        np.testing.assert_allclose(after[sites[1]], np.where(where, expected, y), atol=1e-4)


def test_the_difference_of_means_is_that_of_texts_or_of_the_latents_own_examples(model):
    sae = make_sae()
    with_a, without = ["w3 w3", "w1 w3"], ["w1", "w2 w4"]
    rows = [pushes.text_rows(model, (SITE,), texts, "texts") for texts in (with_a, without)]
    direction = pushes.difference_of_means(sae, *rows)
    embed = np.asarray(model.params["embed"])
    expected = embed[[3, 3, 1, 3]].mean(axis=0) - embed[[1, 2, 4]].mean(axis=0)
    np.testing.assert_allclose(direction, expected, atol=1e-6)
    (rows,) = [pushes.text_rows(model, (SITE,), ["w1 w3 w3 w2", "w3 w5"], "texts")]
    direction = pushes.difference_at_examples(sae, rows, [LATENT])
    np.testing.assert_allclose(direction, embed[3] - embed[[1, 2, 5]].mean(axis=0), atol=1e-6)

    class Damaged:  # a store whose excluded rows are not finite
        num_batches = rows.num_batches

        def batches(self, size):
            for x, used in rows.batches(size):
                yield np.where(used[:, None], x, np.nan), used

    same = pushes.difference_at_examples(sae, Damaged(), [LATENT])
    np.testing.assert_array_equal(same, direction)
    nowhere = pushes.text_rows(model, (SITE,), ["w1 w2"], "texts")
    assert pushes.difference_at_examples(sae, nowhere, [LATENT]) is None
    assert pushes.written_length(sae, [LATENT], [2.5]) == pytest.approx(2.5)
    push = pushes.direction_push("d", sae, (SITE,), direction, 2.5)
    (edit,) = push.edits(2.0, {}).values()
    moved = edit(jnp.zeros((1, 1, D)))
    np.testing.assert_allclose(moved[0, 0], 5 * direction / np.linalg.norm(direction), rtol=1e-5)


def test_the_largest_factor_that_the_model_bears():
    def made(push, factor, rise):
        return steering.Outcome(push, factor, {"ce_increase": rise}, [])

    rises = {"a": [0.1, 0.6, 0.2], "b": [0.9, 1.0, 2.0], "c": [0.0, 0.1, 0.49]}
    rises |= {"nan": [0.1, float("nan"), 0.2], "read again": [0.1, None, 0.2]}
    outcomes = [made(steering.UNTOUCHED, 0.0, 0.0), made("a", -5.0, 9.0)]
    for push, values in rises.items():
        outcomes += [made(push, f, rise) for f, rise in zip((1.0, 2.0, 5.0), values, strict=True)]
    assert steering_report.bearable(outcomes) == {
        "a": 1.0, "b": None, "c": 5.0, "nan": 1.0, "read again": 1.0,
    }  # fmt: skip


def test_distinct_n_grams():
    assert steering.distinct([1, 2, 3, 4], 1) == 1
    assert steering.distinct([1, 2, 1, 2, 1], 1) == 2 / 5
    assert steering.distinct([1, 2, 1, 2, 1], 2) == 2 / 4
    assert steering.distinct([1], 2) is None
