from absl import flags

SUMMARY = """Write a trained SAE in the format of another framework.

  sae-jax export --checkpoint=runs/a --format=saelens --out=exports/a
  sae-jax export --checkpoint=runs/a/checkpoints/5000 --format=sparsify --out=exports/b

The export is the same function of activations in the model's own units: the normalisation, and
where the architecture allows it the norms of the decoder's rows, are folded in. What a format
cannot express exactly is refused, with the formats that can:

  format               autoencoder          transcoder           skip_transcoder
  saelens              all                  all but topk, gated  all but topk, gated
  dictionary_learning  all                  -                    -
  sparsify             topk                 topk                 topk
  gemma_scope          all but topk, gated  all but topk, gated  -
  gemma_scope_2        all but topk, gated  all but topk, gated  all but topk, gated
  openai               relu, relu_l1_unit   -                    -
  sae_jax              all                  all                  all

Crosscoders go into sae_jax only: a folder of safetensors and JSON, read by `sae_jax.load` like all
the others. dictionary_learning and openai need PyTorch: pip install "sae-jax[torch]".
"""


def define(values: flags.FlagValues) -> None:
    def string(name, text):
        flags.DEFINE_string(name, None, text, flag_values=values)

    string("checkpoint", "A run, RUN/checkpoints/STEP, or any SAE that sae_jax.load reads.")
    string("format", "One of the table.")
    string("out", "A new directory.")


def run(args: flags.FlagValues, overrides: dict[str, str]) -> None:
    del overrides
    from sae_jax import interop, paths
    from sae_jax.config import UserError

    for name in ("checkpoint", "format", "out"):
        if not getattr(args, name):
            raise UserError(f"--{name} is needed; see sae-jax export --help")
    out = paths.local(args.out)
    sae = interop.load(args.checkpoint)
    interop.export(sae, args.format, out, interop.origin(args.checkpoint))
    print(f"Written: {out}")
