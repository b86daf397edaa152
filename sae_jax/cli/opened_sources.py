"""Opens the rows that commands about a trained SAE read: of a store, of tokens or of text.

The flags have the same names in all of them: --store, --tokens_file or --text (with
--context_length and --collapse_newlines); --site and --target_site; --model and --model_dtype;
--tokens, --holdout_fraction and --include_excluded.
"""

from absl import flags

from sae_jax.errors import UserError


def define_model(values: flags.FlagValues) -> None:
    """Defines the flags --model and --model_dtype."""
    flags.DEFINE_string(
        "model",
        None,
        "Directory of the language model, or hf://ORG/REPOSITORY[@REVISION]; demo: the one that "
        "ships here; torch: before either: run by transformers, whatever its family; none: leave "
        "its part out. By default the store's, if it is the shipped one or on the hub.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "model_dtype",
        "float32",
        ["float32", "bfloat16"],
        "In which the language model computes; losses are float32 in any case.",
        flag_values=values,
    )


def chosen(args) -> dict:
    """Returns the fields of a run's data section that the flags give."""
    names = ("store", "site", "target_site", "holdout_fraction", "include_excluded")
    known = [name for name in names if name in args]
    return {name: args[name].value for name in known if args[name].value is not None}


def has_own_text(args) -> bool:
    """Whether the flags give text or tokens of the user's, instead of a store's."""
    return any(name in args and args[name].value for name in ("text", "tokens_file"))


def open_source(
    args, data, open_model, sequences: slice | None = None, lm_sequences: slice | None = None
) -> tuple:
    """Returns (source, model or None, settings): rows, tokens or text, as the flags and `data` say.

    Args:
      args: the flags.
      data: a run's data section.
      open_model: `lm.open_model`.
      sequences: which sequences of the user's tokens or text are read; all.
      lm_sequences: on which the language model is run; as `sequences`.

    Raises UserError where what the flags name does not go together, or is not there.
    """
    store, model, settings = open_store_and_model(args, data, open_model)
    return make_source(args, data, store, model, sequences, lm_sequences), model, settings


def open_store_and_model(args, data, open_model) -> tuple:
    """Returns (store or None, model or None, settings); the arguments are those of `open_source`.

    Raises UserError where one is not there, or the model is not the store's.
    """
    from sae_jax import lm
    from sae_jax.activations import is_world
    from sae_jax.evaluate.sources import check_model

    store = lm.open_store(data.store) if data.store and not is_world(data.store) else None
    directory = _model_of(args.model, store)
    model = None
    if directory is not None:
        model = open_model(directory, args.model_dtype)
        if store is not None and not has_own_text(args):
            check_model(store, model)
    settings = {"model": directory and str(directory)}
    if model is not None:
        settings["model_dtype"] = args.model_dtype
    return store, model, settings


def _model_of(asked: str | None, store):
    """Returns the model that the flag --model asks for, as `lm.open_model` takes it, or None.

    Without the flag it is the store's own model, if that is the one that ships here or on the hub.
    """
    from sae_jax import lm

    if asked is not None:
        return {"demo": lm.DEMO_MODEL, "none": None}.get(asked, asked)
    if store is None:
        return None
    made_by = store.meta.provenance.get("model_fingerprint")
    if made_by is not None and made_by == lm.fingerprint(lm.DEMO_MODEL):
        return lm.DEMO_MODEL
    return store.meta.model if lm.hub_name(store.meta.model or "") else None


def make_source(
    args, data, store, model, sequences=None, lm_sequences=None, *, heldout: bool = True
):
    """Returns what rows are read of: the user's tokens or text if given, else the store or world.

    The arguments are those of `open_source`, and the store and model, or None, that were opened.
    Without `heldout` all sequences of a store are read, and not only those held out in training.

    Raises UserError where what the flags name does not go together, or is not there.
    """
    from sae_jax import lm
    from sae_jax.activations import is_world
    from sae_jax.evaluate.sources import HeldOutRows, ModelRows, read_tokens
    from sae_jax.evaluate.worlds import WorldRows

    if is_world(data.store):
        if model or has_own_text(args):
            raise UserError(
                f"{data.store} is a synthetic world, which no language model or text goes with; "
                "leave out --model, --tokens_file and --text"
            )
        return WorldRows(data, tokens=args.tokens)
    sites = f"{data.site},{data.target_site}" if data.target_site else data.site
    if args.tokens_file and args.text:
        raise UserError("give either --tokens_file or --text")
    if not has_own_text(args):
        if store is None:
            raise UserError("nothing to evaluate on: give --store, --tokens_file or --text")
        return HeldOutRows(
            store,
            sites,
            tokens=args.tokens,
            holdout_fraction=data.holdout_fraction if heldout else None,
            include_excluded=data.include_excluded,
        )
    if model is None:
        raise UserError("activations on your tokens need the language model: give --model=DIR")
    if not data.site:
        raise UserError("which activations? give --site, such as --site=resid_post.2")
    if args.tokens_file:
        tokens, what = read_tokens(args.tokens_file), args.tokens_file
    else:
        texts = lm.read_texts(args.text, collapse_newlines=args.collapse_newlines)
        length = args.context_length or min(model.max_context, 1024)
        tokens = lm.pack(texts, model.tokenizer, length, args.tokens)
        what = ", ".join(args.text)
    excluded = {}
    if not data.include_excluded:
        if store is not None:
            names = ("excluded_tokens", "excluded_positions")
            excluded = {name: getattr(store.meta, name) for name in names}
        else:
            excluded = {"excluded_tokens": model.tokenizer.special_tokens}
    return ModelRows(
        model,
        sites,
        tokens[: max(1, args.tokens // tokens.shape[1])],
        what=what,
        sequences=sequences or slice(None),
        spliced_sequences=lm_sequences or sequences or slice(None),
        **excluded,
    )
