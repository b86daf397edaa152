"""Says what latents mean and measures how well it holds: `sae-jax explain`."""

import functools
import shutil

from absl import flags

from sae_jax.cli import counts, made_before, opened_saes, opened_sources, path_lists
from sae_jax.errors import UserError, choose

SUMMARY = """Say what latents mean, and measure how well it holds.

  sae-jax explain --run=runs/a

looks at a million tokens of the run's store and, for every latent, looks for a rule that tells
where it is active: a token, a token after another, a script, a regular expression, a place in the
context. It is found on one half of the text and tested on the other; where nothing holds, nothing
is claimed. It needs no language model, leaves runs/a/explain/report.html, and `sae-jax dashboard
--run=runs/a` shows what was found. What was stopped goes on when it is started again.

  sae-jax explain --run=runs/a --by=statistics,embedding --sentences=hf://ORG/MODEL

also measures, by a sentence encoder such as sentence-transformers/all-MiniLM-L6-v2, how alike the
texts of a latent are, and how near they are to what it was called.

  export OPENAI_API_KEY=...
  sae-jax explain --run=runs/a --by=llm --judge=gpt-4o-mini --sample=100 --dry_run
  sae-jax explain --run=runs/a --by=llm --judge=gpt-4o-mini --sample=100 --price=0.15,0.6

asks a language model behind any server of OpenAI's protocol (--base_url=http://127.0.0.1:8080/v1)
for explanations, and then, on texts that it has not seen, to tell by them where the latent is
active. --dry_run says how many calls and tokens that is, and what it costs. Every answer is kept in
OUT/cache.jsonl, so that none is paid for twice. The key comes from the environment variable that
--key_variable names, and goes nowhere else. --explainer and --scorers choose the protocol;
--explainer=FILE.md is a prompt of your own.

Scores mean little alone. Beside each are the same scores of other units' explanations (shuffled),
of one that says nothing (none), and of --controls: neurons of the same site, random directions, and
with shuffled_model an SAE that is trained, as the run's was, on the language model with its weights
shuffled, which takes as long as the run did.

  sae-jax explain --run=runs/a --proxies=all --labelled_text=texts.jsonl --label_field=language

finds the latents of concepts that rules of ours know (scripts, DNA, base64, HTML, URLs, ..., or
your own NAME=REGEX) and says how specific they are, with figures, beside the site's best neuron.
"""

_ASKED = (  # the flags that an activity is recorded by
    "store text tokens_file context_length collapse_newlines site target_site include_excluded "
    "tokens"
).split()
LATENTS = "latents"  # as interpret.explain.records has it
_NO_EXPLAINER = "none"
_WAYS = ("statistics", "embedding", "llm")
_ALL = {"all": ["scripts", "alphabets", "patterns", "documents"]}
_CONTROLS = ("neurons", "random", "shuffled_model")


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sae-jax explain`."""

    def string(name, default, text):
        flags.DEFINE_string(name, default, text, flag_values=values)

    def integer(name, default, text, lowest=1):
        flags.DEFINE_integer(name, default, text, lower_bound=lowest, flag_values=values)

    def boolean(name, default, text):
        flags.DEFINE_bool(name, default, text, flag_values=values)

    def listed(name, default, text):
        flags.DEFINE_list(name, default, text, flag_values=values)

    string("run", None, "Directory of a run.")
    string("sae", None, "Any SAE instead: what sae_jax.load reads.")
    string("kind", None, "Of a Gemma Scope file: autoencoder or transcoder.")
    string("out", None, "Directory of the results; RUN/explain. Needed with --sae.")
    listed("by", None, f"Ways to explain: one or more of {', '.join(_WAYS)}; statistics.")
    string("store", None, "Look at this store's text; the run's.")
    string("site", None, "Site of the store or model; the run's, or what the SAE's file says.")
    string("target_site", None, "The site that a transcoder predicts; the run's.")
    opened_sources.define_model(values)
    string("tokenizer", None, "Directory of a tokenizer, where there is no model.")
    path_lists.define("text", "Text files instead of a store, as for harvest.", values)
    string("tokens_file", None, "An .npy or .npz of token ids (sequences, length), instead.")
    integer("context_length", None, "With --text: tokens of a context; at most 1024.")
    boolean("collapse_newlines", False, "With --text: make one of several newlines.")
    boolean("include_excluded", None, "Look at all positions, BOS too; as the run was trained.")
    counts.define("tokens", 1_000_000, "Look at about so many tokens, spread evenly.", values)
    boolean("overwrite", False, "Replace what was recorded with other settings.")
    integer("seed", 0, "Seed of all that is drawn.", 0)
    listed(
        "controls",
        ["neurons", "random"],
        "What is explained beside: neurons, random (directions), shuffled_model; or none.",
    )
    counts.define(
        "shuffled_tokens", None, "Train shuffled_model's SAE on so many; as many.", values
    )

    counts.define_float(
        "fdr", 0.05, "statistics: the rate of false discoveries.", values,
        lower_bound=0.0, upper_bound=1.0,
    )  # fmt: skip
    counts.define_float(
        "least_f1", 0.2, "statistics: claim nothing of which F1 is lower.", values,
        lower_bound=0.0, upper_bound=1.0,
    )  # fmt: skip

    string("latents", None, 'embedding and llm: look at these, such as "1,5,9".')
    integer("sample", 100, "embedding and llm: look at so many latents, drawn at random.")
    integer("control_sample", 50, "embedding and llm: look at so many units of each control.")

    string("sentences", None, "embedding: directory or hf:// name of a sentence encoder.")

    string(
        "base_url",
        "https://api.openai.com/v1",
        "llm: the server, such as http://127.0.0.1:8080/v1.",
    )
    string("judge", None, "llm: the name that the server has for the model that is asked.")
    string("key_variable", "OPENAI_API_KEY", "llm: the environment variable that holds the key.")
    string(
        "explainer",
        "bricken2023",
        "llm: bricken2023, delphi, saebench, np_max_act_logits, a prompt of yours (FILE.md), none.",
    )
    listed(
        "scorers",
        ["detection", "fuzzing"],
        "llm: of detection, fuzzing, intruder, bricken2023, saebench, logits, and simulation.",
    )
    flags.DEFINE_enum(
        "negatives", "random", ["random", "same_tokens"],
        "llm: texts without the latent: any, or, which is hard, with its tokens.",
        flag_values=values,
    )  # fmt: skip
    integer("logprobs", 0, "llm: ask for so many log-probabilities, for an AUC.", 0)
    string("simulator", None, "llm: the language model that --scorers=simulation runs here.")
    listed("score", None, "llm: test these explanations too: statistics, labels.")
    integer("concurrency", 8, "llm: calls at once.")
    counts.define("tokens_per_minute", None, "llm: the server's limit.", values)
    listed("price", None, "llm: money for a million tokens in and out, such as 0.15,0.6.")
    counts.define_float("budget", None, "llm: stop once so much is spent.", values, lower_bound=0.0)
    boolean("dry_run", False, "llm: say how many calls and tokens it is, and what it costs.")

    listed(
        "proxies",
        None,
        "Measure how specific latents are for concepts: all; or scripts, alphabets, patterns, "
        "documents; or single ones, such as DNA, and NAME=REGEX of yours.",
    )
    listed("steer", None, "proxies: concepts to which the model is steered by their latents.")
    path_lists.define(
        "labelled_text", "The text that was harvested, with a label a document.", values
    )
    string("label_field", "label", "The field of --labelled_text's JSON that holds the label.")
    string(
        "labels",
        None,
        "A .csv or .json of labels of yours. embedding and llm look at these latents and score "
        "the labels (llm: with --score=labels).",
    )


def run(args, overrides) -> None:
    """Explains and scores in the ways asked for, and writes what was found."""
    del overrides
    ways = _ways(args)
    opened = opened_saes.open_sae(args.run, args.sae, args.kind, opened_sources.chosen(args))
    work = _Work(args, opened)
    if args.dry_run:
        print(work.planned())
        return
    if args.labels:
        work.take_labels()
    if args.proxies:
        work.measure_specificity()
    for way in ways:
        work.explain(way)
    work.report()


def _ways(args) -> list[str]:
    """Returns the ways that are asked for, in the order in which they build on each other.

    Raises UserError for flags that do not go together, before anything is opened.
    """
    asked = args.by or ["statistics"]
    for way in asked:
        choose(way, _WAYS, "--by")
    if args.sae and not args.out:
        raise UserError("--sae needs --out=DIR, for what is found of its latents")
    for name in args.controls:
        choose(name, (*_CONTROLS, "none"), "--controls")
    if "embedding" in asked and not args.sentences:
        raise UserError(
            "--by=embedding needs a sentence encoder: give --sentences=DIR, such as a copy of "
            "hf://sentence-transformers/all-MiniLM-L6-v2, or that name"
        )
    if "llm" in asked:
        _check_llm(args)
    elif args.dry_run:
        raise UserError("--dry_run says what calls cost; only --by=llm makes any")
    for name in ("steer", "labelled_text"):
        if args[name].value and not args.proxies:
            raise UserError(f"--{name} is for --proxies: give --proxies=all, or some")
    _numbers(args.latents)
    return [way for way in _WAYS if way in asked]


def _check_llm(args) -> None:
    """Raises UserError for flags of --by=llm that do not go together."""
    from sae_jax.interpret.explain.llm.explainers import explainer_of
    from sae_jax.interpret.explain.llm.scoring import SCORERS, SIMULATION

    for name in args.scorers:
        choose(name, (*SCORERS, SIMULATION), "--scorers")
    for way in args.score or ():
        choose(way, ("statistics", "labels"), "--score")
    if args.explainer != _NO_EXPLAINER:
        explainer_of(args.explainer)
    elif not args.score:
        raise UserError("--explainer=none explains nothing; --score=statistics tests what is there")
    if SIMULATION in args.scorers and not args.simulator:
        raise UserError(
            "--scorers=simulation runs a language model here: give --simulator=DIR or hf://ORG/NAME"
        )
    _price(args.price)
    if not args.judge and args.model and not _is_place(args.model):
        args.judge, args["model"].value = args.model, None  # --base_url=... --model=NAME
    if not args.judge and _needs_server(args):
        raise UserError(
            "--by=llm needs the name that the server has for its model: give --judge=NAME, and "
            "--base_url=ADDRESS if it is not OpenAI's server"
        )


def _needs_server(args) -> bool:
    return args.explainer != _NO_EXPLAINER or args.scorers != ["simulation"]


def _is_place(model: str) -> bool:
    """Returns whether --model names the language model that the SAE is of, and not a judge."""
    from sae_jax import hub, paths

    return model in ("demo", "none") or hub.is_hub_name(model) or paths.local(model).exists()


class _Work:
    """What is explained, and the directory that holds what is known of it."""

    def __init__(self, args, opened):
        """Opens the SAE's activity, or records it, and those of the controls."""
        from sae_jax import lm, paths
        from sae_jax.interpret.explain.controls import record_controls

        self.args, self.sae = args, opened.sae
        self.out = paths.local(args.out or opened.path / "explain")
        place, which = self.out / "activity", {"sae": opened.name, **opened.about}
        there = self._there(place, which)
        data = opened.data
        store, self.model, settings = opened_sources.open_store_and_model(args, data, lm.open_model)
        self.tokenizer = opened_sources.open_tokenizer(args, self.model)
        self.source = opened_sources.make_source(args, data, store, self.model, heldout=False)
        own = there or self._recorded(place, which | settings)
        if (most := int(own.tokens.max(initial=0))) >= self.tokenizer.vocab_size:
            raise UserError(
                f"the text has token {most}, and {self.tokenizer.name} has "
                f"{self.tokenizer.vocab_size}: it is of another model; give the store's own"
            )
        self.written = own.about.settings["site"].split(",")[-1]
        names = [name for name in args.controls if name != "none"]
        if args.dry_run and "shuffled_model" in names:
            names.remove("shuffled_model")
            print("Not counted: shuffled_model, whose SAE is trained before anything is asked.")
        controls = record_controls(
            names,
            own,
            self.sae,
            self.source,
            self.out,
            run=opened.path if opened.is_run else None,
            model=self.model,
            tokens=args.shuffled_tokens,
            seed=args.seed,
            overwrite=args.overwrite,
        )
        self.activities = {LATENTS: own, **controls}
        self.title = f"Latents of {opened.path.name}, explained"

    def _there(self, place, which: dict):
        """Returns the activity that is there, or None where it is to be recorded."""
        from sae_jax.interpret import collection
        from sae_jax.interpret.activity import Activity

        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out={self.out} is a file; give the directory of the results")
        if not (place / "activity.json").is_file():
            collection.free(place)  # what is there is not ours to replace
            return None
        there, which = Activity(place), which | {"d_sae": self.sae.config.d_sae}
        return there if made_before.check(self.args, place, there, which, _ASKED) else None

    def _recorded(self, place, settings: dict):
        from sae_jax.interpret.activity import Activity, record
        from sae_jax.interpret.explain import records

        asked = {name: self.args[name].value for name in _ASKED}
        place.parent.mkdir(parents=True, exist_ok=True)
        with made_before.replacing(place) as made:
            record(
                self.sae,
                self.source,
                made,
                tokens=self.args.tokens,
                settings=settings | {"asked": asked},
                overwrite=self.args.overwrite,
            )
            if place.exists():  # what was said of it is not of the new one
                records.write(self.out, [], [])
                shutil.rmtree(self.out / "proxies", ignore_errors=True)
        return Activity(place)

    @functools.cached_property
    def _labels(self):
        from sae_jax.interpret.dashboard import read_labels

        return read_labels(self.args.labels, self.sae.config.d_sae)

    def take_labels(self) -> None:
        """Puts the user's own labels among the explanations, so that they are scored."""
        from sae_jax.interpret.explain import records

        said = [
            records.Explanation(LATENTS, latent, "labels", "given", text)
            for latent, text in self._labels.names.items()
        ]
        records.update(self.out, said, [])

    def explain(self, way: str) -> None:
        """Explains and scores all units in a way, and puts what was found beside what there is."""
        from sae_jax.interpret.explain import records

        ways = {"statistics": self._statistics, "embedding": self._embedding, "llm": self._llm}
        for units, activity in self.activities.items():
            records.update(self.out, *ways[way](units, activity))

    def _statistics(self, units: str, activity) -> tuple:
        from sae_jax.interpret.explain.statistics import by_statistics

        return by_statistics(
            activity,
            self.tokenizer,
            units=units,
            fdr=self.args.fdr,
            least_f1=self.args.least_f1,
            seed=self.args.seed,
            indicators=self._known,
        )

    @functools.cached_property
    def _known(self):
        """What is known of each token of the text, which is the same for all units."""
        from sae_jax.interpret import proxies

        return proxies.indicators(self.tokenizer, self.activities[LATENTS].tokens)

    def _embedding(self, units: str, activity) -> tuple:
        from sae_jax.interpret.explain.embedding import by_embedding

        chosen = self._chosen(units, activity)
        scores = by_embedding(
            activity,
            self.tokenizer,
            self._sentences,
            self._said(units, chosen),
            chosen,
            units=units,
            seed=self.args.seed,
        )
        return [], scores

    @functools.cached_property
    def _sentences(self):
        from sae_jax.lm.sentences import open_sentence_encoder

        return open_sentence_encoder(self.args.sentences)

    def _llm(self, units: str, activity) -> tuple:
        from sae_jax.interpret.explain.llm.explaining import explain
        from sae_jax.interpret.explain.llm.scoring import score

        chosen, effects = self._chosen(units, activity), self._effects(units, activity)
        scorers = self._scorers(units, effects)
        if "logits" in scorers and effects is None:
            raise UserError(
                "--scorers=logits needs the language model, whose output tokens latents promote, "
                "and an SAE that writes to it: give --model"
            )
        explained = []
        if self.args.explainer != _NO_EXPLAINER:
            explained = explain(
                activity,
                self.tokenizer,
                self._client,
                chosen,
                explainer=self.args.explainer,
                effects=effects,
                units=units,
                seed=self.args.seed,
            )
        others = [e for e in self._said(units, chosen) if e.by in (self.args.score or ())]
        scores = score(
            activity,
            self.tokenizer,
            self._client if _needs_server(self.args) else None,
            [*explained, *others],
            scorers=scorers,
            effects=effects,
            seed=self.args.seed,
            negatives=self.args.negatives,
            judge=self._simulator,
            logprobs=self.args.logprobs,
        )
        return explained, scores

    def _chosen(self, units: str, activity) -> list[int]:
        """Returns the units that the dearer ways look at."""
        from sae_jax.interpret.explain.examples import draw_latents

        if units == LATENTS and self.args.latents:
            chosen = _numbers(self.args.latents)
            if chosen[-1] >= activity.d_sae:
                raise UserError(f"no latent {chosen[-1]}: there are 0 to {activity.d_sae - 1:,}")
            return chosen
        if units == LATENTS and self.args.labels:
            return sorted(self._labels.names)
        count = self.args.sample if units == LATENTS else self.args.control_sample
        return draw_latents(activity, count, self.args.seed)

    def _said(self, units: str, chosen: list[int]) -> list:
        """Returns what was said about these units so far."""
        from sae_jax.interpret.explain import records

        explanations, _ = records.read(self.out)
        return [e for e in explanations if e.units == units and e.unit in set(chosen) and e.text]

    @functools.cached_property
    def _simulator(self):
        from sae_jax import lm

        return self.args.simulator and lm.open_model(self.args.simulator, self.args.model_dtype)

    @functools.cached_property
    def _client(self):
        from sae_jax.interpret.explain.llm.client import Client

        args = self.args
        return Client(
            args.base_url,
            args.judge,
            cache=self.out / "cache.jsonl",
            key_variable=args.key_variable,
            concurrency=args.concurrency,
            tokens_per_minute=args.tokens_per_minute,
            budget=args.budget,
            price=_price(args.price),
        )

    def _scorers(self, units: str, effects) -> list[str]:
        """Returns the scorers of some units, logits left out for controls without output tokens."""
        has_logits = units == LATENTS or effects is not None
        return [name for name in self.args.scorers if name != "logits" or has_logits]

    def _effects(self, units: str, activity):
        """Returns the output tokens of some units; None where they are not known."""
        from sae_jax.interpret.explain import controls
        from sae_jax.interpret.explain.llm.source import logit_weights

        kind, sae = self.sae.config.kind, self.sae
        if self.model is None or kind == "crosscoder":
            return None
        if units != LATENTS:  # explained from what the latents are: with output tokens, or without
            is_known = kind == "autoencoder"
            sae = controls.written(units, self.source, self.args.seed) if is_known else None
        if sae is None:
            return None
        return logit_weights(sae, self.model, self.written, self._chosen(units, activity))

    def planned(self) -> str:
        """Returns what explaining by a language model would ask and cost; nothing is asked."""
        from sae_jax.interpret.explain.llm.scoring import planned

        lines = []
        for units, activity in self.activities.items():
            chosen, effects = self._chosen(units, activity), self._effects(units, activity)
            plan = planned(
                activity,
                self.tokenizer,
                self._client,
                chosen,
                explainer=None if self.args.explainer == _NO_EXPLAINER else self.args.explainer,
                scorers=self._scorers(units, effects),
                effects=effects,
                seed=self.args.seed,
                negatives=self.args.negatives,
            )
            lines.append(f"{len(chosen)} {units}: {plan}")
        return "\n".join(lines)

    def measure_specificity(self) -> None:
        """Measures how specific latents are for the concepts of --proxies, and writes it."""
        from sae_jax.interpret import proxies

        args, own, labels = self.args, self.activities[LATENTS], None
        if args.labelled_text:
            labels = proxies.document_labels(
                args.labelled_text,
                self.tokenizer,
                own.tokens,
                own.numbers,
                label_field=args.label_field,
                collapse_newlines=args.collapse_newlines,
            )
        wanted = [name for one in args.proxies for name in _ALL.get(one, [one])]
        model = None if self.sae.config.kind == "crosscoder" else self.model
        beside = {
            name: activity
            for name, activity in self.activities.items()
            if name in ("random", "shuffled_model")
        }
        found = proxies.specificity(
            own,
            self.tokenizer,
            wanted,
            neurons=self.source,
            controls=beside,
            labels=labels,
            sae=self.sae,
            model=model,
            steer=args.steer or (),
        )
        print(f"Written: {proxies.write_specificity(self.out / 'proxies', found)}")

    def _of_one_token(self, found) -> dict[str, set[int]]:
        """Returns the units of a single token, of those that records are of, by whose they are."""
        from sae_jax.interpret.explain.single_token import single_token

        told = {}
        for units, activity in self.activities.items():
            numbers = sorted({record.unit for record in found if record.units == units})
            which = single_token(activity, numbers).tolist()
            told[units] = {unit for unit, is_one in zip(numbers, which, strict=True) if is_one}
        return told

    def report(self) -> None:
        """Sums up all that is known, prints it, and writes the report and the labels."""
        from sae_jax.interpret.explain import labels, records, report, summary

        explanations, scores = records.read(self.out)
        told = summary.single_token_units(explanations)
        told |= self._of_one_token([*explanations, *scores])
        found = summary.summarise(explanations, scores, single_token=told, seed=self.args.seed)
        summary.write_summary(self.out, found)
        labels.write_labels(self.out, explanations, scores)
        print(found)
        page = report.write_report(
            self.out,
            found,
            explanations,
            scores,
            self.activities[LATENTS],
            self.tokenizer,
            title=self.title,
            seed=self.args.seed,
        )
        print(f"Written: {page}")


def _numbers(text: str | None) -> list[int]:
    """Returns the numbers of latents in a list such as "1,5,9", rising."""
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 16 for part in parts):
        raise UserError(f'--latents={text}: write the numbers of latents, such as "1,5,9"')
    return sorted(set(map(int, parts)))


def _price(parts: list[str] | None) -> tuple[float, float] | None:
    """Returns the price of a million tokens in and out."""
    if parts is None:
        return None
    try:
        there, back = map(float, parts)
    except ValueError:
        raise UserError(
            f"--price={','.join(parts)}: write what a million tokens cost in and out, such as "
            "--price=0.15,0.6"
        ) from None
    return there, back
