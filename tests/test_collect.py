"""Examples of every latent in one pass, against brute force over a planted world."""

import fcntl
import pathlib
import signal
import sys

import jax
import numpy as np
import planted
import pytest
import scipy.stats
import world
from planted import SLOTS, N, T
from training import finish_all, launch, together, wait_until

from sae_jax import lm
from sae_jax.activations import write_store
from sae_jax.errors import UserError
from sae_jax.evaluate.metrics import activation_scale
from sae_jax.evaluate.sources import HeldOutRows, ModelRows
from sae_jax.interpret import coactive, collect, describe_cost, hashes
from sae_jax.interpret.collection import BINS, FULL
from sae_jax.ops.active import positive_entries

ARRAYS = ("histogram", "value", "sequence", "position", "window", "coactive", "similarity")
KINDS = {
    "autoencoder": ("a", (8,)),
    "transcoder": ("a,b", (8, 8)),
    "crosscoder": ("a,b", ((8, 8),)),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return planted.store(tmp_path_factory.mktemp("planted") / "store")


def rows(store, sites="a", **options):
    return HeldOutRows(store, sites, **{"tokens": 10**6, "holdout_fraction": None} | options)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def arrays(found) -> dict[str, np.ndarray]:
    names = ("density", "mean_activation", "max_activation")
    out = {name: np.load(found.path / f"{name}.npy") for name in ARRAYS}
    return out | {name: getattr(found, name) for name in names}


def part(value, largest, parts) -> int:
    """The number i of the part for which largest * i / parts < value <= largest * (i + 1) / parts,
    in whole numbers as far as floats are."""
    return next(i for i in range(parts) if value * parts <= largest * (i + 1))


def brute_force(acts: np.ndarray, tokens: np.ndarray, counts: int) -> dict[str, np.ndarray]:
    """All arrays, from dense activations (sequences, T, N) that are 0 where rows do not count."""
    top, intervals, per_interval = SLOTS["top"], SLOTS["intervals"], SLOTS["per_interval"]
    before, after = SLOTS["before"], SLOTS["after"]
    slots = top + intervals * per_interval
    n = acts.shape[-1]
    out = {
        "density": (acts > 0).sum((0, 1)) / counts,
        "mean_activation": acts.sum((0, 1), dtype=float) / np.maximum((acts > 0).sum((0, 1)), 1),
        "max_activation": acts.max((0, 1)),
        "histogram": np.zeros((n, BINS), int),
        "value": np.zeros((n, slots), np.float32),
        "sequence": np.zeros((n, slots), int),
        "position": np.zeros((n, slots), int),
        "window": np.zeros((n, slots, before + 1 + after), int),
    }
    for latent in range(n):
        mine = acts[:, :, latent].astype(float)
        largest = mine.max()
        for value in mine[mine > 0]:
            out["histogram"][latent, part(value, largest, BINS)] += 1
        peaks = [(-row.max(), s, int(row.argmax())) for s, row in enumerate(mine) if row.max() > 0]
        groups, seen = {}, set()
        for value, s, p in sorted(peaks):
            window = (*tokens[s, max(0, p - before) : p + after + 1], "peak", min(p, before))
            if window in seen:
                continue
            seen.add(window)
            if len(groups.setdefault("top", [])) < top:
                groups["top"].append((s, p))
            else:
                groups.setdefault(part(-value, largest, intervals), []).append((s, p))
        for group, found in groups.items():
            first = 0
            if group != "top":
                drawn = hashes.priorities(SLOTS["seed"], np.array([latent]), np.arange(len(acts)))
                found = sorted(found, key=lambda e: -int(drawn[e[0]]))[:per_interval]
                first = top + (intervals - 1 - group) * per_interval
            for slot, (s, p) in enumerate(found, first):
                out["value"][latent, slot] = mine[s, p]
                out["sequence"][latent, slot], out["position"][latent, slot] = s, p
                for i in range(max(0, p - before), min(T, p + after + 1)):
                    strength = np.rint(mine[s, i] / largest * FULL)
                    out["window"][latent, slot, i - p + before] = strength
    return out


def activations(sae, store, sites: str) -> np.ndarray:
    x = np.concatenate([store.read(s, slice(0, None)) for s in sites.split(",")], axis=1)
    x, _ = sae.split(x)
    acts = np.array(sae.encode(x) * activation_scale(sae)).reshape(-1, T, N)
    acts[:, 0] = 0
    return acts


@pytest.mark.parametrize(
    "architecture, kind",
    [
        ("topk", "autoencoder"),
        ("relu", "transcoder"),
        pytest.param("jumprelu", "autoencoder", marks=pytest.mark.slow),
        pytest.param("batchtopk", "autoencoder", marks=pytest.mark.slow),
        pytest.param("gated", "autoencoder", marks=pytest.mark.slow),
        pytest.param("topk", "crosscoder", marks=pytest.mark.slow),
    ],
)
def test_equals_brute_force(store, tmp_path, architecture, kind):
    sites, widths = KINDS[kind]
    sae = planted.sae(architecture, kind, widths)
    found = collect(sae, rows(store, sites), tmp_path / "out", **SLOTS)
    tokens = store.read_tokens(slice(None))
    acts = activations(sae, store, sites)
    assert (acts > 0).any((0, 1)).sum() > N / 2
    want = brute_force(acts, tokens, len(tokens) * (T - 1))
    got = arrays(found)
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array.astype(got[name].dtype), err_msg=name)
    assert (want["value"] > 0).sum(axis=1).max() == 4 + 5 * 3
    assert found.about.rows == len(tokens) * (T - 1)
    check_coactive(found, acts)


def check_coactive(found, acts):
    """The index is exact where the sketches hold all rows, and near it elsewhere; the most similar
    latents are there."""
    fires = (acts > 0).reshape(-1, N).astype(int)
    both = fires.T @ fires
    count = fires.sum(axis=0)
    index = both / np.maximum(count[:, None] + count - both, 1)
    np.fill_diagonal(index, 0)
    for latent in range(N):
        got = found.coactive(latent)
        for other, estimated in got:
            exact = index[latent, other]
            if max(count[latent], count[other]) <= coactive.SKETCH:
                assert estimated == np.float32(exact)
            assert abs(estimated - exact) < 4 * np.sqrt(1 / coactive.SKETCH) * 0.5
        assert [i for _, i in got] == sorted((i for _, i in got), reverse=True)
        if index[latent].max() > 0.6:
            assert index[latent].argmax() in [i for i, _ in got]


@pytest.fixture(scope="module", params=["topk", pytest.param("relu", marks=pytest.mark.slow)])
def whole(request, store, tmp_path_factory):
    """An SAE, and what is collected at once on one device."""
    sae = planted.sae(request.param)
    return sae, collect(sae, rows(store), tmp_path_factory.mktemp("whole") / "out", **SLOTS)


def test_the_same_on_every_mesh_at_any_batch(store, whole, tmp_path, mesh, monkeypatch):
    sae, expected = whole
    monkeypatch.setattr("sae_jax.interpret.events._ROWS", 48)
    monkeypatch.setattr("sae_jax.interpret.events._ROOM", 1)
    monkeypatch.setattr("sae_jax.interpret.passes._PIECE", 700)
    monkeypatch.setattr("sae_jax.interpret.passes.BLOCK_EVENTS", 900)
    monkeypatch.setattr("sae_jax.interpret.passes.BLOCK_LATENTS", 3)
    monkeypatch.setattr("sae_jax.interpret.coactive._PAIRS", 100)
    parts = collect(sae, rows(store), tmp_path / "parts", mesh=mesh, **SLOTS)
    assert contents(parts.path) == contents(expected.path)


def test_the_best_of_many_pairs_are_compared(store, tmp_path, monkeypatch):
    monkeypatch.setattr("sae_jax.interpret.coactive._CANDIDATES", 20)
    sae = planted.sae("topk")
    found = collect(sae, rows(store), tmp_path / "out", **SLOTS)
    check_coactive(found, activations(sae, store, "a"))


def test_samples_are_uniform_over_seeds():
    """How often each of 40 sequences is among the 5 with the highest priorities: what is drawn
    without replacement varies less, by the second factor."""
    seeds, n, m = 2000, 40, 5
    for latent in (0, 70_001):
        drawn = hashes.priorities(np.arange(seeds)[:, None], np.array([latent]), np.arange(n))
        taken = np.argsort(drawn, axis=1)[:, -m:]
        counts = np.bincount(taken.reshape(-1), minlength=n)
        expected = seeds * m / n
        chi2 = ((counts - expected) ** 2 / expected).sum() * (n - 1) / (n - m)
        assert 1e-3 < scipy.stats.chi2.sf(chi2, n - 1) < 1 - 1e-3


def test_hashes_of_rows_are_all_different():
    assert len(np.unique(hashes.row_hashes(np.arange(2**18)))) == 2**18


def test_windows_are_told_apart_by_tokens_and_peak():
    tokens = np.array([[1, 2, 3, 1, 2, 3, 1], [9, 9, 3, 1, 2, 3, 9]])
    found = hashes.WindowHashes(tokens, 1, 2)(
        np.array([0, 0, 1, 1, 0, 0]), np.array([1, 4, 1, 4, 0, 3])
    )
    same = found[:, None] == found
    windows = [(1, 2, 3, 1), (1, 2, 3, 1), (9, 9, 3, 1), (1, 2, 3, 9), (1, 2, 3), (3, 1, 2, 3)]
    np.testing.assert_array_equal(same, [[a == b for b in windows] for a in windows])


@pytest.mark.parametrize("width", [3, 64])
def test_positive_entries(width):
    values = np.random.default_rng(0).normal(size=(9, width)).astype(np.float32)
    want = [np.argwhere(values > 0)[:, 0], np.argwhere(values > 0)[:, 1], values[values > 0]]
    total, *found = jax.jit(positive_entries, static_argnums=1)(values, 9 * width)
    assert int(total) == (values > 0).sum()
    found = [np.asarray(a)[: int(total)] for a in found]
    order = np.lexsort(found[1::-1])
    for got, array in zip(found, want, strict=True):
        np.testing.assert_array_equal(got[order], array)


def test_some_of_the_sequences(store, tmp_path):
    """Held-out ones, spread evenly, with the numbers that they have in the store."""
    sae = planted.sae("topk")
    source = rows(store, holdout_fraction=0.4)
    found = collect(sae, source, tmp_path / "out", tokens=20 * T, **SLOTS)
    numbers = np.load(found.path / "numbers.npy")
    assert len(numbers) == 20 and set(numbers) <= set(source.texts().numbers)
    np.testing.assert_array_equal(np.load(found.path / "tokens.npy"), store.read_tokens(numbers))
    acts = activations(sae, store, "a")[numbers]
    np.testing.assert_array_equal(found.max_activation, acts.max((0, 1)))
    best = found.examples(6)[0][0]
    assert acts[list(numbers).index(best.sequence), best.peak, 6] == acts[:, :, 6].max()


def test_what_it_costs_is_what_was_said(store, tmp_path):
    sae = planted.sae("topk")
    slots = {name: value for name, value in SLOTS.items() if name != "seed"}
    cost = describe_cost(sae, rows(store), **slots)
    assert cost.flops == 2 * 8 * N * 300 * T and cost.events == 12 * 5
    found = collect(sae, rows(store), tmp_path / "out", **SLOTS)
    disk = sum(len(data) for data in contents(found.path).values())
    assert disk == pytest.approx(cost.disk, abs=5000)  # headers and collection.json


def test_latents_that_never_fire(store, tmp_path):
    sae = planted.sae("topk")
    dead = {"b_enc": np.full(N, -1e6, np.float32)}
    sae = type(sae).from_parameters(sae.config, sae.parameters() | dead)
    found = collect(sae, rows(store), tmp_path / "out", **SLOTS)
    assert not found.density.any() and not found.histogram.any()
    assert found.examples(0) == [[]] * 6 and found.coactive(0) == []


def test_what_is_refused(store, tmp_path):
    sae = planted.sae("topk")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").touch()
    with pytest.raises(UserError, match="not empty"):
        collect(sae, rows(store), tmp_path / "there")
    bare = write_store(tmp_path / "bare", np.ones((40, 8), np.float32))
    with pytest.raises(UserError, match="no tokens"):
        collect(sae, rows(bare, ""), tmp_path / "out")
    with pytest.raises(UserError, match="do not divide"):
        mesh = jax.make_mesh((1, 1, 3), ("run", "data", "model"), devices=jax.devices()[:3])
        collect(sae, rows(store), tmp_path / "out", mesh=mesh)
    with pytest.raises(UserError, match="other settings"):
        collect(sae, rows(store), tmp_path / "out", top=3)
    with (tmp_path / "tmp.out" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is at work"):
            collect(sae, rows(store), tmp_path / "out")


@pytest.mark.slow
def test_live_stores_and_a_model_on_text_give_what_a_store_gives(tmp_path):
    world.make_model(tmp_path / "model")
    options = {"sites": ("mlp_act.0",), "context_length": 16, "dtype": "float32"}
    for name, live in (("disk", False), ("live", True)):
        lm.harvest(tmp_path / "model", world.TEXTS * 40, tmp_path / name, live=live, **options)
    disk, live = lm.open_store(tmp_path / "disk"), lm.open_store(tmp_path / "live")
    model = lm.open_model(tmp_path / "model")
    special = disk.meta.excluded_tokens
    sae = planted.sae("topk", widths=(disk.meta.sites["mlp_act.0"].width,))
    texts = ModelRows(model, "mlp_act.0", disk.read_tokens(slice(None)), what="the same tokens",
                      excluded_tokens=special)  # fmt: skip
    found = {
        name: collect(sae, source, tmp_path / f"of_{name}", **SLOTS)
        for name, source in (("disk", rows(disk, "")), ("live", rows(live, "")), ("text", texts))
    }
    want = arrays(found["disk"])
    assert want["density"].any()
    for name in ("live", "text"):
        got = arrays(found[name])
        for array in want:
            np.testing.assert_allclose(
                got[array], want[array], rtol=1e-4, err_msg=f"{name} {array}"
            )


@pytest.mark.slow
def test_killed_and_on_eight_devices_and_by_two_processes(tmp_path):
    """All of these end with the files of a pass that nothing happened to."""
    store = planted.store(tmp_path / "store", 8_000)
    script = pathlib.Path(__file__).with_name("collecting.py")
    program = [sys.executable, str(script), str(store.path)]

    def begin(name, *numbers):
        return launch([*program, str(tmp_path / name), *map(str, numbers)])

    killed = begin("killed", 1, 1, 1)
    wait_until(lambda: len(list(tmp_path.glob("tmp.killed/events/*.npy"))) > 1, killed)
    killed.kill()
    assert finish_all([killed])[0][0] == -signal.SIGKILL
    left = {p: p.stat().st_mtime_ns for p in tmp_path.glob("tmp.killed/events/*.npy")}
    assert 1 < len(left) < 8 and not (tmp_path / "killed").exists()
    again = begin("killed", 8, 2, 4)
    wait_until(lambda: any(tmp_path.glob("tmp.killed/blocks/*.npz")), again)
    assert {p: p.stat().st_mtime_ns for p in left} == left
    address = together(2)[0][0].partition("=")[2]
    ends = finish_all([again, *(begin("two", 1, 1, 1, address, 2, i) for i in range(2))])
    assert [code for code, _, _ in ends] == [0, 0, 0], ends
    collect(planted.sae("topk"), rows(store), tmp_path / "whole", **SLOTS)
    want = contents(tmp_path / "whole")
    for name in ("killed", "two"):
        assert contents(tmp_path / name) == want, name
        assert not (tmp_path / f"tmp.{name}").exists()
