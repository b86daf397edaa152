"""Steers a language model by an SAE's latents: `sae-jax steer`."""

from absl import flags

from sae_jax.cli import counts, opened_saes, opened_sources, path_lists
from sae_jax.errors import UserError

SUMMARY = """Steer a language model by an SAE's latents, and measure what that does.

  sae-jax steer --run=runs/a --model=DIR --latent=7 --prompt="I went to" --out=steered

sets latent 7 to -10 to 10 times its maximum at every position, at every step (Templeton et al.
2024, "Scaling Monosemanticity"); what the SAE misses stays as it is. It prints what the model then
writes beside what it writes untouched, and measures on the run's held-out text how far the model is
from itself: KL(untouched || steered), the rise of the text's cross-entropy, and the log-probability
of the tokens that the latent promotes. A latent is as good for steering as it is at the largest
factor that the model bears: steer.json says at which the cross-entropy has risen by less than 0.5
nats a token. Around 10 times texts change their subject, around 100 they are one word repeated.

Beside it are two directions that need no SAE, as long as what the latent writes: the difference of
the mean activations of texts with and without what you steer to, which often does better, and a
random one, which says what any push of that length does. Without texts of your own the difference
is that of the latent's own examples:

  sae-jax steer --run=runs/a --latent=7 --prompt="I went to" --positive=cats.txt --negative=dogs.txt

What to look for in samples and in the next token is yours to say, as is the latents' number; they
are set together:

  sae-jax steer --run=runs/a --latent=7,12 --factors=0,2,5 --prompts=prompts.txt --samples=16 \\
    --concept="(?i)golden gate" --tokens_of=" Golden, bridge" --out=steered

--mode=add adds to what is there, ablate removes the latent, pin holds it at its maximum. With
--same_norm activations are turned and not made longer. --positions=no_bos leaves out BOS and other
special tokens, prompt and continuation the other part. A transcoder is steered at its target site.
A crosscoder needs all its sites before it writes the first, so the untouched model runs first on
every text, and writes one token for two passes over it.

The maximum is that of RUN/eval.json or of the dashboard's collection where they are, else that on
--text or on the run's held-out text. It grows with the text; steer.json says of how many rows it is
the maximum. Any SAE, on any model:

  sae-jax steer --sae=hf://ORG/REPOSITORY/FOLDER --model=DIR --latent=7 --text=corpus.txt \\
    --prompt="I went to" --chat

--out=DIR gets steer.json, samples.jsonl, samples.md (side by side) and dose_response.png. Stopped
and started again it goes on after the last factor; the same command with more --factors adds them.
"""


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sae-jax steer`."""

    def string(name, default, text):
        flags.DEFINE_string(name, default, text, flag_values=values)

    def boolean(name, default, text):
        flags.DEFINE_bool(name, default, text, flag_values=values)

    def integer(name, default, text, least=1):
        flags.DEFINE_integer(name, default, text, lower_bound=least, flag_values=values)

    string("run", None, "Directory of a run.")
    string("sae", None, "Any SAE instead: what sae_jax.load reads.")
    string("kind", None, "Of a Gemma Scope file, which does not say it: autoencoder or transcoder.")
    string("store", None, "The store whose held-out text is measured on; the run's.")
    string("site", None, "Site of the model; the run's, or what the SAE's file says.")
    string("target_site", None, "The site that a transcoder predicts; the run's.")
    opened_sources.define_model(values)
    flags.DEFINE_list("latent", None, "A latent, or several with commas.", flag_values=values)
    flags.DEFINE_list(
        "factors", None, "Of the maximum, with commas; -10,-5,-2,0,2,5,10.", flag_values=values
    )
    flags.DEFINE_enum(
        "mode", "clamp", ["clamp", "add", "ablate", "pin"], "What is done to the latents.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "positions", "all", ["all", "no_bos", "prompt", "continuation"], "Which are steered.",
        flag_values=values,
    )  # fmt: skip
    boolean("same_norm", False, "Keep the norm of what is steered.")
    boolean("baselines", True, "Steer along a difference of means and a random direction too.")
    path_lists.define("positive", "Texts with what is steered to, for the difference.", values)
    path_lists.define("negative", "Texts without it.", values)
    flags.DEFINE_multi_string(
        "prompt", [], "A text to go on from; again for more.", flag_values=values
    )
    string("prompts", None, "A file of prompts: one a line, or .json or .jsonl as for harvest.")
    boolean("chat", False, "Put prompts into the model's chat template, as a user's.")
    integer("samples", 3, "Texts written after each prompt, at each factor; 0: none.", 0)
    integer("max_new_tokens", 40, "Tokens of each.")
    counts.define_float(
        "temperature", 0.8, "Of samples; 0: always the likeliest token.", values, lower_bound=0.0
    )
    counts.define_float(
        "top_p", 1.0, "Sample from the likeliest tokens of this probability.", values,
        lower_bound=0.0, upper_bound=1.0,
    )  # fmt: skip
    integer("seed", 0, "Of samples and of the random direction.", 0)
    string("concept", None, "A regular expression, whose share of the samples is told.")
    string(
        "tokens_of",
        None,
        "Words with commas, whose (first) tokens are the set of log p(set); a space before a word "
        "counts. By default those that the first latent promotes.",
    )
    path_lists.define("text", "Text files to measure on, instead of the store's.", values)
    string("tokens_file", None, "An .npy or .npz of token ids (sequences, length), instead.")
    integer("context_length", 256, "With --text: tokens of a context.", 2)
    boolean("collapse_newlines", False, "With --text: make one of several newlines.")
    counts.define("tokens", 65_536, "For maxima and means: of about so many tokens.", values)
    counts.define("lm_tokens", 2_048, "For KL and cross-entropy: about so many tokens.", values)
    string("out", None, "Directory of the results; without it they are printed alone.")


def run(args, overrides) -> int:
    """Steers the model that the flags name, and returns the exit code."""
    del overrides
    from sae_jax import paths
    from sae_jax.interpret import steering_report as report

    _check(args)
    out = paths.path(args.out) if args.out else None
    steering, factors, settings = _prepared(args)
    outcomes = report.outcomes_of(steering, factors, settings, out)
    print(_told(settings))
    print(report.table(outcomes))
    for push, factor in report.bearable(outcomes).items():
        where = "no factor above 0" if factor is None else f"factors up to {factor:g}"
        print(f"{push}: cross-entropy rises by less than {report.BEARABLE} at {where}")
    name = steering.pushes[0].name
    if shown := report.side_by_side(outcomes, name):
        print(f"\nThe first sample of each:\n{shown}")
    if out is None:
        print("Nothing was written; --out=DIR keeps it, with all samples and a figure.")
        return 0
    files = report.save(outcomes, settings, out)
    print(f"Written: {', '.join(map(str, files))}")
    return 0


def _check(args) -> None:
    """Raises UserError for flags that do not go together, before anything is opened."""
    import re

    from sae_jax.interpret.pushes import FIXED_FACTORS

    if not args.latent:
        raise UserError("which latent? give --latent=7, or several: --latent=7,12")
    texts = opened_sources.has_own_text(args)
    if not (args.prompt or args.prompts or texts or args.run or args.store):
        raise UserError("nothing to steer: give --prompt=TEXT to go on from, or --text=FILE")
    if args.mode in FIXED_FACTORS and args.factors:
        raise UserError(f"--mode={args.mode} has no factors; leave out --factors")
    if bool(args.positive) != bool(args.negative):
        raise UserError("--positive and --negative belong together; give both")
    if args.positive and not args.baselines:
        raise UserError("--positive and --negative are for the baselines; leave out --nobaselines")
    if args.positions in ("prompt", "continuation"):
        if texts:
            raise UserError(
                f"--positions={args.positions} is of prompts and what follows them; leave out "
                "--text and --tokens_file, and what the untouched model writes is measured on"
            )
        if not (args.prompt or args.prompts):
            raise UserError(f"--positions={args.positions} needs a prompt: give --prompt=TEXT")
    if args.concept is not None:
        try:
            re.compile(args.concept)
        except re.error as error:
            raise UserError(f"--concept={args.concept} is no regular expression: {error}") from None
    if not args.top_p > 0:
        raise UserError("--top_p is 0; it must be above 0, and 1 takes all tokens")


def _prepared(args) -> tuple:
    """Returns (steering, factors, settings), as the flags say."""
    import dataclasses

    from sae_jax.interpret import pushes
    from sae_jax.interpret.maxima import find_maxima
    from sae_jax.interpret.steering import Steering, Writing

    latents = _numbers(args.latent, "--latent", int)
    factors = pushes.FIXED_FACTORS.get(args.mode)
    asked = args.factors or ["-10", "-5", "-2", "0", "2", "5", "10"]
    factors = sorted(set(_numbers(asked, "--factors", float))) if factors is None else [factors]
    opened, model, sites, source = _opened(args)
    sae = opened.sae
    maxima = find_maxima(sae, latents, opened.path if opened.is_run else None, source)
    made = [pushes.latent_push(sae, sites, latents, maxima.values, args.mode)]
    if args.baselines and args.mode != "ablate":
        made += _baselines(args, sae, model, sites, latents, maxima, source)
    prompts = _prompts(args, model)
    special = model.tokenizer.marks
    texts, measured = _texts(args, model, source, prompts, special)
    token_set, words = _token_set(args, sae, model, sites[-1], latents)
    writing = Writing(args.max_new_tokens, args.temperature, args.top_p, args.seed, args.samples)
    steering = Steering(
        model, made, texts, prompts, writing, args.positions, special, args.same_norm, token_set,
        args.concept,
    )  # fmt: skip
    settings = {
        "sae": opened.name,
        **opened.about,
        "model": model.spec,
        "model_dtype": args.model_dtype,
        "sites": list(sites),
        "latents": latents,
        "maxima": maxima.values.tolist(),
        "maxima_of": f"{maxima.rows:,} rows: {maxima.where}",
        "mode": args.mode,
        "positions": args.positions,
        "same_norm": args.same_norm,
        "pushes": [push.name for push in made],
        "positive": args.positive,
        "negative": args.negative,
        "measured_on": measured,
        "token_set": words,
        "concept": args.concept,
        "prompts": [model.tokenizer.decode(prompt) for prompt in prompts],
        "writing": dataclasses.asdict(writing),
    }
    return steering, factors, settings


def _opened(args) -> tuple:
    """Returns the SAE as opened, its model, its sites, and rows to look at or None."""
    import dataclasses

    from sae_jax import lm
    from sae_jax.activations import is_world

    def open_model(name, dtype: str):
        # Layers of ours compile in seconds as a loop, whatever the depth.
        return lm.open_model(name, dtype, scan=not lm.is_torch(name))

    opened = opened_saes.open_sae(args.run, args.sae, args.kind, opened_sources.chosen(args))
    data, has_text = opened.data, opened_sources.has_own_text(args)
    if is_world(data.store):
        raise UserError(f"{data.store} is a synthetic world, which has no language model to steer")
    if args.model and has_text:  # a store is not needed, and may be elsewhere
        data = dataclasses.replace(data, store="")
    store, model, _ = opened_sources.open_store_and_model(args, data, open_model)
    if model is None:
        raise UserError("which language model? give its directory: --model=DIR, or --model=demo")
    if not data.site:
        raise UserError("where does the SAE belong? give --site, such as --site=resid_post.2")
    sites = tuple(",".join(filter(None, (data.site, data.target_site))).split(","))
    source = None
    if store is not None or has_text:
        source = opened_sources.make_source(args, data, store, model)
    return opened, model, sites, source


def _baselines(args, sae, model, sites, latents, maxima, source) -> list:
    """Returns the pushes beside that of the latents, as long as it is."""
    from absl import logging

    from sae_jax import lm
    from sae_jax.interpret import pushes

    length = pushes.written_length(sae, latents, maxima.values)
    found = []
    if args.positive:
        rows = [
            pushes.text_rows(model, sites, list(lm.read_texts(files)), ", ".join(files))
            for files in (args.positive, args.negative)
        ]
        direction = pushes.difference_of_means(sae, *rows)
    else:
        direction = source and pushes.difference_at_examples(sae, source, latents)
    if direction is None:
        logging.warning(
            "no difference of means beside the latent: there is no text on which it is active; "
            "give --positive and --negative, or --text"
        )
    else:
        found.append(pushes.direction_push("difference of means", sae, sites, direction, length))
    at_random = pushes.random_direction(sae.config.d_out, args.seed)
    return [*found, pushes.direction_push("random direction", sae, sites, at_random, length)]


def _prompts(args, model) -> list[list[int]]:
    """Returns the token ids of all prompts."""
    from sae_jax import lm

    texts = list(args.prompt)
    if args.prompts:
        if args.prompts.endswith((".json", ".jsonl", ".ndjson")):
            texts += lm.read_texts(args.prompts)
        else:
            lines = "".join(lm.read_texts(args.prompts)).splitlines()
            texts += [line for line in lines if line.strip()]
    if args.prompts and not texts:
        raise UserError(f"{args.prompts} holds no prompt; write one a line")
    tokenizer = model.tokenizer
    if args.chat:
        texts = [lm.chat_prompt(tokenizer, text) for text in texts]
    prompts = [tokenizer.encode(text) for text in texts]
    return [ids if ids[:1] == [tokenizer.bos] else [tokenizer.bos, *ids] for ids in prompts]


def _texts(args, model, source, prompts, special) -> tuple:
    """Returns the texts to measure on, or None, and what they are in words."""
    from sae_jax.interpret.steering import own_texts, texts_of

    if args.positions in ("prompt", "continuation") or source is None:
        what = "what the untouched model writes after the prompts"
        return own_texts(model, prompts, args.max_new_tokens, special, args.positions), what
    sequences = source.sequences(args.lm_tokens, model.tokenizer)
    if sequences is None:
        return None, "nothing: the store has no tokens; give --text"
    texts = texts_of(sequences.tokens, sequences.is_text, special, args.positions)
    return texts, f"{texts.counts.sum():,} tokens of {source.settings['rows']}"


def _token_set(args, sae, model, site: str, latents: list[int]) -> tuple[list[int], list[str]]:
    """Returns the ids of the token set and their texts: of --tokens_of, or promoted ones."""
    from sae_jax import interpret, lm

    ids = []
    if args.tokens_of:
        for word in args.tokens_of.split(","):
            tokens = model.tokenizer.encode(word)
            if not tokens:
                raise UserError(f"--tokens_of has {word!r}, which is no token; leave it out")
            ids.append(tokens[0])
    elif isinstance(model, lm.JaxModel) and sae.config.kind != "crosscoder":
        found = interpret.output_tokens(sae, model, site, latents[:1])
        ids = [] if found is None else found.promoted[0].tolist()
    ids = list(dict.fromkeys(ids))
    return ids, [model.tokenizer.decode([i]) for i in ids]


def _numbers(texts: list[str], flag: str, kind: type) -> list:
    """Returns the numbers that a flag has with commas between them."""
    import math

    try:
        numbers = [kind(text) for text in texts]
    except (ValueError, OverflowError):
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        example = "--latent=7,12" if kind is int else "--factors=-10,0,5"
        raise UserError(f"{flag}={','.join(texts)} is not numbers with commas: {example}")
    return numbers


def _told(settings: dict) -> str:
    """Returns what is steered and measured, in words."""
    pairs = zip(settings["latents"], settings["maxima"], strict=True)
    maxima = ", ".join(f"latent {latent}: {maximum:.4g}" for latent, maximum in pairs)
    lines = [
        f"{settings['mode']} at {settings['sites'][-1]}, positions: {settings['positions']}",
        f"maxima of {settings['maxima_of']}: {maxima}",
        f"measured on {settings['measured_on']}",
    ]
    if settings["token_set"]:
        lines.append(f"token set: {' '.join(map(repr, settings['token_set']))}")
    return "\n".join(lines)
