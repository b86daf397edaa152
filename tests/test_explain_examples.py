"""Windows of a latent: of one half of the text, one of a sequence, and what they are said to be."""

import numpy as np
import planted
import pytest
from planted import N, T

from sae_jax.evaluate.sources import HeldOutRows
from sae_jax.interpret.activity import record
from sae_jax.interpret.explain.examples import Wanted, draw

WANTED = Wanted(top=3, intervals=4, per_interval=2, random=5, out_of_context=4, before=3, after=2)


@pytest.fixture(scope="module")
def activity(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    source = HeldOutRows(planted.store(folder / "store"), "a", tokens=10**6, holdout_fraction=None)
    return record(planted.sae("relu"), source, folder / "activity")


def test_no_sequence_is_explained_and_tested(activity):
    for latent in range(N):
        halves = [draw(activity, latent, WANTED, held_out=side) for side in (False, True)]
        explained, tested = (
            {example.ids.tobytes() for example in (*half.active, *half.inactive)} for half in halves
        )
        assert not explained & tested


@pytest.mark.parametrize("held_out", [False, True])
def test_windows_are_what_they_are_said_to_be(activity, held_out):
    for latent in range(N):
        dense, drawn = activity.dense(latent), draw(activity, latent, WANTED, held_out=held_out)
        half = activity.held_out == held_out
        row_of = {int(number): row for row, number in enumerate(activity.numbers)}
        peaks = np.sort(dense[half].max(axis=1))[::-1]
        for example in (*drawn.active, *drawn.inactive):
            row = row_of[example.sequence]
            assert half[row]
            assert example.start == max(0, example.peak - 3)
            assert example.stop == min(T, example.peak + 3)
            np.testing.assert_array_equal(
                example.activations, dense[row, example.start : example.stop]
            )
        for example in drawn.active:
            assert (
                example.activations[example.peak - example.start]
                == dense[row_of[example.sequence]].max()
            )
        assert all(not example.activations.any() for example in drawn.inactive)
        texts = [example.sequence for example in drawn.active]
        assert len(texts) == len(set(texts))
        if drawn.top:
            assert drawn.top[0].activations.max() == peaks[0]
        tokens = {int(example.ids[example.peak]) for example in drawn.top}
        if len(drawn.top) == 3 and peaks[10] == 0:
            assert all(int(e.ids[e.peak]) in tokens for e in drawn.out_of_context)


def test_intervals_hold_their_part_of_the_range(activity):
    for latent in range(N):
        drawn = draw(activity, latent, WANTED, held_out=False)
        maximum = max((e.activations.max() for e in drawn.active), default=0)
        for number, part in enumerate(drawn.intervals):
            for example in part:
                share = example.activations.max() / maximum
                assert (3 - number) / 4 - 1e-6 < share <= (4 - number) / 4 + 1e-6


def test_draws_do_not_depend_on_others_and_change_with_the_seed(activity):
    one = draw(activity, 3, WANTED, held_out=False)
    fewer = draw(activity, 3, Wanted(random=5, before=3, after=2), held_out=False)
    assert [(e.sequence, e.peak) for e in one.random] == [
        (e.sequence, e.peak) for e in fewer.random
    ]
    other = draw(activity, 3, WANTED, held_out=False, seed=1)
    assert [(e.sequence, e.peak) for e in one.random] != [
        (e.sequence, e.peak) for e in other.random
    ]
