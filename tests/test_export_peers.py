"""Our SAEs inside SAELens' world: its evaluation gives our figures, and SAEBench and SAEDashboard,
where they are installed, run on what we export. A real model, real text, no network.

Those two are in no extra: they pin numpy < 2, datasets < 4 and transformers < 4.57. By hand:

    pip install --target=PEERS --no-deps sae-bench sae-dashboard collectibles sae-probes seaborn \\
        tabulate dataclasses-json marshmallow typing-inspect mypy-extensions typer eindex-callum \\
        decode-clt openai xgboost
    PYTHONPATH=PEERS pytest -m "peers and slow" tests/test_export_peers.py
"""

import json
import pathlib

import numpy as np
import pytest

from sae_jax import interop, interpret, lm
from sae_jax.cli import main
from sae_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig
from sae_jax.evaluate.sources import ModelRows
from sae_jax.interpret import neuronpedia
from sae_jax.sae import by_name
from sae_jax.train.run import train_run

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"
MODEL = SHARED / "models" / "stories260K"
TOKENS = SHARED / "saes" / "saelens_6.54.12_topk_stories260K_L2" / "eval_tokens.npz"
SEQUENCES, CONTEXT = 16, 128

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("default"),  # of what the peers import
    pytest.mark.skipif(not TOKENS.is_file(), reason="no shared data: ../shared/data/saes"),
]


@pytest.fixture(scope="module")
def tokens():
    return np.load(TOKENS)["tokens"].reshape(-1, CONTEXT)[:SEQUENCES].astype(np.int64)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    texts = lm.read_texts(SHARED / "text" / "tinystories_1000.json", collapse_newlines=True)
    path = tmp_path_factory.mktemp("export") / "stories"
    lm.harvest(MODEL, texts, path, sites=("resid_post.2",), context_length=CONTEXT, tokens=40_000)
    return path


@pytest.fixture(scope="module")
def exported(store, tmp_path_factory):
    """By architecture: (run, its export to SAELens' format)."""
    made = {}

    def make(architecture):
        if architecture not in made:
            root = tmp_path_factory.mktemp(architecture)
            config = Config(
                sae=by_name(architecture).Config(d_sae=256, k=16),
                data=DataConfig(store=str(store), site="resid_post.2", batch_size=256, epochs=9),
                optimizer=OptimizerConfig(learning_rate=2e-3),
                train=TrainConfig(tokens=256 * 150),
            )
            train_run(config, root / "run")
            arguments = [f"--checkpoint={root / 'run'}", f"--out={root / 'export'}"]
            assert main(["export", "--format=saelens", *arguments]) == 0
            made[architecture] = root / "run", root / "export"
        return made[architecture]

    return make


@pytest.fixture(scope="module")
def hooked():
    """The model as TransformerLens has it, whose names of hooks our exports use."""
    torch = pytest.importorskip("torch")
    sae_lens = pytest.importorskip("sae_lens")
    import transformers
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    theirs = transformers.LlamaForCausalLM.from_pretrained(MODEL, attn_implementation="eager")
    c = theirs.config
    config = HookedTransformerConfig(
        model_name="stories260K", d_model=c.hidden_size, d_head=c.head_dim,
        n_heads=c.num_attention_heads, n_key_value_heads=c.num_key_value_heads,
        n_layers=c.num_hidden_layers, d_mlp=c.intermediate_size, d_vocab=c.vocab_size,
        n_ctx=CONTEXT, act_fn=c.hidden_act, normalization_type="RMS", final_rms=True,
        gated_mlp=True, eps=c.rms_norm_eps, positional_embedding_type="rotary",
        rotary_dim=c.head_dim, rotary_adjacent_pairs=False, rotary_base=10_000, device="cpu",
        dtype=torch.float32,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = sae_lens.HookedSAETransformer(config, tokenizer)
    model.load_state_dict(convert_llama_weights(theirs, config), strict=False)
    return model.eval()


def token_source(model, sae, tokens):
    """The evaluation's tokens as SAELens takes them: a data set that is tokenised already."""
    import datasets
    from sae_lens.training.activations_store import ActivationsStore

    return ActivationsStore.from_sae(
        model, sae, datasets.Dataset.from_dict({"tokens": tokens.tolist()}), streaming=False,
        context_size=CONTEXT, store_batch_size_prompts=len(tokens),
    )  # fmt: skip


def evaluated_by_saelens(sae, model, tokens, excluded) -> dict[str, float]:
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    config = get_eval_everything_config(len(tokens), n_eval_reconstruction_batches=1)
    metrics, _ = run_evals(
        sae, token_source(model, sae, tokens), model, ActivationScaler(), config,
        exclude_special_tokens=excluded,
    )  # fmt: skip
    return {name: value for part in metrics.values() for name, value in part.items()}


def evaluated_by_us(run, tokens, directory, flag, *more):
    np.save(directory / "tokens.npy", tokens)
    out = directory / f"eval{flag}{''.join(more)}.json"
    arguments = [
        f"--run={run}", f"--model={MODEL}", f"--tokens_file={directory / 'tokens.npy'}",
        f"--out={out}",
    ]  # fmt: skip
    assert main(["eval", *arguments, flag, *more]) == 0
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", ["topk", pytest.param("batchtopk", marks=pytest.mark.long)]
)
def test_saelens_evaluates_an_export_as_we_do(exported, hooked, tokens, tmp_path, architecture):
    """Once over every position, once without BOS: an SAE whose normalisation, decoder norms and
    threshold were folded in on export, in the model as TransformerLens computes it."""
    from sae_lens import SAE

    run, export = exported(architecture)
    sae = SAE.load_from_disk(str(export), device="cpu")
    special = list(lm.load_tokenizer(MODEL).special_tokens)
    for excluded, flag in ((False, "--include_excluded"), (special, "--noinclude_excluded")):
        theirs = evaluated_by_saelens(sae, hooked, tokens, excluded)
        ours = in_their_words(evaluated_by_us(run, tokens, tmp_path, flag))
        if excluded:  # SAELens' ablation takes the special tokens too, which it does not count
            for name in ("ce_loss_with_ablation", "ce_loss_score", "kl_div_with_ablation"):
                del ours[name]
        apart = {name: value / theirs[name] - 1 for name, value in ours.items()}
        assert max(map(abs, apart.values())) < 1e-4, apart


@pytest.mark.slow
def test_in_bfloat16_loss_recovered_is_what_it_is_in_float32(exported, hooked, tokens, tmp_path):
    """Of the model: the SAE computes in float32 in any case."""
    from sae_lens import SAE

    run, export = exported("topk")
    sae = SAE.load_from_disk(str(export), device="cpu")
    scores = {"saelens": evaluated_by_saelens(sae, hooked, tokens, False)["ce_loss_score"]}
    for dtype in ("float32", "bfloat16"):
        arguments = (run, tokens, tmp_path, "--include_excluded", f"--model_dtype={dtype}")
        scores[dtype] = in_their_words(evaluated_by_us(*arguments))["ce_loss_score"]
    print(scores)
    assert abs(scores["float32"] / scores["saelens"] - 1) < 1e-4
    assert 0 < abs(scores["bfloat16"] - scores["float32"]) < 3e-3, scores


@pytest.mark.slow
def test_saebench_evaluates_an_export(exported, hooked, tokens, tmp_path):
    """Its core evaluation, which refuses decoders whose rows are not of norm 1. Its mean squared
    error is divided by the number of tokens twice, and its explained variance takes the mean of
    squares for the mean."""
    general_utils = pytest.importorskip("sae_bench.sae_bench_utils.general_utils")
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.evals.core.main import run_evals
    from sae_lens import SAE

    run, export = exported("batchtopk")
    sae = SAE.load_from_disk(str(export), device="cpu")
    _, sae, _ = general_utils.load_and_format_sae("ours", sae, "cpu")
    config = CoreEvalConfig(
        batch_size_prompts=len(tokens), n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1, compute_kl=True, compute_ce_loss=True,
        compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )  # fmt: skip
    metrics, _ = run_evals(sae, token_source(hooked, sae, tokens), hooked, config)
    theirs = {name: value for part in metrics.values() for name, value in part.items()}
    ours = in_their_words(evaluated_by_us(run, tokens, tmp_path, "--include_excluded"))
    del ours["explained_variance"]
    ours["mse"] /= tokens.size
    apart = {name: value / theirs[name] - 1 for name, value in ours.items()}
    assert max(map(abs, apart.values())) < 1e-4, apart


@pytest.mark.slow
def test_saedashboard_builds_its_page_from_an_export(exported, hooked, tokens, tmp_path):
    torch = pytest.importorskip("torch")
    runner = pytest.importorskip("sae_dashboard.sae_vis_runner")
    from sae_dashboard.data_writing_fns import save_feature_centric_vis
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_lens import SAE

    _, export = exported("topk")
    sae = SAE.load_from_disk(str(export), device="cpu")
    config = SaeVisConfig(hook_point=sae.cfg.metadata.hook_name, features=range(4))
    data = runner.SaeVisRunner(config).run(sae, hooked, torch.from_numpy(tokens))
    data.model, data.encoder = hooked, sae
    save_feature_centric_vis(data, tmp_path / "features.html")
    assert sorted(data.feature_data_dict) == list(range(4))
    assert len((tmp_path / "features.html").read_text()) > 10_000


@pytest.mark.slow
def test_saedashboard_says_of_latents_what_we_say(exported, hooked, tokens, tmp_path):
    """Density, strengths, the best example and the aligned neurons of every latent that fires."""
    torch = pytest.importorskip("torch")
    runner = pytest.importorskip("sae_dashboard.sae_vis_runner")
    from sae_dashboard.components_config import (
        ActsHistogramConfig,
        Column,
        FeatureTablesConfig,
        LogitsHistogramConfig,
        LogitsTableConfig,
        SequencesConfig,
    )
    from sae_dashboard.layout import SaeVisLayoutConfig
    from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
    from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_lens import SAE

    run, folder = exported("topk")
    model = lm.open_model(MODEL)
    rows = ModelRows(model, "resid_post.2", tokens, what="tokens")
    sae = interop.load(run / "checkpoints" / "150")
    planted = interpret.collect(
        sae, rows, tmp_path / "collection", top=3, intervals=5, before=CONTEXT, after=CONTEXT
    )
    export = neuronpedia.Export(
        planted, sae, model.tokenizer, "resid_post.2", "stories", "2-res", model=model
    )
    neuronpedia.write_saedashboard(tmp_path / "ours", export, batch=64)
    ours = json.loads((tmp_path / "ours" / "batch-0.json").read_text())["features"]

    parts = (
        SequencesConfig(buffer=None, n_quantiles=5, top_acts_group_size=3, quantile_group_size=5),
        ActsHistogramConfig(), LogitsHistogramConfig(), LogitsTableConfig(),
        FeatureTablesConfig(n_rows=3),
    )  # fmt: skip
    theirs = SAE.load_from_disk(str(folder), device="cpu")
    config = SaeVisConfig(
        hook_point=theirs.cfg.metadata.hook_name, features=range(64),
        feature_centric_layout=SaeVisLayoutConfig(columns=[Column(*parts)]),
    )  # fmt: skip
    data = runner.SaeVisRunner(config).run(theirs, hooked, torch.from_numpy(tokens))
    names = {i: export.token(i) for i in range(hooked.cfg.d_vocab)}
    about = NeuronpediaRunnerConfig("res", "", "", model_id="stories", layer=2)
    made = NeuronpediaConverter.convert_to_np_json(hooked, data, about, names)
    found = json.loads(made)["features"]
    compared = 0
    for mine, other in zip(ours, found, strict=True):
        assert mine.keys() == other.keys() and mine["feature_index"] == other["feature_index"]
        assert mine["frac_nonzero"] == pytest.approx(other["frac_nonzero"], abs=2e-5)
        assert mine["neuron_alignment_indices"] == other["neuron_alignment_indices"]
        for name in ("neuron_alignment_values", "neuron_alignment_l1"):
            np.testing.assert_allclose(mine[name], other[name], atol=1e-3)
        if not mine["activations"]:
            assert other["frac_nonzero"] == 0
            continue
        assert sum(mine["freq_hist_data_bar_heights"]) == sum(other["freq_hist_data_bar_heights"])
        top, best = (found["activations"][0] for found in (mine, other))
        assert top["bin_max"] == pytest.approx(best["bin_max"], abs=2e-3)
        if not top["qualifying_token_index"]:
            continue  # BOS, which is alike in all texts
        compared += 1
        assert top["tokens"][1:] == best["tokens"]  # which leaves out the first
        np.testing.assert_allclose(top["values"][1:], best["values"], atol=2e-3)
        assert top["qualifying_token_index"] == best["qualifying_token_index"] + 1
    assert compared > 16


def in_their_words(found: dict) -> dict[str, float]:
    rows, model = found["reconstruction"] | found["sparsity"], found["language_model"]
    return {
        "explained_variance": rows["explained_variance"],
        "mse": rows["mse"],
        "cossim": rows["cosine_similarity"],
        "l0": rows["l0"],
        "l2_ratio": rows["norm_ratio"],
        "ce_loss_without_sae": model["ce_clean"],
        "ce_loss_with_sae": model["ce_spliced"],
        "ce_loss_with_ablation": model["ce_zero"],
        "ce_loss_score": model["ce_recovered_zero"],
        "kl_div_with_sae": model["kl_spliced"],
        "kl_div_with_ablation": model["kl_zero"],
    }
