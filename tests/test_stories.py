"""The whole way on a real model and real text, against an SAE that SAELens trained."""

import pathlib

import pytest

from sae_jax import interop, lm
from sae_jax.config import load_file
from sae_jax.evaluate.report import evaluate
from sae_jax.evaluate.sources import HeldOutRows
from sae_jax.train.run import train_run

ROOT = pathlib.Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
SAELENS = SHARED / "saes" / "saelens_6.54.12_topk_stories260K_L2"
MODEL = SHARED / "models" / "stories260K"


@pytest.mark.long
@pytest.mark.skipif(not SAELENS.is_dir(), reason="no shared data: ../shared/data/saes")
def test_as_good_as_saelens_after_as_many_tokens(tmp_path):
    """Both on the same held-out stories: our FVU was 0.065 when this was written, theirs 0.145;
    CE recovered against mean ablation 0.970 and 0.913. If ours gets worse than 0.08 or 0.96,
    training or evaluation changed: find out which before touching these numbers."""
    texts = lm.read_texts(SHARED / "text" / "tinystories_1000.json", collapse_newlines=True)
    path = tmp_path / "stories"
    store = lm.harvest(MODEL, texts, path, sites=("resid_post.2",), context_length=128)
    config = load_file(f"{ROOT / 'experiments' / 'stories260k_topk.py'}:{path}")
    train_run(config, tmp_path / "run")
    heldout = HeldOutRows(store, "", tokens=10**6, holdout_fraction=0.05)
    model = lm.open_model(MODEL)
    ours, theirs = (
        evaluate(interop.load(path), heldout, model) for path in (tmp_path / "run", SAELENS)
    )
    assert ours.rows.scalars["l0"] <= 16
    assert ours.rows.scalars["fvu"] < 0.08 < theirs.rows.scalars["fvu"]
    for ablation in ("zero", "mean"):
        name = f"ce_recovered_{ablation}"
        assert ours.spliced[name] > max(0.96, theirs.spliced[name])
