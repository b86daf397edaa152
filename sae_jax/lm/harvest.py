"""Runs a language model over text and writes its activations to a store.

A shard of the store is computed whole, in batches that start where the shard starts. So a harvest
that was killed and started again writes the same bytes as one that was not.
"""

import concurrent.futures
import math
import pathlib
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from sae_jax import paths
from sae_jax.activations import LiveMeta, Store, StoreWriter
from sae_jax.activations.files import Folder
from sae_jax.activations.sites import split_names
from sae_jax.activations.writer import most_sequences
from sae_jax.config import difference
from sae_jax.errors import UserError, known_arguments
from sae_jax.lm.architecture import SITES, hook_name, site_of_hook
from sae_jax.lm.directory import hub_name
from sae_jax.lm.documents import read_texts
from sae_jax.lm.language_model import in_batches
from sae_jax.lm.live import open_store
from sae_jax.lm.model import local_mesh, open_model
from sae_jax.lm.text import PACKING_RULE, pack
from sae_jax.place_errors import explained
from sae_jax.progress_bar import make_bar

DEFAULT_CONTEXT = 1024  # where the model allows it
TOKENS_PER_DEVICE = 8192  # of a batch along `data`
TOKENS_PER_CPU = 2048  # about 1.5 times as fast there as 16k: attention scores stay in cache
_LOG_EVERY = 10.0  # seconds
_OTHER_TENSORS = {  # hooks of TransformerLens beside sites, and what is there
    "hook_mlp_in": ": it enters the MLP's norm, as resid_mid.{layer}; mlp_in.{layer} leaves it",
    "ln2.hook_normalized": ": it is before the norm's weight, and mlp_in.{layer} is after it",
    "mlp.hook_pre": ": it enters the activation function, and mlp_act.{layer} leaves it",
}


@known_arguments
def harvest(
    model_dir,
    texts: str | pathlib.Path | Iterable[str] | np.ndarray,
    out,
    *,
    sites: str | Sequence[str],
    context_length: int | None = None,
    tokens: int | None = None,
    max_bytes: int | None = None,
    batch_size: int | None = None,
    dtype: str = "bfloat16",
    model_dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    provenance: dict | None = None,
    peak_flops: float | None = None,
    live: bool = False,
    statistics_tokens: int | None = None,
    scan_layers: bool = False,
) -> Store:
    """Writes the activations of `sites` over `texts` to a store at `out`, and returns the store.

    Called again on an unfinished store it goes on at the first missing shard. On a finished store
    it does nothing. Where jax.distributed runs several processes, each of n computes every n-th
    shard, and `out` must be a directory that they share. Tokens take 8 bytes of memory each while
    they are packed, and 4 after.

    Raises UserError, before the model runs, for an unknown site, for text that fills no context,
    for a store made from other text or another model, for a disk that cannot hold the result, and
    for an object store that cannot be used.

    Args:
      model_dir: the model, as `open_model` takes it.
      texts: the documents, or the path of a file or folder of them (`read_texts`), or the token ids
        (sequences, T) of contexts that are packed already, whatever `context_length` says.
      out: the store's directory.
      sites: the site to harvest, or several, by our names or TransformerLens'
        (blocks.3.hook_resid_post), which become ours.
      context_length: tokens of a context, BOS included. None: the model's own, at most 1024.
      tokens: how many tokens to harvest at most. None: all of the text. A text that has fewer is
        warned of before the model runs.
      max_bytes: how many bytes the files of the finished store may have together. None: any number.
      batch_size: contexts in a batch, over the mesh's axis `data`. None: `default_batch`.
      dtype: the type of the store, bfloat16, float16 or float32.
      model_dtype: the type in which the model computes, float32 or bfloat16.
      mesh: axes `data` and `model` over this process's devices. None: all of them along `data`.
      provenance: what to add to the store's provenance, as values that JSON can hold.
      peak_flops: FLOP/s of the mesh's devices together, of which the progress shows how much is
        used. None: a product is timed here.
      live: whether the store keeps no activations, so that the model computes them whenever they
        are read (`lm.live`).
      statistics_tokens: how many tokens, rounded up to whole contexts, the statistics of a live
        store are taken from, spread over the text. None: all. Rows that are left out for their norm
        or for NaN are found among these.
      scan_layers: whether the layers before the first site are compiled as one loop.
    """
    if isinstance(texts, str | pathlib.Path):
        texts = read_texts([texts])
    sites = tuple(dict.fromkeys(map(our_name, split_names(sites))))
    if live and scan_layers:
        raise UserError("a live store runs its model without a loop: leave out --scan_layers")
    if statistics_tokens is not None and (not live or statistics_tokens < 1):
        raise UserError(f"statistics_tokens {statistics_tokens} is for live stores, and 1 or more")
    Folder(out)  # an object store that cannot be used is found before anything is computed
    model = open_model(model_dir, model_dtype, mesh or local_mesh(), scan_layers)
    mesh = model.mesh or local_mesh(jax.local_devices()[:1])
    tokenizer = model.tokenizer
    if not sites:
        raise UserError("no sites to harvest; name some, such as resid_post.0")
    widths = {site: model.site_width(site) for site in sites}
    is_packed = isinstance(texts, np.ndarray)
    if is_packed:
        context_length = texts.shape[1]
    elif context_length is None:
        context_length = min(model.max_context, DEFAULT_CONTEXT)
    if not 2 <= context_length <= model.max_context:
        raise UserError(
            f"context_length {context_length} is not between 2 and the model's {model.max_context}"
        )
    batch_size = _batch_size(batch_size, context_length, mesh)
    limit = tokens
    if max_bytes is not None:
        fit = _tokens_in(max_bytes, widths, dtype, context_length, live)
        limit = fit if tokens is None else min(tokens, fit)
    if is_packed:
        tokens_NxT = texts[: limit and limit // context_length]
    else:
        tokens_NxT = pack(_with_progress(texts), tokenizer, context_length, limit)
    if limit is not None and limit == tokens and len(tokens_NxT) < tokens // context_length:
        logging.warning(
            "the text has %s tokens, not the %s of --tokens; all of them are harvested",
            f"{tokens_NxT.size:,}", f"{tokens:,}",
        )  # fmt: skip
    if tokens_NxT.max() >= model.vocab_size:
        raise UserError(
            f"the tokenizer of {model_dir} gives token {tokens_NxT.max()}, but the model has "
            f"{model.vocab_size}; they do not belong together"
        )
    known = {
        **({} if is_packed else {"packing": PACKING_RULE}),
        "bos": tokenizer.bos_provenance(),
        "hooks": {site: hook_name(site) for site in sites},  # TransformerLens' names
        "layers_module": model.layers_module,
    }
    function = {"model_fingerprint": model.fingerprint, "model_dtype": model_dtype}
    made_by, shared_by = None, mesh.shape["model"]
    if live:
        known["statistics"] = "of all rows" if not statistics_tokens else (
            f"of {statistics_tokens:,} tokens, rounded up to whole contexts, spread evenly, as are "
            "the exclusions by norm; rows with NaN elsewhere are not known"
        )  # fmt: skip
        made_by = LiveMeta(model.spec, *function.values(), batch_size, shared_by, statistics_tokens)
    row_bytes = 0 if live else sum(widths.values()) * jnp.dtype(dtype).itemsize
    _check_disk(out, tokens_NxT.size, row_bytes)
    writer = StoreWriter.create_or_resume(
        out,
        sites=widths,
        dtype=dtype,
        context_length=context_length,
        num_sequences=len(tokens_NxT),
        tokens=tokens_NxT,
        model=model.spec if hub_name(model.spec) else tokenizer.name,
        tokenizer=tokenizer.name,
        special_tokens=tokenizer.special_tokens,
        provenance={**known, **(provenance or {}), **function},
        live=made_by,
    )
    begun_with = {name: writer.meta.provenance.get(name) for name in function}
    if changes := difference(begun_with, function):
        raise UserError(
            f"{out} was begun with another model ({'; '.join(changes)}); choose another directory"
        )
    mine = [
        shard
        for shard in writer.missing_shards()
        if shard.index % jax.process_count() == jax.process_index()
    ]
    sampled = _spread_sample(writer.meta, statistics_tokens, batch_size)
    if sampled is not None:
        for shard in mine:
            if shard.index not in sampled:
                writer.write_shard(shard.index, None)
        mine = [shard for shard in mine if shard.index in sampled]
    if mine:
        run = model.runner(tuple(widths), jnp.dtype(dtype))
        needed = model.flops_per_token(tuple(widths), context_length)
        floor = needed and needed / (peak_flops or matmul_rate(mesh, model_dtype))
        write_shards(writer, mine, tokens_NxT, batch_size, run, floor, sampled)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("harvest: all shards are written")
        if jax.process_index() == 0:
            writer.finish()
        multihost_utils.sync_global_devices("harvest: the store is finished")
    else:
        writer.finish()
    return open_store(out)


def write_shards(
    writer,
    shards,
    tokens_NxT,
    batch_size: int,
    run,
    floor: float | None,
    sampled: dict[int, np.ndarray] | None = None,
) -> None:
    """Computes and writes shards of a store.

    The device computes a batch while the host copies the batch before it, and while a thread
    writes the shard before it. Raises UserError if the disk is full.

    Args:
      writer: the store's writer.
      shards: the shards to write.
      tokens_NxT: the tokens of all the store's contexts.
      batch_size: contexts in a batch.
      run: the model's `runner`.
      floor: the least seconds that a token can take, or None if it is not known.
      sampled: for a live store, by the index of each shard the numbers within it of the sequences
        that the model runs on. None: all.
    """
    context_length = tokens_NxT.shape[1]
    dtypes = {site: jnp.dtype(meta.dtype) for site, meta in writer.meta.sites.items()}
    widths = {site: meta.width for site, meta in writer.meta.sites.items()}
    row_bytes = sum(width * dtypes[site].itemsize for site, width in widths.items())
    if sampled is None:
        total = sum(shard.sequences.stop - shard.sequences.start for shard in shards)
    else:
        total = sum(len(sampled[shard.index]) for shard in shards)
    with concurrent.futures.ThreadPoolExecutor(1) as pool, _Progress(
        total * context_length, row_bytes, floor
    ) as progress:  # fmt: skip
        written = None
        for shard in shards:
            chosen = None if sampled is None else sampled[shard.index]
            sequences = tokens_NxT[shard.sequences]
            sequences = sequences if chosen is None else sequences[chosen]
            values = {
                site: np.empty((*sequences.shape, width), dtypes[site])
                for site, width in widths.items()
            }
            for start, batch in in_batches(run, sequences, batch_size):
                for site, array in batch.items():
                    block = values[site][start : start + batch_size]
                    block[...] = np.asarray(array)[: len(block)]
                progress.add(len(block) * context_length)
            if written:
                _await(written)
            rows = {site: array.reshape(-1, widths[site]) for site, array in values.items()}
            written = pool.submit(writer.write_shard, shard.index, rows, chosen)
        _await(written)


def _await(written: concurrent.futures.Future) -> None:
    try:
        written.result()
    except Exception as error:  # TensorStore has no class of its own for it
        if "No space left on device" in str(error):
            raise UserError(
                "the disk is full; the shards written so far are kept: make room and start again"
            ) from None
        raise


def default_batch(context_length: int, mesh: jax.sharding.Mesh) -> int:
    """Returns how many contexts a batch has by default: some thousand tokens for each device."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    tokens = TOKENS_PER_CPU if on_cpu else TOKENS_PER_DEVICE
    return mesh.shape["data"] * max(1, tokens // context_length)


def _batch_size(batch_size: int | None, context_length: int, mesh: jax.sharding.Mesh) -> int:
    data = mesh.shape["data"]
    if batch_size is None:
        return default_batch(context_length, mesh)
    if batch_size < 1 or batch_size % data:
        raise UserError(
            f"batch_size {batch_size} is not a multiple of the mesh's data axis, {data}"
        )
    return batch_size


def _spread_sample(meta, tokens: int | None, batch_size: int) -> dict[int, np.ndarray] | None:
    """Returns sequences that hold so many tokens, spread evenly over a store: by the index of the
    shard their numbers within it.

    They come from no more shards than give a batch each, since a batch of few sequences takes as
    long as a full one. Returns None for all, where `tokens` is None.
    """
    if tokens is None:
        return None
    size = meta.shard_sequences
    count = min(-(-tokens // meta.context_length), meta.num_sequences)
    shards = min(-(-count // min(batch_size, size)), meta.num_shards)
    chosen = np.arange(shards) * meta.num_shards // shards
    sequences = (chosen[:, None] * size + np.arange(size)).reshape(-1)
    sequences = sequences[sequences < meta.num_sequences]
    sequences = sequences[np.arange(count) * len(sequences) // count]
    return {i: sequences[sequences // size == i] % size for i in set((sequences // size).tolist())}


def our_name(site: str) -> str:
    """Returns a site's name, where it has TransformerLens' name or ours.

    Raises UserError for a hook of TransformerLens at a tensor that is none of ours.
    """
    if not site.startswith("blocks."):
        return site
    ours = site_of_hook(site)
    if ours is None:
        layer, _, hook = site.removeprefix("blocks.").partition(".")
        what = _OTHER_TENSORS.get(hook, "").format(layer=layer)
        layer = layer if layer.isdecimal() else "0"
        hooks = [hook for name in SITES if (hook := hook_name(f"{name}.{layer}"))]
        raise UserError(f"{site} is at no site{what}; hooks that are: {', '.join(hooks)}")
    return ours


def _tokens_in(max_bytes: int, widths: dict, dtype: str, context_length: int, live: bool) -> int:
    """Returns how many tokens a store of `max_bytes` holds. Raises UserError where none fit."""
    made_by = LiveMeta("", "", "", 1) if live else None
    sequences = most_sequences(max_bytes, widths, dtype, context_length, made_by)
    if not sequences:
        raise UserError(
            f"max_bytes {max_bytes:,} is too little for one context of {context_length} tokens of "
            f"{', '.join(widths)}; give more, or fewer sites"
        )
    return sequences * context_length


def _check_disk(out, num_tokens: int, row_bytes: int) -> None:
    """Logs the size of the store, and raises UserError if the disk cannot hold it."""
    needed = num_tokens * (row_bytes + 5)  # a token id and a mask byte to each row
    logging.info("%s tokens, %.2f GB of activations", f"{num_tokens:,}", needed / 1e9)
    if paths.is_remote(out):
        return
    out = paths.local(out).absolute()
    with explained(out):
        if out.is_file():
            raise UserError(f"{out} is a file; give a directory for the store")
        place = next(path for path in (out, *out.parents) if path.is_dir())
        there = sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) if place == out else 0
        free = shutil.disk_usage(place).free
    if needed - there > free:
        raise UserError(
            f"the store needs {needed / 1e9:.2f} GB and {place} has {free / 1e9:.2f} GB free; "
            "ask for fewer tokens or sites, or another place"
        )


def _with_progress(texts: Iterable[str]) -> Iterator[str]:
    return make_bar(texts, desc="tokenising", unit=" documents", delay=2)


def matmul_rate(mesh: jax.sharding.Mesh, dtype: str) -> float:
    """Returns the FLOP/s of the mesh's devices together, in about 0.2 s.

    The best of a few large products on one device is taken for each of them. Devices of a CPU are
    all the same cores, so they count as one.
    """
    device = mesh.devices.flat[0]
    size = 1024 if device.platform == "cpu" else 8192
    with jax.default_device(device):
        x = jnp.ones((size, size), dtype)
        product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
        product(x).block_until_ready()
        best = math.inf
        for _ in range(4):
            begin = time.perf_counter()
            product(x).block_until_ready()
            best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best * (1 if device.platform == "cpu" else mesh.size)


class _Progress:
    """Shows tokens done, tokens/s, GB/s, how near that is to the floor, and the time left.

    It is a bar on a terminal, and elsewhere a line of the log now and then; at the end there is a
    line in any case. The first batch, which is compiled, does not count if there are others.
    """

    def __init__(self, total: int, row_bytes: int, floor: float | None):
        self.total, self.row_bytes, self.floor = total, row_bytes, floor
        self.done = self.uncounted = 0
        self.started = self.logged = time.monotonic()

    def __enter__(self):
        self.bar = make_bar(total=self.total, desc="harvest", unit="tok", unit_scale=True)
        return self

    def __exit__(self, failed, *_):
        self.bar.close()
        if not failed:
            logging.info("%s tokens: %s", f"{self.done:,}", self._rates())

    def add(self, tokens: int) -> None:
        self.done += tokens
        self.bar.set_postfix_str(self._rates(), refresh=False)
        self.bar.update(tokens)
        now = time.monotonic()
        if self.done == tokens < self.total:
            self.uncounted, self.started = tokens, now
            self.logged = now - _LOG_EVERY  # the next batch tells how long all will take
        elif self.bar.disable and now - self.logged > _LOG_EVERY and self.done < self.total:
            left = (self.total - self.done) * (now - self.started) / (self.done - self.uncounted)
            logging.info("%d of %d tokens, %s, %.0f s left",
                         self.done, self.total, self._rates(), left)  # fmt: skip
            self.logged = now

    def _rates(self) -> str:
        rate = (self.done - self.uncounted) / max(time.monotonic() - self.started, 1e-9)
        used = f", {rate * self.floor:.0%} of the FLOP floor" if self.floor else ""
        return f"{rate:,.0f} tokens/s, {rate * self.row_bytes / 1e9:.3f} GB/s{used}"
