"""Recovery of known features: dictionaries made to have known scores, brute force, and peers."""

import itertools

import numpy as np
import pytest
import scipy.sparse

from sae_jax import interop, sae
from sae_jax.activations import World
from sae_jax.cli import main
from sae_jax.config import Config, DataConfig, TrainConfig
from sae_jax.evaluate import report
from sae_jax.evaluate.recovery import RecoveryMeter
from sae_jax.evaluate.worlds import WorldRows
from sae_jax.sae import ReLUConfig, TopKConfig
from sae_jax.train.directory import read_config
from sae_jax.train.run import train_run

GENERATOR = np.random.default_rng


def measure(features, decoder, magnitudes, latents, dims=1, batches=3):
    meter = RecoveryMeter(features, decoder, dims)
    parts = zip(np.array_split(magnitudes, batches), np.array_split(latents, batches), strict=True)
    for part in parts:
        meter.add(*part)
    return meter.finish()


def sparse_sample(rows=600, features=7, rate=0.3, seed=0):
    rng = GENERATOR(seed)
    return rng.uniform(0.5, 2, (rows, features)) * (rng.random((rows, features)) < rate)


def directions(count, width, seed=1):
    x = GENERATOR(seed).normal(size=(count, width))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_the_true_dictionary_is_recovered_in_any_order_and_length():
    features, magnitudes = directions(7, 5), sparse_sample()
    order = GENERATOR(2).permutation(7)
    lengths = GENERATOR(3).uniform(0.2, 3, (7, 1))
    found = measure(features, lengths * features[order], magnitudes, magnitudes[:, order])
    assert found.scalars.pop("dead_fraction") == 0
    assert found.scalars == pytest.approx(dict.fromkeys(found.scalars, 1.0), abs=1e-5)
    np.testing.assert_array_equal(order[found.features["match"]], np.arange(7))
    np.testing.assert_allclose(found.features["rate"], (magnitudes > 0).mean(axis=0))


def test_each_fault_lowers_its_own_score():
    features, true = directions(6, 6), sparse_sample(features=6)
    perfect = measure(features, features, true, true).scalars

    def changed(decoder=features, latents=true):
        scalars = measure(features, decoder, true, latents).scalars
        return {name for name, value in scalars.items() if abs(value - perfect[name]) > 1e-3}

    assert changed(latents=0.8 * true) == {"shrinkage"}
    silent = np.where(GENERATOR(0).random(true.shape) < 0.3, 0, true)
    assert changed(latents=silent) == {"recall", "f1", "matched_correlation"}
    noisy = np.where(true == 0, GENERATOR(0).random(true.shape) < 0.2, true)
    assert changed(latents=noisy) == {"precision", "f1", "matched_correlation"}
    dead = true * (np.arange(6) != 3)
    died = {"dead_fraction", "precision", "recall", "f1", "matched_correlation"}
    assert changed(latents=dead) == died
    twice = features.copy()
    twice[1] = twice[0]
    assert {"mmcs", "mcc", "uniqueness"} <= changed(decoder=twice)
    assert changed(decoder=-features) == {"mmcs"}


def test_scores_are_those_of_their_definitions():
    """Everything by brute force, over all matchings of 4 features and 5 latents."""
    rng = GENERATOR(5)
    features, decoder = directions(4, 3), directions(5, 3, seed=2) * rng.uniform(0.5, 2, (5, 1))
    true = sparse_sample(features=4)
    latents = np.maximum(true @ rng.normal(size=(4, 5)) + 0.5 * rng.normal(size=(600, 5)), 0)
    found = measure(features, decoder, true, latents)
    cosines = features @ (decoder / np.linalg.norm(decoder, axis=1, keepdims=True)).T
    correlation = np.corrcoef(true.T, latents.T)[:4, 4:]

    def best_matching(score):
        return max(
            np.mean([score[i, j] for i, j in enumerate(chosen)])
            for chosen in itertools.permutations(range(5), 4)
        )

    best = np.abs(cosines).argmax(axis=0)
    on, fires = true[:, best] > 0, latents > 0
    both = (on & fires).sum(axis=0)
    precision, recall = both / fires.sum(axis=0), both / on.sum(axis=0)
    expected = {
        "mmcs": cosines.max(axis=1).mean(),
        "mcc": best_matching(np.abs(cosines)),
        "matched_correlation": best_matching(correlation),
        "uniqueness": len(set(best)) / 5,
        "precision": precision.mean(),
        "recall": recall.mean(),
        "f1": (2 * both / (fires.sum(axis=0) + on.sum(axis=0))).mean(),
        "shrinkage": (latents / np.where(on, true[:, best], 1))[on & fires].mean(),
        "dead_fraction": (fires.sum(axis=0) == 0).mean(),
    }
    assert found.scalars == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(found.latents["precision"], precision)
    for feature, latent in enumerate(found.features["match"]):
        on_both = (true[:, feature] > 0) & fires[:, latent]
        for name, values in (("magnitude", true[:, feature]), ("activation", latents[:, latent])):
            assert found.features[name][feature] == pytest.approx(values[on_both].mean(), rel=1e-5)


@pytest.mark.parametrize("features, latents", [(9, 4), (4, 9)])
def test_a_dictionary_of_another_size(features, latents):
    true = sparse_sample(features=9)
    q = np.eye(9)
    found = measure(q[:features], q[:latents], true[:, :features], true[:, :latents])
    share = latents / features
    assert found.scalars["mmcs"] == pytest.approx(min(1, share))
    assert found.scalars["mcc"] == pytest.approx(1)
    assert found.scalars["uniqueness"] == min(1, features / latents)
    unmatched = found.features["match"] == -1
    assert unmatched.sum() == max(0, features - latents)
    np.testing.assert_array_equal(np.isnan(found.features["f1"]), unmatched)


def test_several_sites_are_one_longer_direction():
    """A feature of magnitude a adds a vector of length a sqrt(2) to two sites side by side."""
    q = np.concatenate([directions(5, 8), directions(5, 8, seed=4)], axis=1)
    true = sparse_sample(features=5)
    found = measure(q, q / np.sqrt(2), true, true * np.sqrt(2))
    assert found.scalars["mcc"] == found.scalars["shrinkage"] == pytest.approx(1)


def test_latents_that_tile_a_circle_find_it():
    world = World("world:manifolds,width=6,features=3,rate=0.5")
    magnitudes = world.magnitudes(world.activations(np.arange(4000))).toarray()
    angle = np.arange(8) * np.pi / 4
    tiles = np.stack([np.cos(angle), np.sin(angle)], axis=1) @ world.features[0][2:4]
    latents = np.repeat(magnitudes[:, 1:2], 8, axis=1)
    found = measure(world.features[0], tiles, magnitudes, latents, dims=2)
    np.testing.assert_array_equal(found.latents["best"], 1)
    np.testing.assert_allclose(found.features["cosine"], [0, 1, 0], atol=1e-5)
    assert found.scalars["uniqueness"] == 1 / 8 and found.scalars["f1"] == pytest.approx(1)


def test_nothing_that_fires_is_no_division_by_zero():
    found = measure(np.eye(3), np.zeros((2, 3)), np.zeros((10, 3)), np.zeros((10, 2)))
    assert np.isnan(found.scalars.pop("shrinkage"))
    assert found.scalars.pop("dead_fraction") == 1 and found.scalars.pop("uniqueness") == 0.5
    assert set(found.scalars.values()) == {0.0}


def test_ten_thousand_features_from_sparse_batches():
    rng = GENERATOR(0)
    G, N, rows = 10_000, 400, 2_000
    features = directions(G, 64)
    picked = rng.integers(0, G, (rows, 20))
    shape = (rows, G)
    true = scipy.sparse.csr_array(
        (np.ones(rows * 20), (np.repeat(np.arange(rows), 20), picked.flat)), shape
    )
    meter = RecoveryMeter(features, features[:N])
    meter.add(true, true[:, :N])
    found = meter.finish()
    assert found.scalars["mcc"] == pytest.approx(1) and found.scalars["f1"] > 0.98


def best_sae(data: DataConfig, world: World, n: int, kind: str) -> sae.SAE:
    """The optimum: a latent for each of the n features of the largest variance, b_dec the mean of
    the others. Its latents are in other units than the features."""
    sites = [world.site_names.index(name) for name in data.site.split(",")]
    targets = [world.site_names.index(data.target_site)] if data.target_site else sites
    q_in, q_out = (np.concatenate([world.features[i][:n] for i in s], 1) for s in (sites, targets))
    mean, b_dec = (np.concatenate([world.mean(i) for i in s]) for s in (sites, targets))
    amounts = (world.mean(0) - world.offsets[0]) @ world.features[0][:n].T
    scale, rounding = 3.0, 1e-3  # nothing should fire by rounding
    parameters = {
        "w_enc": 2 * q_in.T / len(sites),
        "b_enc": 2 * scale * (amounts - mean @ q_in.T / len(sites)) - rounding,
        "w_dec": q_out / 2,
        "b_dec": scale * (b_dec - amounts @ q_out),
    }
    config = ReLUConfig(kind=kind, d_sae=n)
    widths = tuple(world.site_widths[i] for i in sites)
    config = sae.resolve(
        config, widths, world.site_widths[targets[0]] if data.target_site else None
    )
    parameters = {name: value.astype(np.float32) for name, value in parameters.items()}
    return sae.ReLU.from_parameters(config, parameters, scale)


@pytest.mark.parametrize(
    "kind, site, target_site",
    [
        ("autoencoder", "site.1", ""),
        ("transcoder", "site.0", "site.1"),
        ("crosscoder", "site.0,site.1", ""),
    ],
)
def test_the_best_sae_of_a_world_reaches_its_optimum(kind, site, target_site):
    spec = "world:orthonormal,width=12,features=12,sites=2,offset=1,magnitude=2,magnitude_std=0.2"
    data = DataConfig(store=spec, site=site, target_site=target_site)
    world = World(spec)
    found = report.evaluate(best_sae(data, world, 5, kind), WorldRows(data, tokens=20_001))
    assert found.rows.rows == found.recovery.rows == 20_001
    scores = dict(found.recovery.scalars)
    sites = 2 if kind == "crosscoder" else 1
    assert scores.pop("optimal_mse") == pytest.approx(sites * world.optimal_mse(5), rel=0.1)
    assert scores.pop("mse_over_optimal") == pytest.approx(1, rel=1e-4)
    assert scores.pop("mmcs") == pytest.approx(5 / 12, rel=1e-4)
    assert scores.pop("dead_fraction") == 0
    assert scores == pytest.approx(dict.fromkeys(scores, 1.0), rel=1e-3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on a world."""
    config = Config(
        sae=TopKConfig(d_sae=16, k=4),
        data=DataConfig(store="world:superposition,width=8,features=24", batch_size=256),
        train=TrainConfig(tokens=256 * 20, log_every=5),
    )
    path = tmp_path_factory.mktemp("world") / "run"
    train_run(config, path)
    return path


@pytest.mark.slow
def test_a_run_on_a_world_is_evaluated_with_its_features(run, capsys):
    assert main(["eval", f"--run={run}", "--tokens=30000"]) == 0
    out = capsys.readouterr().out
    found = report.load(run / "eval.json")
    assert "Of the world's 24 features" in out and f"{found.recovery.scalars['f1']:.5g}" in out
    assert "cross-entropy" not in out and "least mean squared error" not in out
    assert found.rows.rows == 30_000 and found.spliced is None
    direct = report.evaluate(interop.load(run), WorldRows(read_config(run).data, tokens=30_000))
    assert direct.recovery.scalars == pytest.approx(found.recovery.scalars)
    for part in ("features", "latents"):
        for name, values in getattr(direct.recovery, part).items():
            np.testing.assert_array_equal(getattr(found.recovery, part)[name], values)
    assert (run / "eval_recovery.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--tokens_file=x.npy"], "no language model or text goes with"),
        (["--store=world:orthonormal"], "is 64 wide, but the autoencoder was trained on 8"),
        (["--store=world:rings"], "the kind of world in data.store is 'rings'"),
    ],
)
def test_what_cannot_be_evaluated_on_a_world(run, capsys, flags, complaint):
    assert main(["eval", f"--run={run}", *flags]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.peers
@pytest.mark.filterwarnings("default")  # of what sae-lens imports
def test_scores_of_sae_lens():
    torch = pytest.importorskip("torch")
    from sae_lens.synthetic import evals

    rng = GENERATOR(7)
    features, decoder = directions(20, 8), rng.normal(size=(12, 8))
    true = sparse_sample(features=20)
    latents = np.maximum(true @ features @ decoder.T - 0.5, 0)
    latents[:, 3] = 0
    ours = measure(features, decoder, true, latents).scalars
    q, w, t, f = (torch.tensor(a, dtype=torch.float32) for a in (features, decoder, true, latents))
    scores = evals.ClassificationMetricsCalculator(w, q)
    scores.add_batch(f, t)
    theirs = scores.compute()
    dead = evals.DeadLatentsCalculator(12)
    dead.add_batch(f)
    assert ours["mcc"] == pytest.approx(evals.mean_correlation_coefficient(q, w), rel=1e-5)
    assert ours["uniqueness"] == pytest.approx(evals.feature_uniqueness(w, q), rel=1e-5)
    assert ours["precision"] == pytest.approx(theirs.precision, rel=1e-5)
    assert ours["recall"] == pytest.approx(theirs.recall, rel=1e-5)
    assert ours["f1"] == pytest.approx(theirs.f1_score, rel=1e-5)
    assert ours["dead_fraction"] == dead.compute() / 12
