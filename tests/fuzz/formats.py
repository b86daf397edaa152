"""Every format that is read: small valid examples, and how commands read them.

A `Format` makes examples in a folder, a folder each, and reads one as commands do, through the
public readers, without training or computing: what is to be found is what reading does to us.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import gzip
import importlib.util
import json
import pathlib
import shutil
from collections.abc import Callable

import jax
import numpy as np
import safetensors.numpy
import world
from training import make_config, sparse_rows

import sae_jax
from sae_jax import config as configs
from sae_jax import interop, lm, paths
from sae_jax.activations import foreign, write_store
from sae_jax.cli.store import describe
from sae_jax.errors import UserError
from sae_jax.evaluate import report
from sae_jax.evaluate.sources import HeldOutRows, read_tokens
from sae_jax.interop.many import export_many
from sae_jax.interop.saelens import site_of
from sae_jax.interop.select import select
from sae_jax.laws import next_run
from sae_jax.laws import results as tables
from sae_jax.sweep import design, grid, status
from sae_jax.sweep import directory as sweeps
from sae_jax.sweep.leases import Leases
from sae_jax.train import checkpoints, results, watching
from sae_jax.train.directory import RunDirectory, read_config
from sae_jax.train.mesh import make_mesh
from sae_jax.train.run import train_run
from sae_jax.train.step import Trainer

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Format:
    """A format, how to make it and how to read it.

    Attributes:
      make: writes examples to a folder that exists, a folder each.
      read: reads the example in a folder as commands do, and returns the arrays that it got. It
        may write to a second folder, which is new.
      changed: patterns of the files that are damaged; all by default.
      sealed: patterns of files that are read whole and have checksums: if one was damaged, reading
        must refuse it or return what the undamaged example gave.
      finite: whether an array with NaN or infinity is a wrong result.
      cost: about how many times as long as reading a few small files a case takes.
      needs: packages without which the format cannot be read.
      place: whether other places may be read, since a file names them.
      rewrites: whether reading writes to the folder.
    """

    make: Callable[[pathlib.Path], None]
    read: Callable[[pathlib.Path, pathlib.Path], Arrays]
    changed: tuple[str, ...] = ("*",)
    sealed: tuple[str, ...] = ()
    finite: bool = True
    cost: int = 1
    needs: tuple[str, ...] = ()
    place: bool = False
    rewrites: bool = False

    def is_sealed(self, name: str) -> bool:
        """Whether every change of a file must be noticed."""
        return any(fnmatch.fnmatch(name, pattern) for pattern in self.sealed)

    def files(self, names) -> list[str]:
        """Returns which of an example's files are damaged."""
        return [n for n in names if any(fnmatch.fnmatch(n, each) for each in self.changed)]

    def missing(self) -> list[str]:
        """Returns the packages that the format needs and that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


# -------------------------------------------------------------------------------------------- SAEs


def _copies(*patterns: str) -> Callable[[pathlib.Path], None]:
    def make(root: pathlib.Path) -> None:
        for pattern in patterns:
            for folder in sorted((FIXTURES / "exports").glob(pattern)):
                shutil.copytree(folder, root / folder.name)

    return make


def _exports(format: str, *saes: str) -> Callable[[pathlib.Path], None]:
    """Returns a maker of exports of the SAEs that tests/fixtures has in our own format."""

    def make(root: pathlib.Path) -> None:
        _copies(f"{format}-*")(root)
        for name in saes:
            provenance = {"hook_name": "blocks.3.hook_resid_post", "hook_layer": 3, "l0": 2.5}
            sae = sae_jax.load(FIXTURES / "exports" / f"sae_jax-{name}")
            interop.export(sae, format, root / f"new-{name}", provenance)
            (root / f"new-{name}" / "README.md").unlink()

    return make


def _make_sparsify(root: pathlib.Path) -> None:
    _copies("sparsify-*")(root)
    for kind in ("transcoder", "skip_transcoder"):  # of one width, as no fixture is
        sae = sae_jax.TopK(kind=kind, d_in=4, d_out=4, d_sae=6, k=2, normalize="none")
        interop.export(sae, "sparsify", root / kind)
        (root / kind / "README.md").unlink()


def _make_old_saelens(root: pathlib.Path) -> None:
    """Writes what SAELens wrote before version 6: one level of fields, other names."""
    old = {
        "model_name": "gpt2-small", "hook_name": "blocks.8.hook_resid_pre", "hook_layer": 8,
        "hook_head_index": None, "context_size": 128, "dataset_path": "openwebtext",
        "prepend_bos": True, "dtype": "torch.float32", "device": "cpu", "d_in": 4, "d_sae": 6,
        "finetuning_scaling_factor": False, "sae_lens_training_version": "3.0.0",
        "activation_fn_kwargs": {}, "dataset_trust_remote_code": True,
        "model_from_pretrained_kwargs": {"center_writing_weights": True}, "neuronpedia_id": None,
    }  # fmt: skip
    variants = {
        "standard": {"architecture": "standard", "activation_fn_str": "relu",
                     "normalize_activations": "none", "apply_b_dec_to_input": True},
        "topk": {"architecture": "standard", "activation_fn_str": "topk",
                 "activation_fn_kwargs": {"k": 2}, "normalize_activations": None,
                 "apply_b_dec_to_input": False},
        "first": {"activation_fn": "relu", "normalize_activations": False,
                  "hook_point": "blocks.8.hook_resid_pre", "hook_point_layer": 8},
    }  # fmt: skip
    tensors = safetensors.numpy.load_file(
        FIXTURES / "exports/saelens-topk-autoencoder/sae_weights.safetensors"
    )
    for name, fields in variants.items():
        (root / name).mkdir()
        (root / name / "cfg.json").write_text(json.dumps(old | fields))
        more = {"scaling_factor": np.ones(6, np.float32)} if name == "first" else {}
        safetensors.numpy.save_file(tensors | more, root / name / "sae_weights.safetensors")


def _read_sae(folder: pathlib.Path, scratch: pathlib.Path) -> Arrays:
    sae = sae_jax.load(folder)
    interop.format_of(folder)
    interop.site(folder)
    provenance = interop.read_provenance(folder)
    interop.export(sae, "sae_jax", scratch / "export", provenance)
    arrays = {name: np.asarray(value) for name, value in sae.parameters().items()}
    return arrays | {name: np.asarray(getattr(sae, name)) for name in ("scale", "target_scale")}


# --------------------------------------------------------------------------------- language models

_FAMILIES = (
    "gpt2", "gpt_neox", "llama_tied_gqa", "llama3_rope", "mistral", "qwen2_yarn", "gemma2",
    "gemma3",
)  # fmt: skip


def _make_models(root: pathlib.Path) -> None:
    for family in _FAMILIES:
        (root / family).mkdir()
        for file in (FIXTURES / "lm" / family).iterdir():
            if file.name != "expected.npz":
                shutil.copy(file, root / family)


def _read_model(folder: pathlib.Path, scratch: pathlib.Path) -> Arrays:
    model = lm.open_model(folder)
    model.site_width("resid_post.0")
    params = lm.load_params(folder)
    lm.fingerprint(folder)
    return {"embed": np.asarray(params["embed"])}


def _make_tokenizers(root: pathlib.Path) -> None:
    import tokenizers

    world.make_model(root / "named")
    (root / "named/tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|bos|>", "eos_token": {"content": "<|bos|>"}, "pad_token": None})
    )
    (root / "named/generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "<s>": 1, "the": 2, "a": 3, ".": 4}, "[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)]
    )
    (root / "template").mkdir()
    backend.save(str(root / "template/tokenizer.json"))
    for folder in (root / "named", root / "template"):
        config = {"model_type": "llama", "bos_token_id": 1, "eos_token_id": [1, 2]}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").unlink(missing_ok=True)


def _read_tokenizer(folder: pathlib.Path, scratch: pathlib.Path) -> Arrays:
    tokenizer = lm.load_tokenizer(folder)
    tokens = lm.pack(world.TEXTS * 2, tokenizer, 8)
    tokenizer.decode(tokens[0])
    tokenizer.bos_provenance()
    return {"tokens": tokens, "special": np.array(tokenizer.special_tokens, np.int32)}


# ------------------------------------------------------------------------------------------ stores

_SEALED = ("sites/*", "tokens/*", "excluded/*", "usable_rows/*", "checksums/*")


def _make_stores(root: pathlib.Path) -> None:
    shutil.copytree(FIXTURES / "stores/harvested", root / "harvested")
    rows = {name: sparse_rows(48, seed, 4) for seed, name in enumerate(("resid_post.0", "z.1"))}
    write_store(
        root / "written", rows, context_length=4, special_tokens=[0], provenance={"text": ["a"]},
        tokens=np.arange(48, dtype=np.int32).reshape(12, 4) % 5,
    )  # fmt: skip
    shutil.rmtree(root / "written/written", ignore_errors=True)


def _read_store(folder: pathlib.Path, scratch: pathlib.Path) -> Arrays:
    store = lm.open_store(folder)
    describe(store)
    store.check()
    return _held(store) | {
        name: store.read(name, slice(None)).astype(np.float32) for name in store.meta.sites
    }


def _held(store) -> Arrays:
    """Returns what is in a store besides the activations."""
    sites = list(store.meta.sites)[:1]
    found = HeldOutRows(store, sites, tokens=store.num_rows, holdout_fraction=None)
    tokens, used = (found.sequences(store.num_rows) or (np.zeros(0), np.zeros(0)))[:2]
    return {
        "excluded": store.read_excluded(range(store.meta.num_chunks)),
        "usable": np.asarray(store.usable_rows),
        "tokens": tokens,
        "used": used,
    }


def _make_live_store(root: pathlib.Path) -> None:
    shutil.copytree(FIXTURES / "stores/live", root / "live")
    file = root / "live/meta.json"
    meta = json.loads(file.read_text())
    meta["live"]["model"] = str(lm.DEMO_MODEL)
    file.write_text(json.dumps(meta, indent=1))


def _read_live_store(folder: pathlib.Path, scratch: pathlib.Path) -> Arrays:
    store = lm.open_store(folder)
    describe(store)
    return _held(store)


def _make_foreign(root: pathlib.Path) -> None:
    x = sparse_rows(48, width=4)
    for name in ("npy", "half", "safetensors"):
        (root / name).mkdir()
    for i, part in enumerate((x[:20], x[20:])):
        np.save(root / f"npy/{i}.npy", part)
        np.save(root / f"half/{i}.npy", part.astype(np.float16))
        safetensors.numpy.save_file({"x": part}, root / f"safetensors/{i}.safetensors")
    if importlib.util.find_spec("pyarrow"):
        _make_cache(root / "cache", x.reshape(12, 4, 4))


def _make_cache(folder: pathlib.Path, x: np.ndarray) -> None:
    """Writes a data set as SAELens' CacheActivationsRunner does, without its package."""
    import pyarrow as pa

    hook = "blocks.2.hook_resid_post"
    folder.mkdir()
    array2d = {"shape": list(x.shape[1:]), "dtype": "float32", "_type": "Array2D"}
    ids = {"feature": {"dtype": "int32", "_type": "Value"}, "length": x.shape[1], "_type": "List"}
    features = {hook: array2d, "token_ids": ids}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": None}))
    for name, part in zip(names, np.split(x, 2), strict=True):
        table = pa.table({
            hook: pa.array(part.tolist(), pa.list_(pa.list_(pa.float32()))),
            "token_ids": pa.array(np.arange(24).reshape(6, 4).tolist(), pa.list_(pa.int32())),
        })  # fmt: skip
        with pa.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table)


def _read_foreign(folder: pathlib.Path, scratch: pathlib.Path) -> Arrays:
    store = foreign.convert(folder, scratch / "store", site_of_hook=site_of)
    store.check()
    return _held(store)


# ---------------------------------------------------------------------------------- runs and sweeps


@functools.cache
def _config(store: str) -> configs.Config:
    return make_config(
        store, sae={"d_sae": 16}, data={"batch_size": 16, "window_rows": 256},
        train={"tokens": 64, "checkpoint_every": 2, "log_every": 1},
    )  # fmt: skip


def _make_rows(folder: pathlib.Path) -> str:
    """Writes a store for runs beside the examples, in a folder that is none of them."""
    write_store(folder, sparse_rows(512), context_length=4)
    return str(folder)


def _make_runs(root: pathlib.Path) -> None:
    store = _make_rows(root.with_name(f"{root.name}-store"))
    train_run(_config(store), root / "run")
    rows = HeldOutRows(lm.open_store(store), "", tokens=16, holdout_fraction=0.05)
    report.save(report.evaluate(sae_jax.load(root / "run"), rows), root / "run/eval.json")
    (root / "run/failed.json").write_text('{"step": 4, "reason": "the loss became NaN"}')


def _read_run(folder: pathlib.Path, scratch: pathlib.Path) -> Arrays:
    config = read_config(folder)
    sae = sae_jax.load(folder)
    interop.read_provenance(folder)
    directory = RunDirectory(folder, config)
    assert directory.result is None or isinstance(directory.result, dict)
    assert directory.failure is None or isinstance(directory.failure, dict)
    directory.read_metrics()
    directory.lines_until(2)
    watching.last_line(folder / "metrics.jsonl")
    return {name: np.asarray(value) for name, value in sae.parameters().items()}


def _read_checkpoint(folder: pathlib.Path, scratch: pathlib.Path) -> Arrays:
    """Reads the whole state of a run, as going on with it does."""
    config = read_config(folder)
    with jax.set_mesh(make_mesh(config)):
        like = Trainer(config, 4, 1.0).abstract()
        found = checkpoints.Checkpoints(folder, keep=config.train.keep_checkpoints)
        with contextlib.closing(found):
            if found.latest_step is None:
                raise UserError("starts afresh")
            state = found.restore(like)
        leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _read_evaluation(folder: pathlib.Path, scratch: pathlib.Path) -> Arrays:
    found = report.load(folder / "eval.json")
    found.table()
    return {"density": found.rows.density}


def _make_sweep(root: pathlib.Path) -> None:
    """Writes a sweep with runs in all states, as workers leave it, without training any."""
    store = _make_rows(root.with_name(f"{root.name}-store"))
    product = grid.product(grid.sweep("sae.d_sae", [16, 32]), grid.sweep("train.seed", [0, 1, 2]))
    runs = sweeps.expand(_config(store), product)
    folder = root / "sweep"
    directory = sweeps.SweepDirectory.start(folder, runs)
    for number, run in enumerate(runs[:5]):
        place = directory.run_path(run)
        place.mkdir(parents=True)
        paths.save_json(configs.to_dict(run.config) | {"environment": {}}, place / "config.json")
        line = {"step": 2, "loss": 1.5, "tokens_per_second": 100.0}
        (place / "metrics.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line) + "\n")
        if number == 4:
            paths.save_json({"step": 3, "reason": "NaN"}, place / "failed.json")
        elif number < 3:
            result = results.planned(run.config) | {
                "eval_loss": 1.0 + number, "eval_fvu": 0.25, "eval_l0": 2.0, "dead_fraction": 0.1,
                "wall_seconds": 1.0, "devices": 1,
            }  # fmt: skip
            paths.save_json(result, place / "result.json")
            (place / "checkpoints/4").mkdir(parents=True)
            (place / "checkpoints/4/_METADATA").write_text("{}")
    (work,) = design.make_passes([run.config for run in runs])
    (folder / "leases").mkdir()
    (folder / f"leases/{work.name}.1").write_text("60.0 host process 1")
    (folder / "leases/clock").write_text("")
    directory.write_results()
    entries = [
        {"path": f"resid/width_{n}", "run_id": run.id, "architecture": "topk", "site": "x",
         "width": 16, "l0": 2.0, "fvu": 0.25, "ce_recovered": None}
        for n, run in enumerate(runs[:3])
    ]  # fmt: skip
    for entry in entries:
        (folder / "exports" / entry["path"]).mkdir(parents=True)
        (folder / "exports" / entry["path"] / "sae.json").write_text("{}")
    paths.save_json({"format": "sae_jax", "saes": entries}, folder / "exports/index.json")


_PLAN = {"interval": (1.0, 2.0), "loss": 1.5, "flops": 1e9, "d_sae": 24, "tokens": 640, "k": 2}


def _read_sweep(folder: pathlib.Path, scratch: pathlib.Path) -> Arrays:
    directory = sweeps.SweepDirectory(folder)
    leases = Leases(folder / "leases", 60.0)
    status.view(directory, leases)
    todo = design.make_passes([run.config for run in directory.runs], directory.passes)
    for work in todo[:3]:
        if lease := leases.claim(work.name):
            lease.release()
    return {}


def _read_results(folder: pathlib.Path, scratch: pathlib.Path) -> Arrays:
    """Reads a sweep's results as `fit`, `export` and `sweep --status` do."""
    select(folder, "d_sae>=1 eval_l0<60")
    export_many(folder, "sae_jax", folder / "exports")
    found = tables.read(str(folder), ("d_sae", "tokens"))
    next_run.save(_PLAN, *next_run.make(_PLAN, found.run_folders(), None), scratch)
    sweeps.SweepDirectory(folder).write_results()
    return found.columns


def _make_tables(root: pathlib.Path) -> None:
    lines = [
        {"run_id": f"{n}-{d}", "architecture": "topk", "status": "done", "d_sae": n, "tokens": d,
         "k": 4, "lr": 1e-3, "flops": 12 * n * d, "loss": 0.5 + n**-0.3 + d**-0.25,
         "dead_fraction": 0.0}
        for n in (64, 128, 256) for d in (1000, 4000, 16000)
    ]  # fmt: skip
    (root / "csv").mkdir()
    (root / "jsonl").mkdir()
    rows = [",".join(lines[0]), *(",".join(map(str, line.values())) for line in lines)]
    (root / "csv/results.csv").write_text("\n".join(rows) + "\n")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / "jsonl/results.jsonl").write_text(text)


def _read_table(folder: pathlib.Path, scratch: pathlib.Path) -> Arrays:
    (name,) = {"results.csv", "results.jsonl"} & {f"results.{folder.name}"}
    return tables.read(str(folder / name), ("d_sae", "tokens", "flops")).columns


_SWEEP_FILE = """from sae_jax.config import Config, from_dict
from sae_jax.sweep import grid

VALUES = {values}


def get_config():
    return from_dict(VALUES)


def get_sweep():
    return grid.product(
        grid.sweep("sae.d_sae", [16, 32]),
        grid.sweep("optimizer.learning_rate", [1e-3, 1e-2]),
    )
"""


def _make_sweep_file(root: pathlib.Path) -> None:
    store = _make_rows(root.with_name(f"{root.name}-store"))
    (root / "file").mkdir()
    text = _SWEEP_FILE.format(values=configs.to_dict(_config(store)))
    (root / "file/sweep.py").write_text(text)


def _read_sweep_file(folder: pathlib.Path, scratch: pathlib.Path) -> Arrays:
    spec = str(folder / "sweep.py")
    configs.override(configs.load_file(spec), {"train.seed": "1"})
    sweeps.load(spec, {})
    return {}


# ------------------------------------------------------------------------------------ text, tokens


def _make_texts(root: pathlib.Path) -> None:
    texts = world.TEXTS * 2
    lines = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts)
    files = {
        "plain/a.txt": "\n".join(texts).encode(),
        "lines/a.jsonl": lines.encode(),
        "strings/a.jsonl": "".join(json.dumps(text) + "\n" for text in texts).encode(),
        "list/a.json": json.dumps(texts).encode(),
        "objects/a.json": json.dumps([{"text": text} for text in texts]).encode(),
        "gz/a.jsonl.gz": gzip.compress(lines.encode()),
        "several/a.txt": texts[0].encode(),
        "several/b.jsonl": lines.encode(),
        "several/c.txt.gz": gzip.compress(texts[1].encode()),
    }
    for name, data in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    for folder in ("bz2", "xz"):
        (root / folder).mkdir()
        module = importlib.import_module({"bz2": "bz2", "xz": "lzma"}[folder])
        (root / folder / f"a.txt.{folder}").write_bytes(module.compress(texts[0].encode() * 3))


@functools.cache
def _tokenizer():
    return lm.load_tokenizer(lm.DEMO_MODEL)


def _read_text(folder: pathlib.Path, scratch: pathlib.Path) -> Arrays:
    sources = [folder] if folder.name == "several" else sorted(map(str, folder.iterdir()))
    return {"tokens": lm.pack(lm.read_texts(sources), _tokenizer(), 8)}


def _make_tokens(root: pathlib.Path) -> None:
    ids = np.arange(24, dtype=np.int32).reshape(3, 8)
    for name in ("npy", "npz", "named"):
        (root / name).mkdir()
    np.save(root / "npy/tokens.npy", ids)
    np.savez(root / "npz/tokens.npz", ids)
    np.savez(root / "named/tokens.npz", tokens=ids, other=ids[0])


def _read_tokens(folder: pathlib.Path, scratch: pathlib.Path) -> Arrays:
    suffix = "npy" if folder.name == "npy" else "npz"
    return {"tokens": read_tokens(folder / f"tokens.{suffix}")}


_SAES = tuple(
    f"{architecture}-{kind}"
    for architecture in ("relu", "jumprelu")
    for kind in ("transcoder", "skip_transcoder")
)
_CLASSES = tuple(
    f"{architecture}-autoencoder"
    for architecture in ("relu_l1_unit", "gated", "topk", "matryoshka", "jumprelu")
)

FORMATS = {
    "sae_jax": Format(_copies("sae_jax-*"), _read_sae, cost=5),
    "saelens": Format(_exports("saelens", *_SAES), _read_sae, cost=5),
    "old_saelens": Format(_make_old_saelens, _read_sae, cost=5),
    "dictionary_learning": Format(
        _exports("dictionary_learning", *_CLASSES), _read_sae, cost=8, needs=("torch",)
    ),
    "sparsify": Format(_make_sparsify, _read_sae, cost=5),
    "gemma_scope": Format(_exports("gemma_scope", "jumprelu-transcoder"), _read_sae, cost=6),
    "gemma_scope_2": Format(_exports("gemma_scope_2", *_SAES[2:]), _read_sae, cost=5),
    "openai": Format(_copies("openai-*"), _read_sae, cost=8, needs=("torch",)),
    "model": Format(_make_models, _read_model, finite=False, cost=5),
    "tokenizer": Format(_make_tokenizers, _read_tokenizer, cost=2),
    "store": Format(_make_stores, _read_store, sealed=_SEALED, cost=8),
    "live_store": Format(_make_live_store, _read_live_store, cost=8, place=True),
    "foreign": Format(_make_foreign, _read_foreign, finite=False, cost=40),
    "run": Format(
        _make_runs, _read_run, sealed=("checkpoints/*",), cost=30, place=True, rewrites=True
    ),
    "checkpoint": Format(
        _make_runs, _read_checkpoint, changed=("config.json", "checkpoints/*"),
        sealed=("checkpoints/*",), cost=30, place=True, rewrites=True,
    ),
    "evaluation": Format(_make_runs, _read_evaluation, changed=("eval*",), finite=False, cost=3),
    "sweep": Format(
        _make_sweep, _read_sweep, changed=("sweep.json", "leases/*", "runs/*"), cost=8, place=True,
        rewrites=True,
    ),
    "results": Format(_make_sweep, _read_results, cost=12, place=True, rewrites=True),
    "table": Format(_make_tables, _read_table),
    "sweep_file": Format(_make_sweep_file, _read_sweep_file, cost=4, place=True),
    "text": Format(_make_texts, _read_text, cost=2),
    "tokens": Format(_make_tokens, _read_tokens),
}  # fmt: skip
