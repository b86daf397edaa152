"""Finds the latents that make a language model say what it says: `sae-jax attribute`."""

from absl import flags

from sae_jax.cli import opened_saes, opened_sources
from sae_jax.errors import UserError

SUMMARY = """Find the latents that make a language model say what it says.

  sae-jax attribute --run=runs/a --model=DIR --prompt="The capital of France is" --target=" Paris"

prints the latents, at which token of the prompt, that raise (above 0) or lower the logit of
" Paris" most, less the mean of all logits. Against one other answer, the logit difference:

  sae-jax attribute --run=runs/a --prompt="The capital of France is" --target=" Paris" \\
    --baseline=" Rome" --out=paris

--loss attributes the mean cross-entropy of the prompt's own tokens instead; there a latent below 0
helped. Targets and baselines are what comes after the prompt, their spaces count, and each has to
be one token; the error says how the tokenizer cuts one that is not.

An attribution is the latent's activation times the gradient of the target along its decoder row,
from one backward pass for all latents at all positions (Templeton et al. 2024, "Scaling
Monosemanticity"). It is what taking the latent out would cost if the rest of the model were linear.
Beside it stands the ablation, which is exact: the target, less the target when this one latent is
taken out at this one position. The largest by activation are seldom the largest by either. Where
the two columns differ much, believe the second, and try

  --method=integrated   the gradient averaged over --steps from latents off to latents on
  --method=ablation     as many latents as --ablations says, in the order of their ablations

Several layers are compared by giving --run (or --sae) again; then the table tells which SAE a
latent is of, and a latent of an early layer that acts through one of a late layer stands beside it:

  sae-jax attribute --run=runs/layer3 --run=runs/layer6 --prompt=... --target=...

Any SAE that sae_jax reads, an autoencoder or a transcoder, which is taken out at its target site:

  sae-jax attribute --sae=hf://ORG/REPOSITORY/FOLDER --model=DIR --site=resid_post.6 --prompt=...

Latents at BOS and other special tokens do not count, since SAEs are seldom trained there, unless
you give --include_excluded. --labels=labels.csv (latent,label) says what latents are called.
--out=DIR gets attribution.json and attribution.csv (as many latents as --ablations says) and
index.html, a page with the prompt shaded, the table, and attribution against ablation.
"""


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sae-jax attribute`."""

    def string(name, text):
        flags.DEFINE_string(name, None, text, flag_values=values)

    def strings(name, text):
        flags.DEFINE_multi_string(name, [], text, flag_values=values)

    def count(name, default, text):
        flags.DEFINE_integer(name, default, text, lower_bound=1, flag_values=values)

    strings("run", "Directory of a run; again for another.")
    strings("sae", "Any SAE instead: what sae_jax.load reads; again for another.")
    string("kind", "Of Gemma Scope files, which do not say it: autoencoder or transcoder.")
    strings("site", "The site that each --sae reads; what its file says, or the run's.")
    strings("target_site", "The site that each transcoder writes; the run's.")
    opened_sources.define_model(values)
    string("prompt", "The text. BOS comes before it.")
    string("target", 'The token after the prompt, such as " Paris".')
    string("baseline", "Another token, whose logit is taken off; the mean of all.")
    flags.DEFINE_bool("loss", False, "The loss of the prompt's own tokens.", flag_values=values)
    flags.DEFINE_enum(
        "method", "gradient", ["gradient", "integrated", "ablation"], "See above.",
        flag_values=values,
    )  # fmt: skip
    count("steps", 10, "Of --method=integrated.")
    count("ablations", 100, "How many latents at positions to take out one by one.")
    count("top", 20, "How many to show.")
    flags.DEFINE_bool(
        "include_excluded", False, "Latents at BOS and other special tokens count too.",
        flag_values=values,
    )  # fmt: skip
    strings("labels", "A .csv or .json of what latents are called; again for each SAE.")
    string("out", "Directory for attribution.json, attribution.csv and index.html.")


def run(args, overrides) -> int:
    """Attributes what the flags name, and returns the exit code."""
    del overrides
    import numpy as np

    from sae_jax.interpret import attribution_report

    _check(args)
    placed, model, labels, origins = _opened(args)
    tokenizer = model.tokenizer
    ids = np.array([tokenizer.bos, *tokenizer.encode(args.prompt)])
    target, said = _target(args, tokenizer)
    settings = {
        "saes": origins,
        "model": model.spec,
        "model_dtype": args.model_dtype,
        "prompt": args.prompt,
        "target": said,
        "method": args.method,
        "steps": args.steps,
        "include_excluded": args.include_excluded,
    }
    if args.out:  # so that it is refused before the work
        attribution_report.check_out(args.out, settings)
    special = np.isin(ids, tokenizer.marks)
    made = attribution_report.report(
        model,
        placed,
        ids,
        target,
        settings,
        method=args.method,
        steps=args.steps,
        ablations=max(args.ablations, args.top),
        positions=None if args.include_excluded else ~special,
        labels=labels,
    )
    print(f"{said}: {made.value:.4g}")
    print(made.table(args.top))
    print("\n".join(made.notes()))
    if args.out is None:
        print("Nothing was written; --out=DIR keeps it, with a page.")
        return 0
    files = attribution_report.save(made, args.out, args.top)
    print(f"Written: {', '.join(map(str, files))}")
    return 0


def _check(args) -> None:
    """Raises UserError for flags that do not go together, before anything is opened."""
    if bool(args.run) == bool(args.sae):
        raise UserError("give --run=RUN or --sae=PATH; one of them again for another layer")
    if not args.prompt:
        raise UserError('which text? give --prompt="The capital of France is"')
    if args.loss and args.target is not None:
        raise UserError("give either --target or --loss")
    if args["steps"].present and args.method != "integrated":
        raise UserError("--steps are those of --method=integrated; give that too")
    if not args.loss and args.target is None:
        raise UserError(
            'attribute what? give --target=" TOKEN", the token after the prompt, or --loss for the '
            "loss of the prompt"
        )
    if args.baseline is not None and args.target is None:
        raise UserError("--baseline is what a target's logit is compared with; a loss has none")
    count = len(args.run or args.sae)
    for name in ("site", "target_site", "labels"):
        given = len(getattr(args, name))
        if given not in (0, count):
            raise UserError(
                f"--{name} is given {given} times for {count} SAEs; give one for each, in their "
                "order"
            )


def _opened(args) -> tuple:
    """Returns the SAEs at their sites, their model, what the latents of each are called, and where
    each is from."""
    import dataclasses
    import functools

    from sae_jax import lm, paths
    from sae_jax.activations import is_world
    from sae_jax.interpret import dashboard
    from sae_jax.interpret.placed import Placed

    open_model = functools.cache(lm.open_model)
    placed, models, labels, origins = [], [], [], []
    for n, named in enumerate(args.run or args.sae):
        sites = {"site": args.site, "target_site": args.target_site}
        chosen = {name: values[n] for name, values in sites.items() if values}
        run, sae = (named, None) if args.run else (None, named)
        opened = opened_saes.open_sae(run, sae, args.kind, chosen)
        data = opened.data
        if data.store and is_world(data.store):
            raise UserError(f"{data.store} is a synthetic world, which no language model goes with")
        # A model that is named needs no store, which may be elsewhere.
        if args.model and data.store and not paths.path(data.store).exists():
            data = dataclasses.replace(data, store="")
        _, model, _ = opened_sources.open_store_and_model(args, data, open_model)
        if model is None:
            raise UserError("which language model? give its directory: --model=DIR")
        if not data.site:
            raise UserError(f"where does {named} belong? give --site, such as --site=resid_post.2")
        models.append(model)
        name = named if len(args.run or args.sae) > 1 else data.site
        placed.append(Placed(opened.sae, data.site, data.target_site or None, name))
        where = {"site": data.site, "target_site": data.target_site or None}
        origins.append({"sae": opened.name, **opened.about, **where})
        if args.labels:
            labels.append(dashboard.read_labels(args.labels[n], opened.sae.config.d_sae).names)
    if len({model.spec for model in models}) > 1:
        raise UserError(
            "the SAEs are of different models: " + ", ".join(model.spec for model in models)
        )
    return placed, models[0], labels, origins


def _target(args, tokenizer) -> tuple:
    """Returns the target, and what it is in words."""
    from sae_jax.interpret.attribution import Target

    if args.loss:
        return Target(), "loss of the prompt, nats a token"
    token = _next_token(tokenizer, args.prompt, args.target, "--target")
    if args.baseline is None:
        return Target(token), f"logit of {args.target!r} less the mean of all"
    other = _next_token(tokenizer, args.prompt, args.baseline, "--baseline")
    if other == token:
        raise UserError(f"--target and --baseline are the same token, {args.target!r}")
    return Target(token, other), f"logit of {args.target!r} less that of {args.baseline!r}"


def _next_token(tokenizer, prompt: str, text: str, flag: str) -> int:
    """Returns the one token by which `text` goes on from the prompt.

    Raises UserError if there are several, or if the tokens of the prompt are not the same with it.
    """
    before, after = tokenizer.encode(prompt), tokenizer.encode(prompt + text)
    if after[: len(before)] != before:
        raise UserError(
            f"{flag}={text!r} changes how the end of the prompt is cut into tokens; move spaces "
            "from the end of the prompt to the start of the target"
        )
    tokens = after[len(before) :]
    if len(tokens) != 1:
        names = ", ".join(repr(tokenizer.decode([token])) for token in tokens)
        hint = f"give the first, or a word that is one: {names}" if tokens else "give a token"
        raise UserError(f"{flag}={text!r} is {len(tokens)} tokens after the prompt; {hint}")
    return tokens[0]
