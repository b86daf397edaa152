"""Synthetic worlds: what a spec says is what the rows hold, whoever asks for them."""

import re
import time

import numpy as np
import pytest
import scipy.stats

from sae_jax.activations import World, WorldStream, open_stream, write_store
from sae_jax.config import DataConfig
from sae_jax.errors import UserError

TREES = "world:superposition,width=16,features=60,roots=4,branching=3,depth=2,max_rate=0.4"
COPULA = "world:superposition,width=16,features=40,correlation_rank=2,correlation_scale=0.5"
WORLDS = {
    "constant": "world:orthonormal,width=16,features=16",
    "random": "world:orthonormal,width=16,features=12,magnitude_std=0.7,offset=2,seed=3",
    "certain": "world:orthonormal,width=8,features=8,rate=1",
    "superposition": "world:superposition,width=16,features=48,offset=0.5",
    "trees": TREES,
    "loose_trees": TREES + ",exclusive=false",
    "copula": COPULA,
    "trees_and_copula": TREES + ",correlation_rank=3,correlation_scale=0.3",
    "circles": "world:manifolds,width=16,features=8",
    "spheres": "world:manifolds,width=16,features=10,dims=3,radius=2,sites=2",
}
SAMPLE = 2**16


@pytest.fixture(scope="module", params=WORLDS.values(), ids=WORLDS)
def sampled(request):
    """(world, activations, magnitudes, rows) of a sample."""
    world = World(request.param)
    activations, x = world.sample(np.arange(SAMPLE))
    return world, activations, world.magnitudes(activations), x


def test_every_feature_fires_at_its_rate(sampled):
    world, _, magnitudes, _ = sampled
    fired = (magnitudes > 0).sum(axis=0)
    spread = np.sqrt(SAMPLE * world.rates * (1 - world.rates))
    assert (np.abs(fired - SAMPLE * world.rates) <= 5 * spread).all()


def test_moments_of_the_rows(sampled):
    world, _, _, x = sampled
    stream = WorldStream(world, ",".join(world.site_names), batch_size=8)
    error = 5 * x.std(axis=0) / np.sqrt(SAMPLE) + 1e-5
    assert (np.abs(x.mean(axis=0, dtype=np.float64) - stream.mean) <= error).all()
    for i, part in enumerate(np.split(x, len(world.site_names), axis=1)):
        squared = np.sum(part.astype(np.float64) ** 2, axis=1)
        # Twice the spread of a mean: where firings depend, the figure is a sample's too.
        allowed = 5 * 2 * squared.std() / np.sqrt(SAMPLE) + 1e-5 * squared.mean()
        assert abs(squared.mean() - stream.site_mean_squared_norms[i]) <= allowed


def test_rows_are_the_features_times_the_activations(sampled):
    world, activations, magnitudes, x = sampled
    some = slice(100, 140)
    dense = activations[some].toarray()
    for site, part in enumerate(np.split(x[some], len(world.site_names), axis=1)):
        assert np.allclose(np.linalg.norm(world.features[site], axis=1), 1, atol=1e-6)
        want = dense @ world.features[site] + world.offsets[site]
        np.testing.assert_allclose(part, want, atol=1e-4)
    blocks = dense.reshape(len(dense), world.num_features, world.dims)
    np.testing.assert_allclose(magnitudes[some].toarray(), np.linalg.norm(blocks, axis=2), 1e-5)


def test_a_row_depends_on_its_id_alone():
    for spec in (WORLDS["random"], WORLDS["trees_and_copula"], WORLDS["spheres"]):
        want = World(spec).sample(np.arange(3000))[1]
        ids = np.random.default_rng(0).permutation(3000)[:700]
        np.testing.assert_array_equal(World(spec).sample(ids)[1], want[ids])
        np.testing.assert_array_equal(World(spec).sample(ids[:1])[1], want[ids[:1]])
        other = World(re.sub(",seed=.*", "", spec) + ",seed=9").sample(np.arange(3000))[1]
        assert not np.allclose(other.mean(axis=0), want.mean(axis=0), atol=1e-3)


def test_rows_are_those_of_version_1():
    """If this fails, the same spec now names another world: results of runs on worlds no longer
    compare. Take the change back, or raise `sampling._VERSION` and put the new numbers here."""
    ids = [0, 1, 2, 3, 700, 701]
    activations, x = World("world:superposition,width=4,features=6,max_rate=0.5").sample(ids)
    np.testing.assert_array_equal(activations.indices, GOLDEN["indices"])
    np.testing.assert_allclose(activations.data, GOLDEN["amounts"], rtol=1e-5)
    np.testing.assert_allclose(x[:, 0], GOLDEN["x"], rtol=1e-4)


GOLDEN = {
    "indices": [4, 0, 1, 2, 0, 0],
    "amounts": [4.70505, 5.11458, 5.4241, 4.8923, 5.10081, 4.8909],
    "x": [1.81668, -1.64838, 1.05571, -1.99401, 0.0, -1.91195],
}


def test_directions():
    orthonormal = World("world:orthonormal,width=20,features=11,sites=2")
    for q in orthonormal.features:
        np.testing.assert_allclose(q @ q.T, np.eye(11), atol=1e-6)
    assert np.abs(orthonormal.features[0] @ orthonormal.features[1].T).max() > 0.1
    few = World("world:superposition,width=20,features=15").features[0]
    np.testing.assert_allclose(few @ few.T, np.eye(15), atol=1e-5)
    many = World("world:superposition,width=20,features=90").features[0]
    least = 90**2 / 20  # of the sum of squared cosines (Benedetto and Fickus 2003)
    assert np.sum((many @ many.T) ** 2) == pytest.approx(least, rel=1.01e-3)
    curved = World("world:manifolds,width=10,features=12,dims=3").features[0].reshape(12, 3, 10)
    np.testing.assert_allclose(
        curved @ curved.swapaxes(1, 2), np.tile(np.eye(3), (12, 1, 1)), atol=1e-6
    )
    random = World("world:superposition,width=20,features=90,orthogonalise=false").features[0]
    assert np.sum((random @ random.T) ** 2) > 1.1 * least


@pytest.mark.parametrize("exclusive", [True, False])
def test_children_fire_only_with_their_parent(exclusive):
    world = World(TREES + f",exclusive={exclusive}")
    fires = world.activations(np.arange(SAMPLE)).toarray() > 0
    siblings_together = 0
    for parent in range(4 + 12):
        first = 4 + 3 * parent
        children = fires[:, first : first + 3]
        assert children.any(axis=0).all() and not children[~fires[:, parent]].any()
        assert world.rates[first : first + 3].sum() <= 0.8 * world.rates[parent] * (1 + 1e-9)
        siblings_together += (children.sum(axis=1) > 1).sum()
    assert (siblings_together == 0) == exclusive


def test_correlation_is_that_of_the_copula():
    world = World(COPULA)
    fires = world.activations(np.arange(4 * SAMPLE)).toarray() > 0
    loadings = world.settings.build().loadings
    correlation = loadings @ loadings.T
    np.fill_diagonal(correlation, 0)
    pairs = [
        np.unravel_index(pick(correlation), correlation.shape) for pick in (np.argmax, np.argmin)
    ]
    for i, j in pairs:
        rho = correlation[i, j]
        assert abs(rho) > 0.4
        below = scipy.stats.norm.ppf(world.rates[[i, j]])
        together = scipy.stats.multivariate_normal.cdf(below, cov=[[1, rho], [rho, 1]])
        count = (fires[:, i] & fires[:, j]).sum()
        assert abs(count - len(fires) * together) < 5 * np.sqrt(len(fires) * together) + 1


def test_points_lie_all_around_their_sphere():
    world = World(WORLDS["spheres"])
    activations = world.activations(np.arange(SAMPLE))
    first = activations[:, : world.dims].toarray()
    points = first[np.abs(first).sum(axis=1) > 0]
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 2, rtol=1e-5)
    # Archimedes: a coordinate of a uniform point on a sphere in 3 dimensions is uniform.
    for coordinate in points.T:
        assert scipy.stats.kstest(coordinate, scipy.stats.uniform(-2, 4).cdf).pvalue > 1e-4


@pytest.mark.parametrize("n", [0, 3, 8, 16])
@pytest.mark.parametrize("name", ["constant", "random"])
def test_optimal_mse_is_what_the_best_affine_space_leaves(name, n):
    world = World(WORLDS[name])
    activations, x = world.sample(np.arange(2 * SAMPLE))
    x = x.astype(np.float64)
    eigenvalues = np.linalg.eigvalsh(np.cov(x.T))[::-1]
    assert world.optimal_mse(n) == pytest.approx(eigenvalues[n:].sum(), rel=0.03, abs=1e-6)
    assert world.optimal_mse(0) == pytest.approx(world.variances[0])
    kept = world.features[0][np.argsort(-world._coordinate_variances())[:n]]
    centred = x - world.mean(0)
    left = np.mean(np.sum((centred - centred @ kept.T @ kept) ** 2, axis=1))
    assert world.optimal_mse(n, activations) == pytest.approx(left, rel=1e-4, abs=1e-6)


def test_sites_show_the_same_activations():
    """So the best transcoder is known: here the exact linear map from one site to the other."""
    world = World("world:orthonormal,width=12,features=12,sites=2,offset=1")
    x, y = np.split(world.sample(np.arange(500))[1], 2, axis=1)
    q, r = world.features
    mapped = (x - world.offsets[0]) @ q.T @ r + world.offsets[1]
    np.testing.assert_allclose(mapped, y, atol=1e-5)


def test_stream_reads_any_rows_of_any_step():
    world = World(WORLDS["spheres"])
    stream = WorldStream(world, "site.1,site.0", batch_size=96, seed=2)
    assert stream.width == 32 and stream.site_widths == (16, 16) == world.site_widths
    want = [stream.read(step) for step in range(5)]
    assert want[0].shape == (96, 32) and want[0].dtype == np.float32
    for prefetch in (0, 2):
        batches = stream.batches(2, prefetch=prefetch)
        for step in (2, 3, 4):
            np.testing.assert_array_equal(next(batches), want[step])
    parts = stream.batches(1, rows=[slice(80, 96), slice(0, 8)])
    np.testing.assert_array_equal(next(parts), want[1][[*range(80, 96), *range(8)]])
    np.testing.assert_array_equal(stream.read_rows(stream.batch_rows(3)[::-1]), want[3][::-1])
    other_batch = WorldStream(world, "site.1,site.0", batch_size=32, seed=2)
    np.testing.assert_array_equal(other_batch.read(3), want[1][:32])
    alone = WorldStream(world, "site.0", batch_size=96, seed=2)
    np.testing.assert_array_equal(alone.read(0), want[0][:, 16:])
    np.testing.assert_array_equal(alone.features, stream.features[:, 16:])


def test_splits_and_seeds_share_no_row_and_runs_share_the_held_out_ones():
    world = World(WORLDS["random"])

    def ends(**settings):
        stream = WorldStream(world, batch_size=64, **settings)
        steps = (0, stream.num_steps - 1)
        return stream, [stream.batch_rows(s)[i] for s, i in zip(steps, (0, -1), strict=True)]

    ranges = [ends(split="heldout"), *(ends(seed=seed) for seed in (0, 1, 2**26 - 2))]
    for (_, (_, last)), (_, (first, _)) in zip(ranges, ranges[1:], strict=False):
        assert last < first
    assert len({stream.read(0).tobytes() for stream, _ in ranges}) == len(ranges)
    heldout = ends(split="heldout", seed=5)[0]
    np.testing.assert_array_equal(heldout.read(1), ranges[0][0].read(1))


def test_open_stream_opens_worlds_and_stores(tmp_path):
    world = DataConfig(store="world:orthonormal,width=6,features=4,sites=3", batch_size=10, seed=4)
    world = vars(world) | {"site": "site.2", "target_site": "site.0"}
    stream = open_stream(DataConfig(**world), "heldout", batch_size=7)
    assert stream.site_names == ("site.2", "site.0") and stream.read(0).shape == (7, 12)
    rows = {name: np.random.default_rng(0).normal(size=(512, 3)) for name in "ab"}
    write_store(tmp_path / "store", [rows])
    data = DataConfig(str(tmp_path / "store"), "b", "a", batch_size=16, virtual_shards=4)
    stream = open_stream(data)
    both = np.concatenate([rows["b"], rows["a"]], axis=1)[stream.batch_rows(0)]
    np.testing.assert_allclose(stream.read(0), both, rtol=1e-6)


@pytest.mark.parametrize(
    "spec, complaint",
    [
        ("world:orthonorml", "'orthonorml'; did you mean 'orthonormal'"),
        ("world:", "orthonormal, superposition, manifolds"),
        ("world:orthonormal,wdith=3", "did you mean 'world:orthonormal,width'"),
        ("world:orthonormal,width=3.5", "world:orthonormal,width must be a whole number"),
        ("world:orthonormal,width=few", "world:orthonormal,width must be a whole number"),
        ("world:orthonormal,width", "width has no value"),
        ("world:orthonormal,width=64,width=32", "width is given twice"),
        ("world:orthonormal,width=0", "width must be 1 or more"),
        ("world:orthonormal,features=65", "at most width=64 of them, not features=65"),
        ("world:orthonormal,rate=1.2", "not rate=1.2"),
        ("world:orthonormal,seed=-1", "seed must be 0 or more"),
        (f"world:orthonormal,seed={2**64}", "seed must be below"),
        ("world:superposition,max_rate=0.001", "min_rate <= max_rate"),
        ("world:superposition,exclusive=7", "exclusive must be true or false"),
        ("world:superposition,roots=9,depth=3", "765 features in its trees"),
        ("world:superposition,correlation_rank=100", "leaves features no variance"),
        ("world:manifolds,dims=1", "dims of 2 or more"),
        ("world:manifolds,dims=65", "dims=65 needs a width of as many, not width=64"),
    ],
)
def test_a_bad_spec_is_refused_by_name(spec, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        World(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"store": "world:orthonormal,sites=2"}, "has several sites, choose one: site.0, site.1"),
        ({"site": "site.1"}, "must be one of: site.0|did you mean 'site.0'"),
        ({"site": "site.0,site.0"}, "site.0 of world:orthonormal is named twice"),
        ({"epochs": 2}, "data.epochs is 2"),
        ({"seed": 2**26}, "data.seed is 67108864"),
    ],
)
def test_data_settings_that_a_world_cannot_have(changes, complaint):
    with pytest.raises(UserError, match=complaint):
        open_stream(DataConfig(**{"store": "world:orthonormal", **changes}))


def test_only_orthonormal_worlds_know_their_optimum():
    with pytest.raises(UserError, match="no closed form"):
        World(COPULA).optimal_mse(3)


@pytest.mark.slow
def test_rows_come_faster_than_training_takes_them():
    stream = WorldStream(World("world:superposition,width=64,features=512"), batch_size=2048)
    stream.read(0)
    start = time.process_time()
    for step in range(1, 51):
        stream.read(step)
    assert 50 * 2048 / (time.process_time() - start) > 200_000
