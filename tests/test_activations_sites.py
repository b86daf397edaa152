"""Several sites of one store: the stream gives their columns side by side, in the order of one."""

import ml_dtypes
import numpy as np
import pytest

from sae_jax.activations import Store, Stream, write_store
from sae_jax.activations.meta import SiteMeta
from sae_jax.errors import UserError

ROWS, CONTEXT, BATCH = 8000, 4, 64
WIDTHS = {"a": 3, "b": 5, "c": 2}


def values():
    rng = np.random.default_rng(0)
    rows = {name: rng.normal(size=(ROWS, width)) for name, width in WIDTHS.items()}
    return {name: x.astype(ml_dtypes.bfloat16) for name, x in rows.items()}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("sites") / "s"
    return write_store(path, values(), dtype="bfloat16", context_length=CONTEXT)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A store whose site c is float32, the others bfloat16; our writers make no such store."""
    path = tmp_path_factory.mktemp("mixed") / "s"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sae_jax.activations.writer.SiteMeta",
            lambda width, dtype: SiteMeta(width, "float32" if width == WIDTHS["c"] else dtype),
        )
        return write_store(path, values(), dtype="bfloat16", context_length=CONTEXT)


def make_stream(store, sites, **changes):
    options = {"batch_size": BATCH, "virtual_shards": 8, "window_rows": 2000, "seed": 3}
    return Stream(store, sites, **options | changes)


@pytest.mark.parametrize("kind", ["store", "mixed"])
@pytest.mark.parametrize("sites", [("a",), ("a", "b"), ("c", "a"), ("b", "c", "a")], ids=",".join)
def test_columns_are_those_of_each_site_alone(kind, sites, request):
    store = request.getfixturevalue(kind)
    stream = make_stream(store, ",".join(sites))
    alone = [make_stream(store, site) for site in sites]
    columns = [slice(10, 20), slice(40, 64)]  # of two processes, or of one with two devices
    parts = [s.batches(rows=columns) for s in alone]
    dtypes = {store.site(site).dtype.numpy_dtype for site in sites}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.float32
    for step, batch in enumerate(stream.batches(rows=columns)):
        want = np.concatenate([next(part).astype(dtype) for part in parts], axis=1)
        assert batch.dtype == dtype
        np.testing.assert_array_equal(batch, want)
        if step % 40 == 0:
            whole = stream.read(step)
            assert whole.dtype == dtype
            np.testing.assert_array_equal(np.concatenate([whole[c] for c in columns]), batch)
    assert step == stream.num_steps - 1 > 90
    assert stream.site_names == sites
    assert stream.site_widths == tuple(WIDTHS[site] for site in sites)
    assert stream.width == sum(stream.site_widths) == len(stream.mean)
    for name in ("mean", "site_mean_squared_norms"):
        np.testing.assert_array_equal(
            getattr(stream, name), np.concatenate([getattr(s, name) for s in alone])
        )


def test_the_only_site_needs_no_name_and_names_may_be_a_sequence(store, tmp_path):
    x = values()
    only = write_store(tmp_path / "s", {"a": x["a"]}, dtype="bfloat16", context_length=CONTEXT)
    assert make_stream(only, "").site_names == ("a",)
    one, two = make_stream(store, ("c", "a")), make_stream(store, "c, a")
    np.testing.assert_array_equal(one.read(3), two.read(3))


def test_rows_by_number_in_any_order(store):
    stream = make_stream(store, "b,a")
    x = values()
    joined = np.concatenate([x["b"], x["a"]], axis=1)
    for ids in (np.array([ROWS - 1, 0, 17, 17, 3]), stream.batch_rows(5), np.array([], np.int64)):
        np.testing.assert_array_equal(stream.read_rows(ids), joined[ids])


def test_rows_that_are_not_finite_at_any_site_are_named_or_dropped(tmp_path):
    x = {name: rows.astype(np.float32) for name, rows in values().items()}
    x["b"][::50, 1] = np.nan
    store = write_store(tmp_path / "s", x, context_length=CONTEXT)
    with pytest.raises(UserError, match=r"160 rows of site b in .* data.drop_nonfinite=true"):
        make_stream(store, "a,b")
    stream = make_stream(store, "a,b", drop_nonfinite=True)
    assert all(np.isfinite(batch).all() for batch in stream.batches())


@pytest.mark.parametrize(
    "sites, message",
    [
        ("a,mlp", "the site of .* is 'mlp'; it must be one of: a, b, c"),
        ("a,b,a", "site a of .* is named twice in a,b,a"),
        ("a,", "has several sites, choose one: a, b, c"),
        ("", "has several sites, choose one: a, b, c"),
    ],
)
def test_mistakes_are_named(store, sites, message):
    with pytest.raises(UserError, match=message):
        make_stream(Store.open(store.path), sites)
