"""Goes from text to a page about an SAE, in minutes and with no download: `sae-jax demo`."""

import pathlib
import sys

from absl import flags

from sae_jax.cli import opened_saes

SUMMARY = """From text to a page about a sparse autoencoder, in minutes, with no download.

Harvests what the MLP of the one-layer transformer that ships here computes over the sources of
Python's standard library, trains a TopK SAE on it, evaluates the SAE alone and inside its model,
and writes one HTML page with what it found. Stopped and started again, it goes on where it was.
"""

SITE = "mlp_act.0"  # what Towards Monosemanticity decomposes
MORE_SITES = ("mlp_in.0", "mlp_out.0", "resid_pre.0", "resid_mid.0", "resid_post.0")
K = 32  # latents a token
LEARNING_RATE = 3e-3  # above the architecture's own, which is for runs a hundred times as long
LM_TOKENS = 32_768  # for the evaluation inside the model
EXAMPLE_TOKENS = 400_000  # among which the page looks for texts


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sae-jax demo`."""
    flags.DEFINE_string("out", "sae_demo", "Directory of all results.", flag_values=values)

    def integer(name, default, text, most):
        flags.DEFINE_integer(
            name, default, text, lower_bound=1, upper_bound=most, flag_values=values
        )

    integer("tokens", 600_000, "Tokens of text to harvest.", 10**9)
    integer("d_sae", 2048, "Latents.", 2**20)
    integer("epochs", 3, "Passes over the activations.", 1000)


def run(args, overrides) -> int:
    """Runs the demo, and returns the exit code."""
    del overrides
    from sae_jax import lm, paths
    from sae_jax.errors import UserError
    from sae_jax.sae import TopKConfig
    from sae_jax.train import preemption

    if not args.out:
        raise UserError("--out is empty; it is the directory of all results")
    TopKConfig(d_sae=args.d_sae, k=K)  # refuses what does not go together, before the harvest

    try:
        demo(
            paths.local(args.out),
            model_directory=lm.DEMO_MODEL,
            texts=lm.standard_library(),
            site=SITE,
            more_sites=MORE_SITES,  # what the recipes of experiments/ train on with `:tiny`
            tokens=args.tokens,
            d_sae=args.d_sae,
            epochs=args.epochs,
        )
    except preemption.PreemptedError as stopped:
        print(f"sae-jax demo: {stopped}; start it again to go on", file=sys.stderr)
        return preemption.EXIT_CODE
    return 0


def demo(
    out: pathlib.Path,
    *,
    model_directory,
    texts,
    site: str,
    more_sites: tuple[str, ...] = (),
    tokens: int,
    d_sae: int,
    epochs: int,
    k: int = K,
    batch_size: int = 2048,
) -> pathlib.Path:
    """Harvests, trains, evaluates and writes a page into `out`, and returns the page's path.

    Steps whose results are there already are skipped. Raises UserError if `out` holds a demo with
    other settings.

    Args:
      out: the directory of all results.
      model_directory: the language model, as `lm.open_model` takes it.
      texts: the sources of text, as `lm.read_texts` takes them.
      site: the site whose activations the SAE is trained on.
      more_sites: sites that are harvested too.
      tokens: how many tokens of text to harvest.
      d_sae: the number of latents.
      epochs: how many times the activations are trained on.
      k: the latents for each token.
      batch_size: tokens in a batch.
    """
    from sae_jax import interop, interpret, lm
    from sae_jax.evaluate import figures, report
    from sae_jax.evaluate.sources import HeldOutRows
    from sae_jax.train.run import train_run

    run_directory, page = out / "run", out / "index.html"
    evaluation_file, metrics_file = run_directory / "eval.json", run_directory / "metrics.jsonl"

    _say(1, f"harvesting {site} of the model over {tokens:,} tokens")
    sites = (site, *more_sites)
    store = lm.harvest(
        model_directory, lm.read_texts(texts), out / "store", sites=sites, tokens=tokens
    )
    _say(2, f"training {d_sae:,} latents")
    config = training_config(store, out / "store", site, d_sae, epochs, k, batch_size)
    train_run(config, run_directory)

    sae = interop.load(run_directory)
    model = lm.open_model(model_directory)
    if not evaluation_file.is_file():
        _say(3, "evaluating, alone and inside the model")
        source = HeldOutRows(
            store, site, tokens=tokens, holdout_fraction=config.data.holdout_fraction
        )
        settings = {
            "sae": str(run_directory),
            "model": str(model_directory),
            **opened_saes.latest(run_directory)[1],
        }
        evaluation = report.evaluate(sae, source, model, LM_TOKENS, settings)
        figures.save_all(evaluation, evaluation_file, metrics_file)
        report.save(evaluation, evaluation_file)
    evaluation = report.load(evaluation_file)
    if not page.is_file():
        _say(4, "writing the page")
        interpret.write_page(
            page,
            sae,
            evaluation,
            store,
            model.tokenizer,
            model,
            metrics_file=metrics_file,
            tokens=EXAMPLE_TOKENS,
            title="What a one-layer transformer knows about Python",
        )
    print(evaluation.table())
    print(_farewell(out, page))
    return page


def training_config(store, path, site: str, d_sae: int, epochs: int, k: int, batch_size: int):
    """Returns the config of a TopK run over all the training rows of a site, `epochs` times.

    Args:
      store: the store.
      path: the store's path, for the config.
      site: a site of the store.
      d_sae: the number of latents.
      epochs: the passes over the rows.
      k: the latents for each token.
      batch_size: rows in a batch.
    """
    from sae_jax.activations import Stream
    from sae_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig
    from sae_jax.sae import TopKConfig

    data = DataConfig(store=str(path), site=site, batch_size=batch_size, epochs=epochs)
    stream = Stream(
        store, site, batch_size=batch_size, epochs=epochs, holdout_fraction=data.holdout_fraction
    )
    tokens = stream.num_steps * batch_size
    return Config(
        sae=TopKConfig(d_sae=d_sae, k=k),
        data=data,
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),
        train=TrainConfig(tokens=tokens, log_every=10, checkpoint_every=200),
    )


def _say(step: int, what: str) -> None:
    print(f"[{step}/4] {what}", flush=True)


def _farewell(out: pathlib.Path, page: pathlib.Path) -> str:
    return f"""
Open {page.absolute()}
Numbers and figures: {out / "run"}/eval.json, eval_*.png

Next:
  sae-jax dashboard --run={out / "run"} --serve
  sae-jax harvest --model=YOUR_MODEL --text=YOUR_TEXT --sites=resid_post.6 --out=stores/mine
  sae-jax train --workdir=runs/mine --config.data.store=stores/mine --config.sae.d_sae=16384
  sae-jax eval --run=runs/mine --model=YOUR_MODEL"""
