"""Writes the dashboard as a folder of files that any web server can serve.

    index.html, ...             the page
    data/about.json             what it is about; written last, so that what has it is whole
    data/index.bin              density, mean and largest activation, and score of every latent
    data/labels.json.gz         what latents are called
    data/hints.json.gz          on which tokens they peak
    data/explanations.json.gz   all that was said of each, where latents were explained
    data/latents/00000.json.gz  256 latents each
    data/words/00.json.gz       the latents that are most active on each word, in 64 files
    data/settings.json          of what it was made, which one that goes on must be made of too

Files are written under temporary names. One that is stopped goes on where it was.
"""

import dataclasses
import gzip
import hashlib
import pathlib
import shutil
from concurrent import futures

import msgspec
import numpy as np
from absl import logging

from sae_jax import paths
from sae_jax.errors import UserError
from sae_jax.interpret.dashboard.latents import Latent, Latents
from sae_jax.interpret.dashboard.words import Words, Written
from sae_jax.json_files import checked, parse_json, read_json
from sae_jax.place_errors import explained
from sae_jax.progress_bar import progress

PAGE = pathlib.Path(__file__).parents[1] / "dashboard_page"
SHARD = 256
_LEVEL = 6  # of gzip
_SAMPLE = 24  # latents by which the size is told beforehand


@dataclasses.dataclass(frozen=True)
class About:
    """What about.json says, which the page reads first.

    Attributes:
      title: the title.
      model: the name of the language model, if it is known.
      site: the site that the SAE reads, or the sites.
      d_sae: the number of latents.
      rows: how many tokens were looked at.
      shard: how many latents are in a file.
      shards: how many files there are.
      groups: the names of the groups of examples, each as {"name": ...}.
      sae: the SAE's config.
      metrics: how good the SAE is, as triples of a label, a value and a unit.
      live: whether a server makes the files when they are asked for.
      can: which parts of the API there are: encode, generate, ablate, search.
      explained: how labels were chosen among explanations; "" where latents were not explained.
    """

    title: str
    model: str | None
    site: str
    d_sae: int
    rows: int
    shard: int
    shards: int
    groups: list[dict[str, str]]
    sae: dict
    metrics: list[tuple[str, float, str]]
    live: bool
    can: dict[str, bool]
    explained: str = ""


def about(
    latents: Latents,
    *,
    title: str,
    model: str | None = None,
    metrics=(),
    shard: int = SHARD,
    can: dict[str, bool] | None = None,
) -> About:
    """Returns what about.json says.

    Args:
      latents: the latents.
      title: the title of the page.
      model: the name of the language model.
      metrics: triples of a label, a value and a unit.
      shard: how many latents are in a file.
      can: the parts of the API that there are; None for files without a server.
    """
    known, config = latents.collection.about, dataclasses.asdict(latents.sae.config)
    parts = ("encode", "generate", "ablate", "search")
    return About(
        title=title,
        model=model,
        site=str(known.settings.get("site", "")),
        d_sae=known.d_sae,
        rows=known.rows,
        shard=shard,
        shards=-(-known.d_sae // shard),
        groups=[{"name": name} for name in latents.group_names],
        sae={name: value for name, value in config.items() if value not in (None, "", ())},
        metrics=[(label, float(value), unit) for label, value, unit in metrics],
        live=can is not None,
        can={part: bool((can or {}).get(part)) for part in parts},
        explained=latents.explained.rule if latents.explained else "",
    )


def packed(values, level: int = _LEVEL) -> bytes:
    """Returns values as JSON in gzip. The same values give the same bytes."""
    return gzip.compress(msgspec.json.encode(values), level, mtime=0)


def shard_of(latents: Latents, number: int, size: int = SHARD) -> list[Latent]:
    """Returns the latents of a file, of which each has `size`."""
    return latents.make(range(number * size, min((number + 1) * size, latents.sae.config.d_sae)))


def export(out, latents: Latents, known: About, overwrite: bool = False) -> pathlib.Path:
    """Writes the folder `out`, or what of it is missing, and returns its index.html.

    How large it will be is logged beforehand.

    Raises UserError if it holds one of other latents, and `overwrite` is not given.
    """
    out = paths.local(out)
    data = out / "data"
    settings = _settings(latents, known)
    with explained(out):
        _begin(data, settings, overwrite)
        for folder in (data / "latents", data / "words"):
            folder.mkdir(parents=True, exist_ok=True)
    files = [data / "latents" / f"{i:05}.json.gz" for i in range(known.shards)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        each = _bytes_a_latent(latents)
        logging.info(
            "%s will have about %s of latents in %s files, and some 90 small ones",
            out,
            size(each * known.d_sae),
            f"{len(files):,}",
        )
    words = Words()
    with futures.ThreadPoolExecutor(1) as packing:  # beside the making of the next file
        written = None
        for number, file in enumerate(progress(files, f"writing {out}", unit="file")):
            if file.is_file():
                made = _read(file)
            else:
                made = shard_of(latents, number)
                if written is not None:
                    written.result()
                written = packing.submit(_write, file, made)
            for latent in made:
                words.add(latent)
        if written is not None:
            written.result()
    for part, found in enumerate(words.parts()):
        paths.write(data / "words" / f"{part:02x}.json.gz", packed(found))
    paths.write(data / "index.bin", latents.columns().tobytes())
    names = {str(latent): name for latent, name in sorted(latents.labels.names.items())}
    paths.write(data / "labels.json.gz", packed(names))
    paths.write(data / "hints.json.gz", packed(latents.hints()))
    if latents.explained:
        paths.write(data / "explanations.json.gz", packed(latents.explained.texts))
    for file in page_files():
        paths.write(out / file.name, file.read_bytes())
    paths.save_json(dataclasses.asdict(known), data / "about.json")
    return out / "index.html"


def check_folder(out) -> None:
    """Raises UserError if files that are no dashboard's are where its files are to be."""
    out = paths.local(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give another --out")
    data = out / "data"
    if (data / "settings.json").is_file():
        return
    strange = [data] if data.exists() and any(data.iterdir()) else []
    strange += [data.with_name(page.name) for page in page_files()]
    for there in (path for path in strange if path.exists()):
        raise UserError(f"{there} is there, and of no dashboard; give another --out")


def page_files() -> list[pathlib.Path]:
    """Returns the files of the page, which lie beside data/."""
    return sorted(file for file in PAGE.glob("*.*") if file.suffix in PAGE_KINDS)


PAGE_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


def size(count: float) -> str:
    """Returns a number of bytes as text, such as 1.5 GB."""
    power = 0
    while count >= 1000 and power < 3:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {('bytes', 'kB', 'MB', 'GB')[power]}"


def _settings(latents: Latents, known: About) -> dict:
    """Returns what the files were made of, in words for messages, and as a hash for the rest."""
    collection, labels = latents.collection, latents.labels
    arrays = (collection.density, collection.mean_activation, collection.max_activation)
    digest = hashlib.sha256(msgspec.json.encode([labels, latents.neurons is not None]))
    if latents.explained:
        digest.update(msgspec.json.encode(sorted(latents.explained.said.items())))
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return {
        "collection": dataclasses.asdict(collection.about),
        "model": known.model,
        "language_model": latents.language_model,
        "shard": known.shard,
        "content": digest.hexdigest(),
    }


def _begin(data: pathlib.Path, settings: dict, overwrite: bool) -> None:
    file = data / "settings.json"
    if file.is_file() and read_json(file) != parse_json(paths.as_json(settings), file):
        if not overwrite:
            raise UserError(
                f"{data.parent} holds the files of other latents, texts or labels; give "
                "--overwrite to replace them, or another --out"
            )
        for name in ("about.json", "settings.json", "explanations.json.gz"):
            (data / name).unlink(missing_ok=True)
        shutil.rmtree(data / "latents", ignore_errors=True)
    elif not file.is_file():
        check_folder(data.parent)
    data.mkdir(parents=True, exist_ok=True)
    paths.save_json(settings, file)


def _bytes_a_latent(latents: Latents) -> float:
    numbers = np.unique(np.linspace(0, latents.sae.config.d_sae - 1, _SAMPLE).astype(int))
    return len(packed(latents.make(numbers))) / len(numbers)


def _write(file: pathlib.Path, made: list[Latent]) -> None:
    paths.write(file, packed(made))


def _read(file: pathlib.Path) -> list[Written]:
    try:
        data = gzip.decompress(file.read_bytes())
    except (OSError, EOFError) as error:
        raise UserError(f"{file} is damaged ({error}); remove it, and it is made again") from None
    return checked(parse_json(data, file), list[Written], file)
